"""Labels of pictures: columns of a data set, and what can be measured on an aligned face.

    pictures, labels = labelled_pictures(Path("celeba.csv"), "image_id", ["Smiling"], 5000)
    values = measure(images, aligner)["yaw"]         # of FFHQ crops (B, 3, S, S): (B), NaN: no face

Measured are the five points of MTCNN's last network and the mean colours of places that a crop
always has: crude, but nobody need be asked, and edited pictures can be measured in the same way.

Shape letters: B batch, M pictures, K labels, S side of a crop.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoder.align import Aligner
from encoder.metrics import LUMA
from generators.command import printable
from generators.data import Rows, open_sources
from generators.disk import open_regular
from generators.images import resize

MEASURES = {
    "yaw": "the nose right of the middle, in distances of the eyes",
    "pitch": "the nose below the eyes, as a part of the way to the mouth",
    "smile": "width of the mouth, in distances of the eyes",
    "teeth": "the mouth's middle lighter than the cheeks",
    "hair-light": "lightness where hair is",
    "hair-warm": "red less blue, there",
    "skin-light": "lightness of nose and cheeks",
    "skin-warm": "red less blue, there",
    "background": "lightness of the upper corners",
}
FACE = (0.14, 0.2, 0.86, 0.92)  # left, top, right, bottom of what MTCNN would cut out, of the crop
LOOKED_AT, FOUND = 48, 0.9  # side in pixels; the least score of a face
# rows and columns of a crop, in 64ths:
HAIR, CHEEKS, MOUTH = (4, 14, 20, 44), (36, 44, 22, 42), (45, 50, 27, 37)
CORNERS = ((2, 24, 0, 6), (2, 24, 58, 64))

# ---------------------------------------------------------------------------- measured


@torch.no_grad()
def measure(images: Tensor, aligner: Aligner) -> dict[str, Tensor]:
    """All MEASURES of FFHQ crops (B, 3, S, S) in [-1, 1]: (B) each, on the CPU; NaN where the
    crop shows no face."""
    points, scores = points_of(images, aligner)
    eyes, mouth = points[:, :2].mean(dim=1), points[:, 3:].mean(dim=1)  # (B, 2)
    apart = (points[:, 1] - points[:, 0]).norm(dim=1)  # (B)
    small = resize(images.cpu().float(), 64, "area")
    luma = small.new_tensor(LUMA)

    def colour(*places: tuple[int, int, int, int]) -> Tensor:
        means = [small[:, :, a:b, c:d].mean(dim=(2, 3)) for a, b, c, d in places]
        return torch.stack(means).mean(dim=0)  # (B, 3)

    hair, cheeks = colour(HAIR), colour(CHEEKS)
    values = {
        "yaw": (points[:, 2, 0] - (eyes + mouth)[:, 0] / 2) / apart,
        "pitch": (points[:, 2] - eyes)[:, 1] / (mouth - eyes)[:, 1],
        "smile": (points[:, 4] - points[:, 3]).norm(dim=1) / apart,
        "teeth": (colour(MOUTH) - cheeks) @ luma,
        "hair-light": hair @ luma,
        "hair-warm": hair[:, 0] - hair[:, 2],
        "skin-light": cheeks @ luma,
        "skin-warm": cheeks[:, 0] - cheeks[:, 2],
        "background": colour(*CORNERS) @ luma,
    }
    return {name: torch.where(scores >= FOUND, value, math.nan) for name, value in values.items()}


def median_colour(images: Tensor, place: tuple[int, int, int, int]) -> Tensor:
    """(B, 3, R, R) -> (B, 3, 1, 1), of rows and columns in 64ths."""
    top, bottom, left, right = (round(edge * images.shape[-1] / 64) for edge in place)
    there = images[:, :, top:bottom, left:right].flatten(2)
    # of an expanded tensor, whose stride is 0, torch 2.14 gives what was in memory before
    return there.contiguous().median(dim=2).values[:, :, None, None]


def points_of(images: Tensor, aligner: Aligner) -> tuple[Tensor, Tensor]:
    """Of FFHQ crops (B, 3, S, S) in [-1, 1] the five points (B, 5, 2), in parts of the side, and
    the scores (B): MTCNN's last network alone, as the face's place in a crop is known."""
    side = 4 * LOOKED_AT
    left, top, right, bottom = (round(x * side) for x in FACE)
    face = resize(images.float(), side)[:, :, top:bottom, left:right]
    looks = resize(face, LOOKED_AT, "area") * (127.5 / 128)  # as it was trained
    _, points, scores = aligner.mtcnn.onet(looks.to(aligner.mtcnn.device))
    points = points.cpu().unflatten(1, (2, 5)).transpose(1, 2)  # (B, 5, 2)
    corner, size = points.new_tensor([left, top]), points.new_tensor([right - left, bottom - top])
    return (points * size + corner) / side, scores[:, 1].cpu()


# ----------------------------------------------------------------------------- columns


def labelled_pictures(
    path: Path, column: str, names: Sequence[str], count: int
) -> tuple[list[Path | bytes], Tensor]:
    """`count` pictures, evenly spread over those that have all labels, and these (M, K).

    path: parquet files or a saved data set, or a .csv whose `column` holds paths relative to it;
        without `names` also a folder. ValueError where a column is not there or holds no numbers.
    """
    sources: Sequence[Path | bytes]
    if path.suffix.lower() == ".csv":
        sources, columns = read_csv(path, column, names)
    else:
        sources = open_sources(path, column)
        if names and not isinstance(sources, Rows):
            raise ValueError(
                f"{printable(path)} is a folder of pictures and has no column {printable(names[0])}"
                "; give a parquet file, or a .csv with the pictures' paths and their labels."
            )
        columns = {name: sources.values(name) for name in names if isinstance(sources, Rows)}
    labels = torch.empty(len(sources), len(names), dtype=torch.float64)
    for i, name in enumerate(names):
        labels[:, i] = torch.tensor([number(value, name) for value in columns[name]])
    known = labels.isfinite().all(dim=1).nonzero()[:, 0].tolist()
    if not known:
        raise ValueError(f"No picture of {printable(path)} has a label; check the columns.")
    count = min(count, len(known))
    chosen = [known[i * len(known) // count] for i in range(count)]
    return [sources[i] for i in chosen], labels[chosen]


def read_csv(
    path: Path, column: str, names: Sequence[str]
) -> tuple[list[Path | bytes], dict[str, list[Any]]]:
    """Paths of pictures and columns of a .csv in UTF-8 with a line of names."""
    with open_regular(path) as file:
        text = file.read()
    try:
        rows = list(csv.DictReader(text.decode("utf-8-sig").splitlines(), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{printable(path)} is no .csv in UTF-8 ({printable(error)}).") from error
    there = [str(name) for name in rows[0]] if rows else []
    for name in (column, *names):
        if name not in there:
            raise ValueError(
                f"There is no column {printable(name)} in {printable(path)}; there is "
                f"{printable(', '.join(there) or 'none', 1000)}."
            )
    sources: list[Path | bytes] = [path.parent / (row[column] or "") for row in rows]
    return sources, {name: [row[name] for row in rows] for name in names}


def number(value: Any, name: str) -> float:
    """A cell as a number, NaN where it is empty."""
    if value is None or value == "":
        return math.nan
    value = {"true": 1, "false": 0}.get(str(value).strip().lower(), value)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"The column {printable(name)} holds {printable(value, 40)}; a label is a number, or "
            "true or false."
        ) from None
