"""Pictures in a row as a film or a sheet: .mp4 (needs PyAV), .gif, or a grid as .png.

    write_frames(Path("walk.gif"), frames, fps=25)         # frames (N, 3, H, W) in [-1, 1]

Shape letters: N frames, H height, W width.
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor

from generators.command import printable
from generators.disk import write_atomically
from generators.images import grid, to_pil, to_uint8

FORMATS = (".mp4", ".gif", ".png")


def check_format(path: Path) -> None:
    """ValueError unless `write_frames` can write such a file here."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{printable(path)}: frames are written as {', '.join(FORMATS)}; choose one of these"
        )
    if path.suffix.lower() == ".mp4":
        _av()


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
        film = _mp4(frames, fps)
        write_atomically(path, lambda file: file.write_bytes(film))


def _mp4(frames: Tensor, fps: int) -> bytes:
    """H.264 in 4:2:0, which every player reads; it wants even sides. Made in memory: PyAV waits for
    ever where the disk is full."""
    av, made = _av(), io.BytesIO()
    height, width = (side - side % 2 for side in frames.shape[-2:])
    with av.open(made, "w", format="mp4") as film:
        stream = film.add_stream("libx264", rate=Fraction(fps), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames[..., :height, :width]:
            pixels = rearrange(to_uint8(frame).cpu(), "c h w -> h w c").contiguous().numpy()
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        film.mux(stream.encode())
    return made.getvalue()


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError(
            "writing .mp4 needs PyAV: pip install 'amortized-gan-inversion[video]', or choose .gif"
        ) from error
    return av
