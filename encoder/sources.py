"""Raw pictures of a folder, an archive or a Hugging Face data set, one after another, undecoded.

    for raw in find_sources("photos.tar.gz"):
        picture = open_image(raw.read())                # ValueError: why this one cannot be read

Nothing is extracted to disk, and no name from an archive ever becomes a path. Every file is given,
also one that is no picture, so that all of them can be accounted for.
"""

import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import NoReturn

from generators.data import open_hub, open_parquet, open_saved, payload
from generators.images import SUFFIXES, find_files

MAX_BYTES = 512 * 1024**2  # of one encoded picture
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
DAMAGE = (OSError, EOFError, RuntimeError, zlib.error, LZMAError, tarfile.TarError,
          zipfile.BadZipFile)  # fmt: skip  # RuntimeError: unknown compression, password


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
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"{path} holds splits; give the folder of one: {path / splits[0]}.")
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
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)


def _check_size(count: int) -> None:
    if count > MAX_BYTES:
        raise ValueError(f"it is too large ({count:,} bytes)")


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
    _check_size(member.file_size)  # and no more than that is unpacked, whatever follows
    try:
        return archive.read(member)
    except DAMAGE as error:
        raise ValueError(f"its place in the archive is damaged or encrypted ({error})") from error


def _tar(path: Path) -> Iterator[Raw]:
    try:
        archive = tarfile.open(path)
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


def _ends_well(archive: tarfile.TarFile) -> bool:
    """Whether zeros mark the end: tarfile takes damage after the first member for the end too."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    return archive.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if not member.isfile():
        raise ValueError("it is a link or no ordinary file")
    _check_size(member.size)
    try:
        file = archive.extractfile(member)
        assert file is not None
        return file.read()
    except DAMAGE as error:
        raise ValueError(f"its place in the archive is damaged or encrypted ({error})") from error


# -------------------------------------------------------------------------- Hugging Face


def _only_parquet(path: Path) -> bool:
    suffixes = {file.suffix.lower() for file in path.rglob("*")}
    return ".parquet" in suffixes and not suffixes & SUFFIXES


def _parquets(path: Path, column: str) -> Iterator[Raw]:
    for file, relative in find_files(path, frozenset({".parquet"}), "parquet file"):
        rows = open_parquet([file], column)
        for i in range(len(rows)):
            yield Raw(_text(f"{relative.as_posix()}#{i}"), partial(_row, rows, i))


def _row(rows: Sequence[Path | bytes], index: int) -> Path | bytes:
    cell = rows[index]
    return _file(cell) if isinstance(cell, Path) else cell


def _stream(spec: str, column: str) -> Iterator[Raw]:
    for i, row in enumerate(open_hub(spec, 1, column, None).rows):
        yield Raw(f"row {i}", partial(payload, row[column]))
