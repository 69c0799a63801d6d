"""The README's picture: every face of a folder, its reconstruction, and n = 1 … 4 swapped blocks.

python benchmarks/examples_sheet.py examples/ benchmarks/results/examples.png
"""

from pathlib import Path

import torch
import tyro

from encoder.align import Aligner
from encoder.pipeline import Translator
from generators.blocks import labelled
from generators.checkpoint import load, resolve
from generators.images import find_images, grid, open_image, resize

SIDE = 128  # of a face in the picture, in pixels


def main(source: Path, target: Path) -> None:
    aligner, superres = Aligner(), load(resolve("superres64"), "superres")
    resolutions = load(resolve("face64"), "generator").config.block_resolutions[:0:-1]
    translators = [
        Translator.load("face64", "anime64", "encoder64", swap_resolution=r, aligner=aligner,
                        superres=superres) for r in resolutions
    ]  # fmt: skip
    first = translators[0]
    photos = [open_image(file) for file, _ in find_images(source)]
    crops = [first.crop(photo, face) for photo in photos for face in first.faces(photo)]
    results = [translator(crops, reconstruction=True) for translator in translators]
    reconstruction = results[0].reconstruction
    assert reconstruction is not None
    made = [reconstruction, *(result.anime for result in results)]
    columns = [resize(results[0].aligned, SIDE), *(first.enlarge(x, SIDE) for x in made)]
    labels = ["input", "reconstruction", *(f"n = {i + 1}" for i in range(len(results)))]
    sheet = grid(torch.stack(columns, dim=1).flatten(0, 1), len(columns))
    labelled(sheet, labels).save(target)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
