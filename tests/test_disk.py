"""Files are written whole or not at all, and nothing is replaced without a word.

pytest tests/test_disk.py
"""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from generators import blocks, checkpoint, convert, curvature
from generators.checkpoint import save
from generators.disk import find_files, may_write, open_regular, write_atomically


def test_a_file_is_written_with_its_folder_and_the_users_mode(tmp_path):
    target = tmp_path / "new" / "a.txt"
    write_atomically(target, lambda file: file.write_text("whole"))
    assert target.read_text() == "whole" and list(target.parent.iterdir()) == [target]
    (tmp_path / "b").touch()
    assert target.stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(28, "full")])
def test_what_goes_wrong_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write(file):
        file.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(target, write)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


@contextmanager
def files_of(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: nor may what pytest writes to, so be short."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(bytes(100_000)),
        lambda file: torch.save({"x": torch.zeros(100_000)}, file),
        lambda file: save_file({"x": torch.zeros(100_000)}, file),
    ],
    ids=["bytes", "torch", "safetensors"],
)
def test_a_disk_that_takes_no_more_is_an_error_that_names_the_file(tmp_path, write):
    with files_of(4096), pytest.raises(OSError, match=r"a\.bin") as caught:
        write_atomically(tmp_path / "a.bin", write)
    assert caught.value.errno in (errno.EFBIG, errno.EIO, errno.ENOSPC)
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="below"):
        write_atomically(tmp_path / "file" / "below", lambda file: file.write_text("x"))
    assert (tmp_path / "file").read_text() == "x"


def test_names_as_long_as_a_file_system_takes_them(tmp_path):
    for name in ("a" * 251 + ".txt", "é" * 125 + ".txt", os.fsdecode(b"\xff" * 200)):
        write_atomically(tmp_path / name, lambda file: file.write_text("x"))
        assert (tmp_path / name).read_text() == "x"


def test_what_must_not_be_written_is_said_beforehand(tmp_path):
    here, link = tmp_path / "a.txt", tmp_path / "dangling"
    may_write(here)
    may_write(tmp_path / "new" / "folder" / "a.txt")
    here.write_text("x")
    link.symlink_to(tmp_path / "nowhere")
    for path, options, sentence in (
        (here, {}, "exists"),
        (link, {}, "exists"),
        (tmp_path, {"overwrite": True}, "is a folder"),
        (here, {"overwrite": True, "sources": [here]}, "is an input"),
        (here / "below" / "b.txt", {}, "is not a folder"),
    ):
        with pytest.raises(ValueError, match=sentence):
            may_write(path, **options)
    may_write(here, overwrite=True)


# ---------------------------------------------------------------------------- finding


TEXT = frozenset({".txt"})


def names(source):
    return [relative.as_posix() for _, relative in find_files(source, TEXT, "text")]


@pytest.fixture
def tree(tmp_path):
    """a.txt, b/c.txt, and in b links to itself, to its parent and to a folder outside."""
    root = tmp_path / "tree"
    (root / "b").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for file in (root / "a.txt", root / "b" / "c.txt", tmp_path / "outside" / "d.txt"):
        file.touch()
    (root / "0").symlink_to(root / "b")
    (root / "b" / "self").symlink_to(root / "b")
    (root / "b" / "up").symlink_to(root)
    (root / "b" / "out").symlink_to(tmp_path / "outside")
    return root


def test_links_to_folders_are_followed_once(tree):
    expected = ["a.txt", "b/c.txt", "b/out/d.txt"]
    assert names(tree) == names(f"{tree}/**/*") == names(f"{tree}/**/*.txt") == expected
    assert names(f"{tree}/**/b/**/?.txt") == ["b/c.txt", "b/out/d.txt"]
    assert names(f"{tree}/*/*.txt") == ["b/c.txt"]
    assert names(f"{tree}/*.txt") == ["a.txt"]


def test_what_cannot_be_read_is_listed_and_fails_when_opened(tree, monkeypatch):
    os.mkfifo(tree / "pipe.txt")
    (tree / "nowhere.txt").symlink_to("none")
    (tree / "gone").symlink_to("none")  # once a folder, maybe
    (tree / "circle.txt").symlink_to("circle.txt")
    (tree / "other.md").symlink_to("none")
    scandir, closed = os.scandir, tree / "closed"
    closed.mkdir()

    def refuse(path):
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listed = {"pipe.txt", "nowhere.txt", "gone", "circle.txt", "closed"}
    for source in (tree, f"{tree}/**"):
        assert set(names(source)) == listed | {"a.txt", "b/c.txt", "b/out/d.txt"}
    for name in listed:
        with pytest.raises(OSError):
            open_regular(tree / name)
    with pytest.raises(ValueError, match=r"Cannot read .*closed: Permission denied"):
        names(closed)


def test_the_longest_names_are_found_and_written(tmp_path):
    for length in (250, 255):
        name = "x" * (length - 4) + ".txt"
        write_atomically(tmp_path / name, lambda file: file.write_text("a"))
        assert names(tmp_path) == [name]
        (tmp_path / name).unlink()


# ------------------------------------------------------------------ commands of generators


@pytest.fixture
def commands(tmp_path, face):
    """The commands that write one file: name -> what runs it with that output."""
    source = str(tmp_path / "face.safetensors")
    save(source, face)
    theirs = str(Path(__file__).parent / "golden" / "rosinality_tiny32.pt")
    return {
        "convert": lambda out: convert.main([theirs, out]),
        "checkpoint": lambda out: checkpoint.main([source, out]),
        "curvature": lambda out: curvature.main([source, out, "--probes", "60", "--rank", "48"]),
        "blocks": lambda out: blocks.main([source, source, "--grid", out]),
    }


@pytest.mark.parametrize("name", ["convert", "checkpoint", "curvature", "blocks"])
def test_a_command_that_cannot_write_says_why(tmp_path, commands, name, capsys):
    def reason(out: Path) -> str:
        capsys.readouterr()
        assert commands[name](str(out)) == 2
        assert list(tmp_path.rglob("*.tmp")) == []
        (line,) = capsys.readouterr().err.splitlines()
        return line

    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert "is not a folder, so" in reason(tmp_path / "file" / "out.safetensors")
    assert "is a folder; give the name of a file" in reason(tmp_path / "folder")
    assert "exists; give another name, or --overwrite" in reason(tmp_path / "file")
    with files_of(4096):
        said = reason(tmp_path / "new" / "out.safetensors")
    assert "File too large" in said
    assert not (tmp_path / "new" / "out.safetensors").exists()
    assert "File name too long" in reason(tmp_path / ("x" * 300))
