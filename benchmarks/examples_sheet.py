"""The README's pictures: every face of a folder, its reconstruction, and its drawing in each style;
or n = 1 … 4 swapped blocks; or drawings alone, of a data set's aligned faces that may not be shown.

python benchmarks/examples_sheet.py examples/ benchmarks/results/examples.png --across 2 --size 160
python benchmarks/examples_sheet.py examples/ benchmarks/results/styles.jpg \\
    --styles anime,sketch,paint --size 160
python benchmarks/examples_sheet.py examples/ blocks.png --blocks
python benchmarks/examples_sheet.py ffhq/test.parquet benchmarks/results/drawings.jpg \\
    --alone 64 --across 16 --size 96
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
from generators.data import first_pictures, open_dataset
from generators.disk import may_write, write_atomically
from generators.images import find_images, grid, labelled, open_image, resize


@dataclass(frozen=True)
class Config:
    source: tyro.conf.Positional[Path]  # folder of photos; with --alone a data set of faces
    target: tyro.conf.Positional[Path]  # .png, or .jpg for many faces
    styles: str = "anime"  # as of infer.py
    blocks: bool = False  # in place of styles, the drawing with n = 1 … 4 blocks swapped
    alone: int = 0  # drawings without their faces, so many, evenly spread over the data set
    size: int = 128  # of a face in the picture, in pixels
    across: int = 1  # faces side by side
    overwrite: bool = False  # replace the target


def run(config: Config) -> None:
    may_write(config.target, config.overwrite)
    translator = Translator.bundled(styles=config.styles, backend="torch")
    if config.alone:
        shown = first_pictures(open_dataset(str(config.source), translator.crop_size), config.alone)
    else:
        photos = [open_image(file) for file, _ in find_images(config.source)]
        shown = translator.prepare([
            translator.crop(photo, face) for photo in photos for face in translator.faces(photo)
        ])  # fmt: skip
    ws = translator.encode(shown)
    made = translator.drawings(ws, reconstruction=True)
    reconstruction = {RECONSTRUCTION: made.pop(RECONSTRUCTION)}
    if config.blocks:
        for_n = enumerate(translator.synthesis.resolutions[:0:-1], 1)
        made = {f"n = {n}": translator.synthesise(ws, swap_resolution=r)[0] for n, r in for_n}
    if not config.alone:
        made = reconstruction | made
    made = {name: translator.enlarge(pictures, config.size) for name, pictures in made.items()}
    if not config.alone:
        made = {"input": resize(shown, config.size).clamp(-1, 1)} | made
    sheet = grid(torch.stack([*made.values()], dim=1).flatten(0, 1), len(made) * config.across)
    picture = sheet if config.alone else labelled(sheet, [*made] * config.across)
    kind = "JPEG" if config.target.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    write_atomically(config.target, partial(picture.save, format=kind, quality=85))


def main(argv: Sequence[str] | None = None) -> int:
    return command(Config, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
