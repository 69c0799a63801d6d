"""Drawings made from pictures by filters: pencil and gouache, the domains of more styles.

    python -m generators.filters sketch --output sketch/              # of 4,000 samples of face64
    python -m generators.filters paint --output paint/ --latents codes/        # and of 4,000 codes

Draws faces with a generator, enlarges them by super-resolution so that lines are fine, filters them
and shrinks them again. Writes OUT/drawings.parquet and OUT/latents.safetensors, the i-th ws being
that of the i-th drawing: data for `generators.train stylegan2 --paired-weight`, which trains the
last blocks to draw the same in one pass. Needs `pip install '.[prepare]'`, for OpenCV.

Shape letters: N pictures, B batch, L layers of w+, D dimension of w, R resolution, S side.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from torch import Tensor

from generators.bundled import FACE
from generators.checkpoint import load, resolve
from generators.command import command, console, printable
from generators.disk import may_write, write_atomically
from generators.images import resize, to_pil
from generators.latents import read_ws, write_latents
from generators.runs import check_numbers, progress, step_generator
from generators.stylegan2 import Generator
from generators.superres import SuperResolution, upscale

FINER = 2  # the side of what is filtered, in sides of what is drawn
BATCH = 32
DRAWINGS, LATENTS = "drawings.parquet", "latents.safetensors"

Picture = np.ndarray  # (S, S, 3), float32, RGB in [0, 1]


def opencv() -> Any:
    """The package cv2; ValueError, a sentence, where it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            "The package cv2 is missing; pip install 'amortized-gan-inversion[prepare]' brings it."
        ) from error
    return cv2


# ------------------------------------------------------------------------------ the filters


def pencil(picture: Picture) -> Picture:
    """Graphite on white paper: a picture divided by its blurred self ("dodge and burn") is white
    but along its edges; under it lies a grey wash where the picture is dark, and all of it fades
    into the paper towards the corners. Grey, (S, S, 3)."""
    cv2, unit = opencv(), len(picture) / 256
    light = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    around = cv2.GaussianBlur(light, (0, 0), 6 * unit)
    lines = np.clip((light + 0.1) / (around + 0.1), 0, 1) ** 3.5  # 0.1: no noise in the dark
    wash = 0.5 + 0.5 * np.clip(cv2.GaussianBlur(light, (0, 0), 4 * unit) / 0.55, 0, 1)
    y, x = np.mgrid[-1 : 1 : len(picture) * 1j, -1 : 1 : len(picture) * 1j]
    away = np.clip((np.hypot(x / 1.02, (y - 0.02) / 1.1) - 0.82) / 0.3, 0, 1)
    paper = away * away * (3 - 2 * away)
    drawn = (lines * wash) * (1 - paper) + paper
    return np.repeat(drawn[..., None].astype(np.float32), 3, axis=2)


def gouache(picture: Picture) -> Picture:
    """Flat patches of paint: mean shift (Comaniciu & Meer 2002) joins neighbours of like colour,
    then the lightness goes in five soft steps (Winnemöller et al. 2006, "Real-Time Video
    Abstraction", section 3.4); colours are stronger, lights warmer and shadows cooler."""
    cv2, unit = opencv(), len(picture) / 256
    bytes_ = np.round(255 * picture).astype(np.uint8)
    flat = cv2.pyrMeanShiftFiltering(bytes_, 10 * unit, 34, maxLevel=1)
    lab = cv2.cvtColor(flat.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    steps = 5 * (lab[..., 0] / 100) ** 0.7  # lighter, too
    nearest = np.round(steps)
    light = np.clip((nearest + 0.5 * np.tanh(6 * (steps - nearest))) / 5, 0, 1)
    lab[..., 0] = 100 * light
    lab[..., 1:] *= 1.5
    lab[..., 2] += 20 * (light - 0.6)
    return np.clip(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), 0, 1)


FILTERS: dict[str, Callable[[Picture], Picture]] = {"sketch": pencil, "paint": gouache}


def filtered(name: str, pictures: Tensor) -> Tensor:
    """(B, 3, S, S) in [-1, 1] -> the same, each picture by itself, on the CPU."""
    arrays = ((pictures.cpu().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).contiguous().numpy()
    drawn = np.stack([FILTERS[name](array) for array in arrays])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1


# ------------------------------------------------------------------------------ the command


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    filter: Annotated[Literal["sketch", "paint"], tyro.conf.Positional]  # what is made
    output: Path  # folder, made if need be
    face_generator: str = FACE  # that draws the faces: a bundled name or a file
    samples: int = 4_000  # faces of z, truncation 1
    latents: Path | None = None  # file or folder of ws, an encoder's of photos, to draw as well
    codes: int = 4_000  # of these, evenly spread, at most
    superres: str = "superres64"  # enlarges before the filter: a bundled name or a file
    seed: int = 0  # of the samples
    overwrite: bool = False  # replace files that exist

    def __post_init__(self) -> None:
        check_numbers(self, {"of 0 or more": ("samples", "codes")})


@torch.inference_mode()
def faces_to_draw(config: FilterConfig, face: Generator) -> Tensor:
    """(N, L, D): the ws of samples, then of the given latents."""
    rng = step_generator(config.seed, 0, "samples")
    z = torch.randn(config.samples, face.z_dim, generator=rng)
    found = [face.map(z)] if config.samples else []
    if config.latents is not None and config.codes:
        given = read_ws(config.latents, face)
        count = min(config.codes, len(given))
        found.append(given[torch.arange(count) * len(given) // count])
    if not found:
        raise ValueError("There is no face to draw; give --samples a number above 0, or --latents.")
    return torch.cat(found)


@torch.inference_mode()
def drawing(name: str, face: Generator, superres: SuperResolution, ws: Tensor) -> Tensor:
    """ws (B, L, D) -> (B, 3, R, R) in [-1, 1]: the filter's drawings of the faces."""
    pictures = face.synthesis(ws).clamp(-1, 1)
    fine = filtered(name, upscale(superres, pictures, FINER * face.resolution))
    return resize(fine, face.resolution, "area")


def run(config: FilterConfig) -> None:
    opencv()
    sources = [config.latents] if config.latents else []
    for name in (DRAWINGS, LATENTS):
        may_write(config.output / name, config.overwrite, sources)
    face = load(resolve(config.face_generator), Generator)
    superres = load(resolve(config.superres), SuperResolution)
    ws = faces_to_draw(config, face)
    drawn: list[Tensor] = []
    with progress(len(ws), 0, console.is_terminal, "drawings") as advance:
        for batch in ws.split(BATCH):
            drawn.append(drawing(config.filter, face, superres, batch))
            advance(sum(map(len, drawn)))
    write_pairs(config.output, ws, torch.cat(drawn))


def write_pairs(folder: Path, ws: Tensor, drawings: Iterable[Tensor]) -> None:
    """ws (N, L, D) and what each is to give, N times (3, R, R) in [-1, 1], as two files."""
    from datasets import Features, Image

    rows = [{"image": png(picture)} for picture in drawings]
    table = pa.Table.from_pylist(rows, schema=Features({"image": Image()}).arrow_schema)
    write_latents(folder / LATENTS, {"ws": ws})
    write_atomically(folder / DRAWINGS, partial(pq.write_table, table))
    console.print(f"written: {len(rows)} drawings, {printable(folder / DRAWINGS)}")


def png(picture: Tensor) -> dict[str, Any]:
    """(3, R, R) in [-1, 1] -> a cell of a Hugging Face `image` column."""
    file = io.BytesIO()
    to_pil(picture).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def main(argv: Sequence[str] | None = None) -> int:
    return command(FilterConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
