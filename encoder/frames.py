"""Pictures in a row as a film or a sheet: .mp4 (needs PyAV), .gif, or a grid as .png.

    write_frames(Path("walk.gif"), frames, fps=25)         # frames (N, 3, H, W) in [-1, 1]

Shape letters: N frames, H height, W width.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from pathlib import Path

from torch import Tensor

from encoder.films import FilmWriter, load_av
from generators.command import printable
from generators.disk import write_atomically
from generators.images import grid, to_pil

FORMATS = (".mp4", ".gif", ".png")


def check_format(path: Path) -> None:
    """ValueError unless `write_frames` can write such a file here."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{printable(path)}: frames are written as {', '.join(FORMATS)}; choose one of these"
        )
    if path.suffix.lower() == ".mp4":
        load_av("a film as .mp4, where .gif does not do,")


def write_frames(path: Path, frames: Tensor, fps: int = 25) -> None:
    """(N, 3, H, W) in [-1, 1] -> a film that loops (.gif), a film (.mp4) or a sheet (.png)."""
    check_format(path)
    if len(frames) == 0:
        raise ValueError("there are no frames to write; give at least one")
    suffix = path.suffix.lower()
    if suffix == ".png":
        write_atomically(path, lambda file: grid(frames).save(file, format="PNG"))
    elif suffix == ".gif":
        first, *rest = [to_pil(frame) for frame in frames]
        options = {"save_all": True, "append_images": rest, "duration": 1000 / fps, "loop": 0}
        write_atomically(path, lambda file: first.save(file, format="GIF", **options))
    else:
        write_atomically(path, partial(_mp4, frames, fps))


def _mp4(frames: Tensor, fps: int, file: Path) -> None:
    height, width = frames.shape[-2:]
    with open(file, "wb") as stream:
        film = FilmWriter(stream, (width, height), Fraction(fps))
        for i, frame in enumerate(frames):
            film.add(to_pil(frame), i / fps)
        film.close()
