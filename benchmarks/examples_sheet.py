"""The README's pictures: every face of a folder, its reconstruction, and its drawing in each style;
or n = 1 … 4 swapped blocks.

python benchmarks/examples_sheet.py examples/ benchmarks/results/examples.png --across 2 --size 160
python benchmarks/examples_sheet.py examples/ benchmarks/results/styles.jpg \\
    --styles anime,sketch,paint --size 160
python benchmarks/examples_sheet.py examples/ blocks.png --blocks
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from encoder.pipeline import Translator
from generators.blocks import RECONSTRUCTION
from generators.command import command
from generators.disk import may_write, write_atomically
from generators.images import find_images, grid, labelled, open_image, resize


@dataclass(frozen=True)
class Config:
    source: tyro.conf.Positional[Path]  # folder of photos
    target: tyro.conf.Positional[Path]  # .png, or .jpg for many faces
    styles: str = "anime"  # as of infer.py
    blocks: bool = False  # in place of styles, the drawing with n = 1 … 4 blocks swapped
    size: int = 128  # of a face in the picture, in pixels
    across: int = 1  # faces side by side
    overwrite: bool = False  # replace the target


def run(config: Config) -> None:
    may_write(config.target, config.overwrite)
    translator = Translator.bundled(styles=config.styles, backend="torch")
    photos = [open_image(file) for file, _ in find_images(config.source)]
    crops = [translator.crop(photo, face) for photo in photos for face in translator.faces(photo)]
    result = translator(crops, reconstruction=True)
    made = {"input": result.aligned, RECONSTRUCTION: result.reconstruction}
    if not config.blocks:
        made |= result.drawings
    else:
        for n, r in enumerate(translator.synthesis.resolutions[:0:-1], 1):
            made[f"n = {n}"] = translator.synthesise(result.ws, swap_resolution=r)[0]
    columns = [resize(made.pop("input"), config.size).clamp(-1, 1)]
    columns += [translator.enlarge(pictures, config.size) for pictures in made.values()]
    sheet = grid(torch.stack(columns, dim=1).flatten(0, 1), len(columns) * config.across)
    picture = labelled(sheet, ["input", *made] * config.across)
    kind = "JPEG" if config.target.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    write_atomically(config.target, partial(picture.save, format=kind, quality=85))


def main(argv: Sequence[str] | None = None) -> int:
    return command(Config, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
