"""The README's picture: every face of a folder, its reconstruction, and n = 1 … 4 swapped blocks.

python benchmarks/examples_sheet.py examples/ benchmarks/results/examples.png
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from encoder.align import Aligner
from encoder.pipeline import Translator
from generators.checkpoint import load, resolve
from generators.command import command
from generators.disk import may_write, write_atomically
from generators.images import find_images, grid, labelled, open_image, resize
from generators.stylegan2 import Generator
from generators.superres import SuperResolution

SIDE = 128  # of a face in the picture, in pixels


@dataclass(frozen=True)
class Config:
    source: tyro.conf.Positional[Path]  # folder of photos
    target: tyro.conf.Positional[Path]  # .png
    overwrite: bool = False  # replace the target


def run(config: Config) -> None:
    may_write(config.target, config.overwrite)
    aligner, superres = Aligner(), load(resolve("superres64"), SuperResolution)
    resolutions = load(resolve("face64"), Generator).config.block_resolutions[:0:-1]
    translators = [
        Translator.load("face64", "anime64", "encoder64", swap_resolution=r, aligner=aligner,
                        superres=superres) for r in resolutions
    ]  # fmt: skip
    first = translators[0]
    photos = [open_image(file) for file, _ in find_images(config.source)]
    crops = [first.crop(photo, face) for photo in photos for face in first.faces(photo)]
    results = [translator(crops, reconstruction=True) for translator in translators]
    reconstruction = results[0].reconstruction
    assert reconstruction is not None
    made = [reconstruction, *(result.anime for result in results)]
    columns = [resize(results[0].aligned, SIDE), *(first.enlarge(x, SIDE) for x in made)]
    labels = ["input", "reconstruction", *(f"n = {i + 1}" for i in range(len(results)))]
    sheet = grid(torch.stack(columns, dim=1).flatten(0, 1), len(columns))
    picture = labelled(sheet, labels)
    write_atomically(config.target, partial(picture.save, format="PNG"))


def main(argv: Sequence[str] | None = None) -> int:
    return command(Config, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
