"""Raw pictures of a folder, an archive or a Hugging Face data set, one after another, undecoded.

    for raw in find_sources("photos.tar.gz"):
        picture = open_image(raw.read())                # ValueError: why this one cannot be read

Nothing is extracted to disk, and no name from an archive ever becomes a path. Every file is given,
also one that is no picture, so that all of them can be accounted for. Whatever an archive says of
its sizes, no more than MAX_BYTES of it are in memory at a time.
"""

import bz2
import gzip
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn

from PIL import Image

from generators.command import printable
from generators.data import open_hub, open_parquet, open_saved, payload
from generators.disk import find_files
from generators.images import FORMATS, SUFFIXES

MAX_BYTES = 512 * 1024**2  # of one encoded picture
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PACKED = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by a file's first bytes
DAMAGE = (OSError, EOFError, ValueError, RuntimeError, MemoryError, OverflowError, struct.error,
          zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)  # fmt: skip
# ValueError: numbers that are none; RuntimeError: unknown compression, password


@dataclass(frozen=True)
class Raw:
    """One input."""

    name: str  # inside the folder or archive; valid UTF-8, other bytes as \\xff
    read: Callable[[], Path | bytes]
    """What `open_image` takes; call it before the next input is asked for. ValueError, a phrase
    with variable parts in brackets: why there is nothing to be read."""


def find_sources(spec: str, column: str = "image") -> Iterator[Raw]:
    """All inputs in a fixed order: names sorted in a folder, else as they are stored.

    spec: a folder | .zip, .tar, .tar.gz (.bz2, .xz) | a .parquet file, a glob, a folder with
        nothing else to look at | a folder written by `save_to_disk` | "hf:NAME" or "hf:NAME:SPLIT"
    column: where parquet and Hugging Face data keep the picture

    Raises ValueError where there is no such data.
    """
    path = Path(spec).expanduser()
    if spec.startswith("hf:"):
        return _stream(spec, column)
    if path.is_file() and path.suffix.lower() == ".zip":
        return _zip(path)
    if path.is_file() and path.name.lower().endswith(TARS):
        return _tar(path)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(folder.parent.name for folder in path.glob("*/state.json"))
        one = f": {path / splits[0]}" if splits else ""
        raise ValueError(f"{path} holds splits; give the folder of one{one}.")
    if (path / "state.json").is_file():
        rows = open_saved(path, column, None)
        return (Raw(f"row {i}", partial(_row, rows, i)) for i in range(len(rows)))
    if path.suffix == ".parquet" or (path.is_dir() and _only_parquet(path)):
        return _parquets(path, column)
    if path.is_dir():
        return _folder(path)
    raise ValueError(
        f"{spec!r} is neither a folder nor an archive ({', '.join(('.zip', *TARS))}) nor parquet; "
        "check the path."
    )


def _named(name: str, read: Callable[[], Path | bytes]) -> Raw:
    """A file of a folder or archive, refused if its name says that it is not meant."""
    parts = PurePosixPath(name).parts
    if any(part.startswith(".") and part not in (".", "..") for part in parts):
        read = partial(_refuse, "it is hidden")
    elif PurePosixPath(name).suffix.lower() not in SUFFIXES:
        read = partial(_refuse, "its name does not end like a picture's")
    return Raw(_text(name), read)


def _text(name: str) -> str:
    known = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return printable(known, limit=1000)


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)


def _check_size(count: int) -> None:
    if count > MAX_BYTES:
        raise ValueError(f"it is too large ({count:,} bytes)")


def _may_be_picture(head: bytes) -> bool:
    """By the first 16 bytes, all that Pillow tells formats by."""
    Image.init()
    tests: list[Any] = [Image.OPEN[kind][1] for kind in FORMATS if kind in Image.OPEN]
    return any(test(head) is True for test in tests)


def _file(path: Path) -> Path:
    if not path.is_file():  # a pipe would never end
        raise ValueError("it is a broken link or no ordinary file")
    _check_size(path.stat().st_size)
    return path


# ------------------------------------------------------------------------------- folders


def _folder(root: Path) -> Iterator[Raw]:
    found: list[Raw] = []

    def relative(path: str) -> str:
        return Path(path).relative_to(root).as_posix()

    def failed(error: OSError) -> None:
        reason = f"the folder cannot be read ({error.strerror})"
        found.append(Raw(_text(relative(error.filename)), partial(_refuse, reason)))

    for top, folders, files in os.walk(root, onerror=failed):
        for name in list(folders):
            path = os.path.join(top, name)
            reason = "it is hidden" if name.startswith(".") else "it is a link to a folder"
            if name.startswith(".") or os.path.islink(path):  # links may lead round in circles
                folders.remove(name)
                found.append(Raw(_text(relative(path)), partial(_refuse, reason)))
        for name in files:
            path = os.path.join(top, name)
            found.append(_named(relative(path), partial(_file, Path(path))))
    return iter(sorted(found, key=lambda raw: raw.name))


# ------------------------------------------------------------------------------ archives


def _zip(path: Path) -> Iterator[Raw]:
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGE as error:
        raise ValueError(f"Cannot read {path}: not a zip archive, or damaged.") from error
    with archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield _named(member.filename, partial(_zip_member, archive, member))


def _zip_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    return _unpacked(lambda: archive.open(member), member.file_size)


def _tar(path: Path) -> Iterator[Raw]:
    with open(path, "rb") as file:
        unpack: Any = PACKED.get(file.read(2), open)
    try:
        stream: Any = _Bounded(unpack(path, "rb"))
        archive = tarfile.open(fileobj=stream, mode="r:")
    except DAMAGE as error:
        raise ValueError(f"Cannot read {path}: not a tar archive, or damaged.") from error
    with archive:
        while True:
            try:
                member = archive.next()
                whole = member is not None or _ends_well(archive)
            except DAMAGE:
                member, whole = None, False
            if member is None:
                break
            if not member.isdir():
                yield _named(member.name, partial(_tar_member, archive, member))
        if not whole:
            yield Raw("(the rest)", partial(_refuse, "the archive is damaged from here on"))


class _Bounded:
    """A stream that is never asked for more than MAX_BYTES at once: headers may be that long."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.seek, self.tell = stream.seek, stream.tell
        self._read = stream.read

    def read(self, count: int) -> bytes:
        if not 0 <= count <= MAX_BYTES:
            raise tarfile.ReadError("too large")
        return self._read(count)


def _ends_well(archive: tarfile.TarFile) -> bool:
    """Whether zeros mark the end: tarfile takes damage after the first member for the end too."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    return archive.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if not member.isfile():
        raise ValueError("it is a link or no ordinary file")
    return _unpacked(lambda: archive.extractfile(member), member.size)


def _unpacked(member: Callable[[], IO[bytes] | None], size: int) -> bytes:
    """All of a member that is said to have `size` bytes, and no byte more, whatever follows."""
    _check_size(size)
    try:
        stream = member()
        assert stream is not None
        with stream:
            head = stream.read(16)
            if not _may_be_picture(head):  # nor worth unpacking, which a bomb would make long
                return head
            return head + stream.read(size - len(head))
    except DAMAGE as error:
        reason = printable(str(error) or type(error).__name__)
        raise ValueError(f"its place in the archive is damaged or encrypted ({reason})") from error


# -------------------------------------------------------------------------- Hugging Face


def _only_parquet(path: Path) -> bool:
    suffixes = {file.suffix.lower() for file in path.rglob("*")}
    return ".parquet" in suffixes and not suffixes & SUFFIXES


def _parquets(path: Path, column: str) -> Iterator[Raw]:
    for file, relative in find_files(path, frozenset({".parquet"}), "parquet file"):
        if not file.is_file():
            yield _named(relative.as_posix(), partial(_file, file))
            continue
        rows = open_parquet([file], column)
        for i in range(len(rows)):
            yield Raw(_text(f"{relative.as_posix()}#{i}"), partial(_row, rows, i))


def _row(rows: Sequence[Path | bytes], index: int) -> Path | bytes:
    cell = rows[index]
    if isinstance(cell, Path):
        return _file(cell)
    _check_size(len(cell))
    return cell


def _stream(spec: str, column: str) -> Iterator[Raw]:
    for i, row in enumerate(open_hub(spec, 1, column, None).rows):
        yield Raw(f"row {i}", partial(payload, row.get(column)))
