"""Drawings of photos whose two halves are drawn alike, to train a style on.

    python -m encoder.symmetric pairs/ --data faces/train.parquet
    accelerate launch -m generators.train stylegan2 --init anime64 --freeze-generator-below 16 \\
        --latents pairs/latents.safetensors --pairs pairs/drawings.parquet --paired-weight 1 …

A fine-tuned style may draw one of the two eyes better than the other, always the same one: nothing
in its training asks that the drawing of a mirrored photo be the mirrored drawing. So each photo is
drawn as it is and mirrored, and its drawing gets the better half, and the same half of the mirrored
photo's drawing, mirrored back. A turned head keeps its turn, as both are drawings of that photo.
Writes OUT/drawings.parquet and OUT/latents.safetensors, as `generators.filters` does: each photo,
then the mirrored photo, whose drawing is the mirrored one.

Shape letters: B batch, L layers of w+, D dimension of w, R resolution.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from encoder.pipeline import Translator
from generators.command import command, console
from generators.data import first_pictures, open_dataset
from generators.disk import may_write
from generators.filters import DRAWINGS, LATENTS, write_pairs
from generators.runs import check_numbers, progress

BATCH = 32
Half = Literal["left", "right"]
SEAM = 3 / 16  # of the side, over which one half goes over into the other


@dataclass(frozen=True)
class SymmetricConfig:
    output: Annotated[Path, tyro.conf.Positional]  # folder, made if need be
    data: str  # photos: a folder, parquet, a saved Hugging Face data set
    images: int = 4000  # of them, evenly spread
    encoder: str = "encoder64"  # a bundled name or a file
    face_generator: str = "face64"  # the encoder's: a bundled name or a file
    anime_generator: str = "anime64"  # a fine-tune of it: a bundled name or a file
    swap_resolution: int = 16  # first block of the fine-tune
    half: Half = "right"  # of the picture, that the style draws better
    overwrite: bool = False  # replace files that exist

    def __post_init__(self) -> None:
        check_numbers(self, {"of 1 or more": ("images",)})


def joined_halves(drawings: Tensor, mirrored: Tensor, half: Half) -> Tensor:
    """Drawings (B, 3, R, R) of photos, and of the mirrored photos -> (B, 3, R, R): the named half
    of the first, and of the second, mirrored back, what then is the other half."""
    size = drawings.shape[-1]
    places = (torch.arange(size, device=drawings.device) + 0.5) / size - 0.5
    share = (places / SEAM + 0.5).clamp(0, 1)  # (R), of the right half
    share = share if half == "right" else 1 - share
    return share * drawings + (1 - share) * mirrored.flip(-1)


@torch.inference_mode()
def pairs(translator: Translator, photos: Tensor, half: Half) -> tuple[Tensor, Tensor]:
    """(B, 3, R, R) -> ws (2 B, L, D) and drawings (2 B, 3, R, R) of each photo, and mirrored."""
    look = translator.encoder
    ws = torch.stack([look(photos), look(photos.flip(-1))], dim=1)  # (B, 2, L, D)
    first, second = (translator.synthesis(found).clamp(-1, 1) for found in ws.unbind(1))
    joined = joined_halves(first, second, half)
    return ws.flatten(0, 1), torch.stack([joined, joined.flip(-1)], dim=1).flatten(0, 1)


def run(config: SymmetricConfig) -> None:
    for name in (DRAWINGS, LATENTS):
        may_write(config.output / name, config.overwrite)
    models = config.face_generator, config.anime_generator, config.encoder
    translator = Translator.load(*models, swap_resolution=config.swap_resolution)
    data = open_dataset(config.data, translator.encoder.config.resolution)
    photos = first_pictures(data, config.images)
    made = []
    with progress(len(photos), 0, console.is_terminal, "photos") as advance:
        for batch in photos.split(BATCH):
            made.append(pairs(translator, batch, config.half))
            advance(min(len(made) * BATCH, len(photos)))
    ws, drawings = (torch.cat(parts) for parts in zip(*made, strict=True))
    write_pairs(config.output, ws, drawings)


def main(argv: Sequence[str] | None = None) -> int:
    return command(SymmetricConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
