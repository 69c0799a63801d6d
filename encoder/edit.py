"""Editing of faces: find directions of w+, move along them, mix the styles of people.

    python -m encoder.edit directions --output pcs.safetensors         # of the generator alone
    python -m encoder.edit directions --output mine.safetensors --data celeba.csv \\
        --column image_id --labels Smiling Eyeglasses --align
    python -m encoder.edit apply --input me.jpg --output out/ --edit smile=1.5 --edit yaw=-2
    python -m encoder.edit mix --input me.jpg you.jpg --output mixed.png --split 4

What is found goes into a .safetensors file and onto a sheet: a direction a row, -3 to 3 steps.
`apply` is infer.py, whose --edit does the same, with the reconstruction.

Shape letters: B batch, N directions or people, M samples, L layers of w+, D dimension of w,
R resolution.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from PIL import Image
from torch import Tensor

from encoder.align import Aligner
from encoder.attributes import MEASURES, labelled_pictures, measure
from encoder.directions import (
    GROUPS,
    Directions,
    agreement,
    labelled,
    mapped,
    principal_axes_of,
    sefa,
    spread,
)
from encoder.engines import engine_of
from encoder.files import find_faces
from encoder.infer import run as translate
from encoder.options import Drawing, InferConfig, check_size
from encoder.pipeline import Translator
from generators import checkpoint
from generators.command import command, console, parse_device, printable
from generators.disk import may_write, write_atomically
from generators.images import grid, open_image, resize
from generators.images import labelled as with_labels
from generators.latents import mix
from generators.runs import check_numbers, frozen, progress
from generators.stylegan2 import Generator

STRENGTHS = (-3, -2, -1, 0, 1, 2, 3)  # steps, of a sheet
BATCH = 50  # pictures that are looked at at once


@dataclass(frozen=True, kw_only=True)
class DirectionsConfig(Drawing):
    """Find directions, with or without labels, in random w or in a data set's."""

    output: Path  # .safetensors
    sheet: Path | None = None  # .png, a direction a row; None: beside the output
    data: str | None = None  # folder, parquet, saved data set or .csv; None: w of random z
    column: str = "image"  # of the data, that has the pictures; in a .csv their paths
    labels: tuple[str, ...] = ()  # columns of numbers, or of true and false
    measure: tuple[str, ...] = ()  # labels measured on the pictures; see MEASURES
    images: int = 5000  # of the data, at most
    align: bool = False  # on: the pictures are no aligned crops yet
    components: int = 8  # principal axes pc1, pc2, …; 0: none
    sefa: int = 2  # directions of each of coarse, middle and fine layers; 0: none
    photo: Path | None = None  # whose face the sheet shows; None: the average one
    anime: bool = False  # the sheet shows drawings too
    overwrite: bool = False  # replace files that exist

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, {"of 1 or more": ("images",), "of 0 or more": ("components", "sefa")})
        if unknown := sorted(set(self.measure) - MEASURES.keys()):
            raise ValueError(
                f"--measure does not know {printable(unknown[0])}; choose from "
                f"{', '.join(MEASURES)}"
            )
        if self.data is None and (self.labels or self.measure):
            raise ValueError("labels need pictures; give --data")
        if not (self.labels or self.measure or self.components or self.sefa):
            raise ValueError("nothing is to be found; give --components, --sefa or labels")


@dataclass(frozen=True, kw_only=True)
class ApplyConfig(InferConfig):
    """Draw edited faces; see infer.py --help."""

    save: str = "anime,reconstruction"  # comma list, as infer.py's

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.edit:
            raise ValueError("nothing is to be edited; give --edit NAME=STEPS")


@dataclass(frozen=True, kw_only=True)
class MixConfig(Drawing):
    """A sheet of people crossed: coarse layers by row, fine ones by column."""

    input: tuple[Path, ...]  # pictures, two or more
    output: Path  # .png
    overwrite: bool = False  # replace a sheet that exists
    split: int = 4  # first layer of w+ that is the column's; two are a block's: 4 is 16²
    anime: bool = False  # drawn
    size: int = 96  # side of each picture of the sheet, in pixels

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.size)
        if len(self.input) < 2:
            raise ValueError("give two pictures or more to mix")


# --------------------------------------------------------------------------- networks


def load_translator(config: Drawing, align: bool) -> Translator:
    device = parse_device(config.device)
    engine = engine_of(config, device, batch_size=BATCH)
    return Translator.load(
        config.face_generator,
        config.anime_generator,
        config.encoder,
        device=device,
        aligner=Aligner(device) if align else None,
        **engine,
    )


def crop_of(translator: Translator, source: Path | bytes, align: bool) -> Image.Image:
    """Of the largest face; without `align` the picture's central square."""
    picture = open_image(source)
    if not align or translator.aligner is None:
        return translator.crop(picture)
    name = Path("a picture of the data") if isinstance(source, bytes) else source
    return translator.crop(picture, find_faces(translator.aligner, picture, name)[0])


# ------------------------------------------------------------------------- directions


def looked_at(config: DirectionsConfig, translator: Translator) -> tuple[Tensor, Tensor]:
    """The w+ (M, L, D) of the data's pictures and their labels (M, K): columns, then measures."""
    assert config.data is not None
    path = Path(config.data).expanduser()
    sources, columns = labelled_pictures(path, config.column, config.labels, config.images)
    ws, labels, reasons = [], [], []
    with progress(len(sources), 0, console.is_terminal, "pictures") as advance:
        for first in range(0, len(sources), BATCH):
            crops, kept = [], []
            for i in range(first, min(first + BATCH, len(sources))):
                try:
                    crops.append(crop_of(translator, sources[i], config.align))
                    kept.append(i)
                except ValueError as error:
                    reasons.append(str(error))
            if not kept:
                continue
            images = translator.prepare(crops)
            row = columns[kept]
            if config.measure and translator.aligner is not None:
                values = measure(images, translator.aligner)
                measured = torch.stack([values[name] for name in config.measure], dim=1)
                row = torch.cat([row, measured], dim=1)
            there = row.isfinite().all(dim=1)  # measures need a face
            ws.append(translator.encode(images).cpu()[there])
            labels.append(row[there])
            advance(first + len(kept))
    if reasons:
        console.print(f"Skipped {len(reasons)} pictures: {printable(reasons[0], 500)}")
    if sum(map(len, ws)) < 2:
        raise ValueError(f"Too few faces are in {printable(path)}; give more pictures.")
    return torch.cat(ws), torch.cat(labels)


def found(config: DirectionsConfig, face: Generator, translator: Translator | None) -> Directions:
    """All directions that are asked for, by name; says how well labels can be told."""
    names = [*config.labels, *config.measure]
    labels = torch.empty(0, 0)
    if config.data is None or translator is None:
        samples = mapped(face).cpu()
    else:
        samples, labels = looked_at(config, translator)
    steps: dict[str, Tensor] = {}

    def add(found_names: list[str], axes: Tensor) -> None:
        if twice := steps.keys() & set(found_names):
            raise ValueError(f"two directions would be called {twice.pop()}; rename the column")
        steps.update(zip(found_names, spread(axes, samples), strict=True))

    if names:
        axes = labelled(samples, labels, names)
        add(names, axes)
        told = agreement(samples, axes, labels)
        said = ", ".join(f"{name} {r:.2f}" for name, r in zip(names, told, strict=True))
        console.print(f"{len(samples)} faces; correlation of label and direction: {said}")
    if config.components:
        axes = principal_axes_of(samples, config.components, face.layers)
        add([f"pc{i + 1}" for i in range(config.components)], axes)
    for group, layers in GROUPS.items() if config.sefa else ():
        if layers.start < face.layers:
            axes = sefa(face, layers, config.sefa).cpu()
            add([f"{group}{i + 1}" for i in range(config.sefa)], axes)
    return Directions.of(face, steps)


@torch.no_grad()
def sheet_of(
    directions: Directions, face: Generator, ws: Tensor, translator: Translator | None
) -> Image.Image:
    """ws (1, L, D) moved along each direction, a row each; with a translator drawn, too."""
    made = []
    for step in directions.steps.to(ws):
        moved = torch.cat([ws + strength * step for strength in STRENGTHS])
        row = face.synthesis(moved)
        if translator is not None:
            row = torch.cat([row, translator.synthesise(moved)[0]])
        made.append(row.clamp(-1, 1).cpu())
    columns = [f"{strength:+d}" if strength else "0" for strength in STRENGTHS]
    pictures = grid(torch.cat(made), columns=len(made[0]))
    times = len(made[0]) // len(columns)
    return with_labels(pictures, columns * times, directions.config.names)


def run_directions(config: DirectionsConfig) -> int:
    # 1. What is written, and by what networks.
    sheet = config.sheet or config.output.with_suffix(".png")
    sources = [config.photo] if config.photo else []
    for file in (config.output, sheet):
        may_write(file, config.overwrite, sources)
    path = checkpoint.resolve(config.face_generator)
    translator = None
    if config.data is not None or config.photo or config.anime:
        align = config.align or bool(config.measure) or config.photo is not None
        translator = load_translator(config, align)
        face = translator.face
    else:
        face = frozen(checkpoint.load(path, Generator)).to(parse_device(config.device))

    # 2. The directions.
    directions = found(config, face, translator)
    ours = {"found_in": path.stem, "faces": Path(config.data or "random w").name}
    provenance = checkpoint.read_metadata(path)["provenance"] | ours
    checkpoint.save(config.output, directions, provenance=provenance, half=True)

    # 3. What they look like.
    ws = face.ws_avg[None]
    if config.photo is not None and translator is not None:
        ws = translator.encode(translator.prepare([crop_of(translator, config.photo, True)]))
    shown = sheet_of(directions, face, ws, translator if config.anime else None)
    write_atomically(sheet, lambda target: shown.save(target, format="PNG"))
    size = config.output.stat().st_size / 1e3
    console.print(f"written: {printable(config.output)}, {size:.0f} kB, and {printable(sheet)}")
    return 0


# ---------------------------------------------------------------------------- mixing


def crossed(ws: Tensor, split: int, layers: int | None = None) -> Tensor:
    """ws (N, L, D) of people -> (N, N, L, D): layers below `split` of the row's, the others of the
    column's. `layers`: of the L rows, None: all. ValueError for a split that is no layer."""
    people, layers = len(ws), layers or ws.shape[1]
    if not 0 <= split <= layers:
        raise ValueError(f"a split is a layer from 0 to {layers}, not {split}")
    rows, columns = ws.repeat_interleave(people, dim=0), ws.repeat(people, 1, 1)
    return mix(rows, columns, split, layers).unflatten(0, (people, people))


def run_mix(config: MixConfig) -> int:
    may_write(config.output, config.overwrite, config.input)
    translator = load_translator(config, config.align)
    images = translator.prepare([crop_of(translator, p, config.align) for p in config.input])
    ws = crossed(translator.encode(images), config.split, translator.face.layers).flatten(0, 1)
    made = []
    for part in ws.split(BATCH):
        drawing, face = translator.synthesise(part, reconstruction=not config.anime)
        made.append(drawing if face is None else face)
    people = len(config.input)
    photos = resize(images, config.size).cpu()
    cells = resize(torch.cat(made), config.size).cpu().unflatten(0, (people, people))
    corner = torch.ones_like(photos[:1])
    rows = [torch.cat([corner, photos])]
    rows += [torch.cat([photo[None], row]) for photo, row in zip(photos, cells, strict=True)]
    labels = [f"coarse | fine from {config.split}", *(p.stem for p in config.input)]
    sheet = with_labels(grid(torch.cat(rows), columns=people + 1), labels)
    write_atomically(config.output, lambda target: sheet.save(target, format="PNG"))
    console.print(f"written: {printable(config.output)}")
    return 0


Config = (
    Annotated[DirectionsConfig, tyro.conf.subcommand("directions")]
    | Annotated[ApplyConfig, tyro.conf.subcommand("apply")]
    | Annotated[MixConfig, tyro.conf.subcommand("mix")]
)


def run(config: Any) -> int:
    if isinstance(config, ApplyConfig):
        return translate(config)
    return run_mix(config) if isinstance(config, MixConfig) else run_directions(config)


def main(argv: Sequence[str] | None = None) -> int:
    return command(Config, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
