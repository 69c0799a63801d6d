"""What a step along each direction does: to the label that it is called by, and to the others.

    python benchmarks/editing.py --data faces256/test.parquet --images 48 --output editing.json
    python benchmarks/editing.py … --people crops/ --picture editing.png

Held-out aligned faces are encoded, moved, drawn by the face generator and measured as
`encoder.attributes` measures. Effects are in standard deviations of the label over the unmoved
reconstructions, a step, between -2 and 2 steps; `monotone` is the share of people whose label rises
with each of -2, -1, 0, 1, 2. The directions that are no measures are shown, not measured.

Shape letters: N people, S strengths, K labels, L layers of w+, D dimension of w, R resolution.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Benchmark, benchmark, markdown, show
from torch import Tensor

from encoder.align import Aligner
from encoder.attributes import MEASURES, measure
from encoder.directions import Directions
from encoder.options import Edit
from encoder.pipeline import Translator
from generators.checkpoint import load, resolve
from generators.command import parse_device
from generators.data import PictureStream, first_pictures, open_dataset
from generators.disk import write_atomically
from generators.images import grid, labelled, resize
from generators.superres import SuperResolution

STRENGTHS = (-2, -1, 0, 1, 2)  # steps
BATCH = 24
QUICK = {"images": 2}


@dataclass(frozen=True, kw_only=True)
class Config(Benchmark):
    data: str  # aligned faces that nothing was trained on: a folder or parquet
    images: int = 48
    directions: str = "auto"
    face_generator: str = "face128"
    anime_generator: str = "auto"  # of the sheet
    encoder: str = "auto"
    people: str | None = None  # aligned faces of the sheet; None: the first three of the data
    shown: tuple[str, ...] = ("yaw", "smile", "hair-light", "hair-warm")  # on the sheet
    picture: Path | None = None  # the sheet, .png
    size: int = 72  # side of each of its pictures
    threads: int = 0  # torch's; 0: its own choice
    device: str = "cpu"


def moved(translator: Translator, directions: Directions, ws: Tensor, name: str) -> Tensor:
    """ws (N, L, D) -> pictures (N, S, 3, R, R) in [-1, 1] of the face generator."""
    made = []
    for strength in STRENGTHS:
        offset = directions.offset([Edit(name, strength)]).to(ws)
        parts = [translator.face.synthesis(part) for part in (ws + offset).split(BATCH)]
        made.append(torch.cat(parts).clamp(-1, 1))
    return torch.stack(made, dim=1)


def measured(pictures: Tensor, aligner: Aligner) -> Tensor:
    """(N, S, 3, R, R) -> (N, S, K) of MEASURES."""
    people = len(pictures)
    parts = [measure(part, aligner) for part in pictures.flatten(0, 1).split(BATCH)]
    columns = [torch.cat([part[name] for part in parts]) for name in MEASURES]
    return torch.stack(columns, dim=1).unflatten(0, (people, len(STRENGTHS)))


def effects(values: Tensor, own: int, deviations: Tensor) -> dict[str, Any]:
    """Of values (N, S, K) of one direction, called by label `own`."""
    there = values[values.isfinite().flatten(1).all(dim=1)]  # people who kept a face
    slopes = ((there[:, -1] - there[:, 0]) / (STRENGTHS[-1] - STRENGTHS[0])).mean(dim=0)
    slopes = slopes / deviations  # (K)
    others = {n: x for i, (n, x) in enumerate(zip(MEASURES, slopes.tolist(), strict=True))
              if i != own}  # fmt: skip
    largest = max(others, key=lambda name: abs(others[name]))
    return {
        "effect": round(float(slopes[own]), 3),
        "others": round(sum(map(abs, others.values())) / len(others), 3),
        "largest_other": largest,
        "largest_other_effect": round(others[largest], 3),
        "monotone": round(float((there[:, :, own].diff(dim=1) > 0).all(dim=1).float().mean()), 3),
        "faces_kept": round(len(there) / len(values), 3),
    }


@torch.no_grad()
def sheet(config: Config, translator: Translator, directions: Directions, data: Tensor) -> None:
    """Two rows a person, the reconstruction above its drawing: unmoved, then -2 and 2 steps."""
    ws = translator.encode(data)
    ends = [(name, strength) for name in config.shown for strength in (STRENGTHS[0], STRENGTHS[-1])]
    columns = [ws] + [ws + directions.offset([Edit(*end)]).to(ws) for end in ends]
    rows = []
    for person in torch.stack(columns, dim=1):  # (1 + 2 …, L, D)
        drawing, face = translator.synthesise(person, reconstruction=True)
        assert face is not None
        rows += [translator.enlarge(x, config.size).cpu() for x in (face, drawing)]
    first = resize(data, config.size).cpu()
    white = torch.ones_like(first[0])
    lefts = [x for photo in first for x in (photo, white)]
    cells = [torch.cat([left[None], row]) for left, row in zip(lefts, rows, strict=True)]
    labels = ["photo", "as found", *(f"{name} {strength:+d}" for name, strength in ends)]
    whole = labelled(grid(torch.cat(cells), columns=len(labels)), labels)
    assert config.picture is not None
    write_atomically(config.picture, lambda file: whole.save(file, format="PNG", optimize=True))


@torch.no_grad()
def run(config: Config) -> dict[str, Any]:
    device = parse_device(config.device)
    translator = Translator.load(
        config.face_generator,
        config.anime_generator,
        config.encoder,
        device=device,
        superres=load(resolve("superres64"), SuperResolution),
    )
    directions, aligner = load(resolve(config.directions), Directions), Aligner(device)
    directions.check(translator.face)
    dataset = open_dataset(config.data, translator.crop_size)
    if isinstance(dataset, PictureStream):
        raise ValueError("A stream is not held out; give a folder or parquet files.")
    photos = first_pictures(dataset, config.images).to(device)
    ws = torch.cat([translator.encode(part) for part in photos.split(BATCH)])

    names = [name for name in directions.config.names if name in MEASURES]
    results, deviations = {}, None
    for name in names:
        values = measured(moved(translator, directions, ws, name), aligner)
        if deviations is None:
            base = values[:, STRENGTHS.index(0)]
            deviations = base[base.isfinite().all(dim=1)].std(dim=0)  # (K)
        results[name] = effects(values, list(MEASURES).index(name), deviations)
    rows = [["direction", "own label", "others", "largest other", "monotone", "faces kept"]]
    for name, row in results.items():
        largest = f"{row['largest_other']} {row['largest_other_effect']:+.2f}"
        shares = [f"{100 * row[key]:.0f} %" for key in ("monotone", "faces_kept")]
        rows.append([name, f"{row['effect']:+.2f}", f"{row['others']:.2f}", largest, *shares])
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    show(table, title="effect of a step, in standard deviations of the label")
    if config.picture is not None:
        people = photos[:3]
        if config.people is not None:
            of = open_dataset(config.people, translator.crop_size)
            people = first_pictures(of, 3).to(device)
        sheet(config, translator, directions, people)
    return {"counts": {"people": len(ws)}, "results": results, "markdown": markdown(rows)}


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark("editing", Config, run, QUICK, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
