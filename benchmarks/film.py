"""Ten seconds of film, drawn with and without smoothing: how much it flickers, and what that costs.

    python benchmarks/film.py --output benchmarks/results/film.json \
        --film benchmarks/results/film.gif --overwrite
    python benchmarks/film.py --sweep --output sweep.json       # what the defaults were chosen by
    python benchmarks/film.py --quick                           # two seconds

The clip is made from a picture of examples/ (benchmarks/clip.py), so that the face's motion is
known. *flicker*: two drawings in a row, the first moved to where the second one lies on the face,
and their mean difference, in steps of 255. Of a face that stands still before a steady camera it
would be 0. *flicker_still*: the same, of the first three seconds, in which the face hardly moves
and the light does not change; later a part of it is right. *lag*: by how many frames the smoothed
points (against the truth) and w+ (against the unsmoothed, averaged over 9 frames) come late, by
least squares. *off*: how far the points are from the truth, as a part of the crop's side, root mean
square after their mean offset is taken out.

Rows: *each frame alone* finds the face anew in each frame, as for pictures; *tracked* is the
tracker without smoothing; then with smoothed points; then w+ smoothed as well, the default.
"""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip import PERIOD, STILL, Clip
from common import Benchmark, benchmark, show
from PIL import Image
from rich.progress import track
from torch import Tensor

from encoder.align import Face
from encoder.geometry import compose, invert, warp
from encoder.pipeline import Translator
from encoder.video import track as tracking
from encoder.video.track import OneEuro, Tracker
from generators.command import console
from generators.disk import may_write, write_atomically
from generators.images import labelled, open_image, resize, to_pil

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
POINTS = ((0.5, 10), (1, 10), (1, 20), (1, 80), (2, 20))  # cutoff, beta
LATENTS = ((0.25, 2), (0.5, 5), (1, 2), (1, 5), (1, 20), (2, 10))
LARGEST = 2_000_000  # bytes of the GIF
TRIES = ((15, 96, 128), (15, 96, 64), (15, 88, 48), (10, 96, 64), (10, 80, 32))  # colours last
QUICK = {"seconds": 2.0}


@dataclass(frozen=True)
class Config(Benchmark):
    photo: Path = EXAMPLES / "astronaut.jpg"
    seconds: float = 10.0
    fps: int = 30
    film: Path | None = None  # .gif: the clip, its drawings before and after
    sweep: bool = False  # also other cutoffs of the filters
    threads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.film is not None:
            may_write(self.film, self.overwrite)
        if not 1 <= self.fps <= 120 or not 0.5 <= self.seconds <= 600:
            raise ValueError("--fps is 1 to 120, --seconds 0.5 to 600.")


@dataclass(frozen=True)
class Way:
    """How the clip is drawn."""

    name: str
    tracked: bool = True
    points: tuple[float, float] | None = None  # cutoff and beta of their filter; None: none
    latents: tuple[float, float] | None = None


@dataclass(frozen=True)
class Drawn:
    points: np.ndarray  # (N, 5, 2)
    matrices: np.ndarray  # (N, 2, 3) of the crops in the frames
    ws: Tensor  # (N, L, D)
    drawings: Tensor  # (N, 3, R, R) in [-1, 1]


DEFAULT = Way(
    "points and w+ smoothed",
    points=(tracking.POINTS_CUTOFF, tracking.POINTS_BETA),
    latents=(tracking.WS_CUTOFF, tracking.WS_BETA),
)
WAYS = (
    Way("each frame alone", tracked=False),
    Way("tracked"),
    replace(DEFAULT, name="points smoothed", latents=None),
    DEFAULT,
)


def find(
    tracked: bool, clip: Clip, frames: list[Image.Image], translator: Translator
) -> list[Face]:
    """The first face of each frame, unsmoothed."""
    assert translator.aligner is not None
    tracker = Tracker(translator.aligner, smoothing=0)
    faces: list[Face] = []
    for time, frame in zip(clip.times(), frames, strict=True):
        found = [track.face for track in tracker(frame, time)] if tracked else []
        faces += (found or translator.aligner.detect(frame) or faces[-1:])[:1]
    return faces


def look(
    faces: list[Face], way: Way, clip: Clip, frames: list[Image.Image], translator: Translator
) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Points (N, 5, 2), smoothed or not, matrices (N, 2, 3) of their crops, and ws (N, L, D)."""
    smooth = OneEuro(*way.points) if way.points else None
    followed = []
    for time, face in zip(clip.times(), faces, strict=True):
        side = float(np.hypot(*face.matrix[:, 0]))
        points = face.points if smooth is None else smooth(face.points, time, side)
        followed.append(replace(face, points=points))
    crops = [translator.crop(*pair) for pair in zip(frames, followed, strict=True)]
    ws = torch.cat([translator.encode(translator.prepare([crop])) for crop in crops])
    return (
        np.stack([face.points for face in followed]),
        np.stack([face.matrix for face in followed]),
        ws,
    )


def draw(
    points: np.ndarray,
    matrices: np.ndarray,
    ws: Tensor,
    way: Way,
    clip: Clip,
    translator: Translator,
) -> Drawn:
    """With the latents smoothed or not."""
    if way.latents:
        calm = OneEuro(*way.latents)
        pairs = zip(clip.times(), ws, strict=True)
        ws = torch.stack([calm(w, time, float(w.square().mean().sqrt())) for time, w in pairs])
    drawings = torch.cat([translator.synthesise(w[None])[0] for w in ws])
    return Drawn(points, matrices, ws, drawings)


def flicker(drawn: Drawn, clip: Clip) -> np.ndarray:
    """(N - 1) mean differences of drawings in a row, on the face, in steps of 255."""
    side, differences = drawn.drawings.shape[-1], []
    to_unit = np.array([[side, 0.0, 0.0], [0.0, side, 0.0]])  # unit square -> pixels of a drawing
    for i, (before, now) in enumerate(itertools.pairwise(clip.times())):
        # crop of now -> frame -> the still face -> frame -> crop of before
        still = compose(invert(clip.motion(now)), drawn.matrices[i + 1])
        back = compose(invert(drawn.matrices[i]), compose(clip.motion(before), still))
        moved = warp(drawn.drawings[i : i + 1], compose(to_unit, back), side)[0]
        inner = slice(side // 8, -(side // 8))  # nothing that was beyond the border
        difference = (moved - drawn.drawings[i + 1])[:, inner, inner].abs().mean()
        differences.append(127.5 * float(difference))
    return np.array(differences)


def late(values: np.ndarray, truth: np.ndarray) -> float:
    """Frames that `values` (N, …) come after `truth`: values ≈ truth - lag * its step per frame."""
    values, truth = values.reshape(len(values), -1), truth.reshape(len(truth), -1)
    step = np.gradient(truth, axis=0)
    off = values - truth
    off = off - off.mean(axis=0)
    return float(-(off * step).sum() / max(np.square(step).sum(), 1e-12))


def averaged(values: np.ndarray, width: int = 9) -> np.ndarray:
    """(N, …), each the mean of the `width` around it."""
    padded = np.pad(values, [(width // 2, width // 2)] + [(0, 0)] * (values.ndim - 1), "edge")
    return np.lib.stride_tricks.sliding_window_view(padded, width, axis=0).mean(axis=-1)


def figures(drawn: Drawn, plain: Drawn, clip: Clip) -> dict[str, float]:
    truth = np.stack([clip.points(time) for time in clip.times()])
    side = np.hypot(*drawn.matrices[:, :, 0].T)[:, None, None]
    off = (drawn.points - truth) / side
    changes = flicker(drawn, clip)
    still = np.array(clip.times()[1:]) % PERIOD < STILL
    return {
        "flicker": round(float(changes.mean()), 3),
        "flicker_still": round(float(changes[still].mean()), 3),
        "lag_points": round(late(drawn.points, truth), 2),
        "lag_ws": round(late(drawn.ws.numpy(), averaged(plain.ws.numpy())), 2),
        "off": round(float(np.sqrt(np.square(off - off.mean(axis=0)).mean())), 4),
    }


def gif(clip: Clip, frames: list[Image.Image], before: Drawn, after: Drawn) -> tuple[bytes, str]:
    """The film, in the first of TRIES that stays below LARGEST; and what that is."""
    for fps, side, colours in TRIES:
        pick = range(0, len(frames), max(1, round(clip.fps / fps)))
        sheets = []
        for i in pick:
            wide = round(side * clip.size[0] / clip.size[1])
            sheet = Image.new("RGB", (wide + 2 * side, side))
            sheet.paste(frames[i].resize((wide, side), Image.Resampling.LANCZOS))
            for k, drawn in enumerate((before, after)):
                drawing = to_pil(resize(drawn.drawings[i], side))
                sheet.paste(drawing, (wide + k * side, 0))
            sheets.append(sheet)
        labels = Image.new("RGB", (sheets[0].width, 1))
        head = labelled(labels, ["camera", "each frame", "smoothed"])
        head = head.crop((0, 0, head.width, head.height - 1))
        whole = []
        for sheet in sheets:
            page = Image.new("RGB", (sheet.width, sheet.height + head.height), "white")
            page.paste(head)
            page.paste(sheet, (0, head.height))
            whole.append(page)
        some = Image.new("RGB", (whole[0].width, 8 * whole[0].height))
        for k in range(8):
            some.paste(whole[k * (len(whole) - 1) // 7], (0, k * whole[0].height))
        palette = palette_of(some, colours)
        pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in whole]
        made = io.BytesIO()
        ends = [round(100 * i / fps) for i in range(len(pages) + 1)]  # a GIF counts in 10 ms
        durations = [10 * (stop - start) for start, stop in itertools.pairwise(ends)]
        pages[0].save(made, "GIF", save_all=True, append_images=pages[1:], loop=0,
                      duration=durations, optimize=False)  # fmt: skip
        if made.tell() <= LARGEST:
            return made.getvalue(), f"{fps} frames a second, {colours} colours, {len(pages)} frames"
    raise ValueError(f"The GIF is above {LARGEST:,} bytes; give fewer --seconds.")


def palette_of(image: Image.Image, colours: int) -> Image.Image:
    """An image with such a palette: three quarters by area, the rest by range of colours, without
    which small vivid places, irises, turn grey."""
    rare = colours // 4
    parts = (colours - rare, Image.Quantize.MEDIANCUT), (rare, Image.Quantize.MAXCOVERAGE)
    found: list[int] = []
    for count, method in parts:
        found += (image.quantize(count, method=method).getpalette() or [])[: 3 * count]
    made = Image.new("P", (1, 1))
    made.putpalette(found)
    return made


def run(config: Config) -> dict[str, Any]:
    translator = Translator.bundled()
    clip = Clip([open_image(config.photo)], (640, 480), config.seconds, config.fps,
                translator.aligner)  # fmt: skip
    frames = [frame for _, frame in clip.frames()]
    ways = list(WAYS)
    if config.sweep:
        ways += [replace(DEFAULT, name=f"w+ {w}", latents=w) for w in LATENTS]
        ways += [replace(DEFAULT, name=f"points {p}", points=p) for p in POINTS]
    faces, looked, drawn, rows = {}, {}, {}, []
    for way in track(ways, "ways", console=console):
        if way.tracked not in faces:
            faces[way.tracked] = find(way.tracked, clip, frames, translator)
        seen = (way.tracked, way.points)
        if seen not in looked:
            looked[seen] = look(faces[way.tracked], way, clip, frames, translator)
        drawn[way.name] = draw(*looked[seen], way, clip, translator)
        plain = drawn["tracked" if way.tracked else way.name]
        rows.append({"way": way.name} | figures(drawn[way.name], plain, clip))
        console.print(str(rows[-1]))
    show(rows)
    report: dict[str, Any] = {"fps": config.fps, "seconds": config.seconds, "rows": rows}
    if config.film is not None:
        data, how = gif(clip, frames, drawn["tracked"], drawn[DEFAULT.name])
        write_atomically(config.film, lambda file: file.write_bytes(data))
        report["film"] = {"bytes": len(data), "how": how}
    return report


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark("film", Config, run, QUICK, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
