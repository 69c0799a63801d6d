"""Files: finding them, and writing them whole or not at all.

for file, relative in find_files("photos/", frozenset({".png"}), "picture"): …
with open_regular(file) as stream: …                            # never waits for a named pipe
may_write(target, overwrite=config.overwrite, sources=[source])     # before anything is loaded
write_atomically(target, lambda temporary: temporary.write_text("…"))
"""

import errno
import glob
import hashlib
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from generators.command import printable

try:
    import fcntl
except ImportError:  # Windows: there, nobody keeps two processes apart
    fcntl = None  # type: ignore[assignment]

Parts = tuple[str, ...]  # of a relative path, or of a pattern for such


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write(temporary path) and renames: `path` is either the old file or the new one.

    The folder is made if need be. Raises OSError, naming `path`, where that cannot be done; then,
    and after an interruption, no temporary file is left.
    """
    name = hashlib.blake2b(path.name.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")  # short, whatever the file's name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's own: safetensors would leave 0600
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error
    except (SafetensorError, RuntimeError) as error:  # theirs and torch's, where a write failed
        number = re.search(r"(?:os error|Os { code:) (\d+)", str(error))  # new and old versions
        if number is None and not re.search("write|inline_container", str(error)):
            raise
        code = int(number[1]) if number else _why_not(path.parent)
        raise OSError(code, os.strerror(code), str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _why_not(folder: Path) -> int:
    """The likely reason where a library only says that a write failed."""
    status = os.statvfs(folder)
    return errno.ENOSPC if status.f_bavail * status.f_frsize < 2**20 else errno.EIO


def may_write(path: Path, overwrite: bool = False, sources: Iterable[Path] = ()) -> None:
    """ValueError, one sentence, where `path` must not or cannot be written: it is one of the
    `sources`, it exists and is not to be replaced, it is a folder, or one above it is a file."""
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file.")
    if any(path.resolve() == source.expanduser().resolve() for source in sources):
        raise ValueError(f"{path} is an input and would be replaced; give another output.")
    if os.path.lexists(path) and not overwrite:
        raise ValueError(f"{path} exists; give another name, or --overwrite to replace it.")
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise ValueError(f"{above} is not a folder, so {path} cannot be written; give another.")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps the folder, made if need be, to this process while the block runs.

    ValueError where another process holds it. Nothing is left behind, whatever ends the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        if handle is not None:
            with suppress(OSError):  # a file system without locks …
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # … is not one where it is taken
                    raise ValueError(
                        f"Another process is at work in {folder}; wait for its end, or give "
                        "another folder."
                    ) from None
        yield
    finally:
        if handle is not None:
            os.close(handle)


def open_regular(path: str | Path) -> BinaryIO:
    """The file, opened for reading. OSError, its `strerror` a phrase, for all that is none: opening
    a named pipe would wait for ever, a device may have no end."""
    path = Path(path).expanduser()
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        reason = "the link leads nowhere" if path.is_symlink() else "there is no such file"
        raise FileNotFoundError(errno.ENOENT, reason, str(path)) from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a file", str(path))
    return open(path, "rb")


def find_files(source: str | Path, suffixes: frozenset[str], what: str) -> list[tuple[Path, Path]]:
    """A file itself, or the files of these suffixes in a folder and its sub-folders or of a glob
    (`**` too), sorted. `what` names them in messages.

    Returns [(file, its path relative to the folder or to the fixed part of the glob)]. Hidden files
    and folders are left out; a folder is entered once, however many links lead to it. What cannot
    be read is listed and fails when opened: a link that leads nowhere, a named pipe, a closed
    folder. ValueError when nothing is found.
    """
    path, shown = Path(source).expanduser(), printable(source)
    root = path
    pattern: Parts = ("**", "*")
    if os.path.exists(path) and not os.path.isdir(path):
        return [(path, Path(path.name))]
    if not os.path.isdir(path):
        magic = [i for i, part in enumerate(path.parts) if glob.has_magic(part)]
        if not magic:
            raise ValueError(f"There is no file or folder '{shown}'; check the path.")
        root, pattern = Path(*path.parts[: magic[0]]), path.parts[magic[0] :]

    found = [(root.joinpath(*parts), closed) for parts, closed in _walk(root, pattern)]
    result = [
        (file, file.relative_to(root))
        for file, closed in found
        if closed
        or file.suffix.lower() in suffixes
        or (not file.suffix and not os.path.exists(file))  # a link that led to a folder, maybe
    ]
    if not result:
        raise ValueError(f"No {what} found in '{shown}'; give a {what}, a folder or a glob.")
    return sorted(result, key=lambda pair: pair[1].as_posix())


def _walk(root: Path, pattern: Parts) -> Iterator[tuple[Parts, bool]]:
    """(parts of the relative path, whether it is a closed folder) of all that fits the pattern, but
    for folders. Links to folders come last, so that a file is found in its own folder first."""
    folders: deque[Parts] = deque([()])
    links: deque[Parts] = deque()
    entered = set()
    while folders or links:
        parts = (folders or links).popleft()
        folder = root.joinpath(*parts)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError as error:
            if not parts:
                reason = error.strerror or error
                raise ValueError(f"Cannot read {printable(root)}: {reason}.") from error
            yield parts, True
            continue
        for name in names:
            below = (*parts, name)
            if name.startswith("."):
                continue
            if not os.path.isdir(folder / name):
                if _fits(below, pattern):
                    yield below, False
            elif _fits(below, pattern, above=True):
                (links if (folder / name).is_symlink() else folders).append(below)


def _fits(parts: Parts, pattern: Parts, above: bool = False) -> bool:
    """Whether a path fits the pattern, or with `above`, whether something below it may."""
    if not parts and above:
        return bool(pattern)
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return above or any(_fits(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts and fnmatchcase(parts[0], pattern[0])) and _fits(
        parts[1:], pattern[1:], above
    )
