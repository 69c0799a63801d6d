"""Photo to anime on two axes: how drawn the pictures are, and how much of the person they keep.

    python benchmarks/translation.py --data faces/test.parquet --anime-data anime/test.parquet \\
        --output benchmarks/results/translation64.json --picture translation.png
    python benchmarks/translation.py --data photos/ --anime-data anime/ \\
        --outputs others/ugatit others/dualstylegan              # other methods, same file names
    python benchmarks/translation.py … --cyclegan runs/c/generator.safetensors --timed 20
    python benchmarks/translation.py … --anime soft=a.safetensors@8 hard=b.safetensors@32
    python benchmarks/translation.py … --detector-cascade animeface.xml --judge judge.safetensors

*Drawn*: the shares in which a cascade for drawn faces finds one, and in which a network that knows
damaged drawings (`drawn.py`) sees two like eyes, and features in one piece. FD, KID, precision and
recall against drawn faces in named feature spaces, too, but they rank smeared faces wrongly.
*Kept*: how the hair's lightness and tint and the skin's lightness follow the photo's over people,
in fixed regions; and whether those who laugh are drawn laughing.
*Correspondence*: all N outputs are ranked by their distance to each input; how often is the input's
own output first (top-1), or among the first five (top-5)? Chance is 1/N and 5/N. The distance is
perceptual, of grey, low-passed, contrast-normalised copies, so that neither palette nor texture
decides: pose, hair outline and light do. Alone, either axis is easy: the photo itself corresponds
perfectly, one drawing for everybody may be a perfect drawing. All pictures are compared at the
generators' resolution. Ends with one JSON line; `--quick` looks at 24 people.

Shape letters: B batch, N M pictures, R resolution, L layers of w+, D dimension of w, F features.
"""

import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    Benchmark,
    benchmark,
    distance_matrix,
    markdown,
    percentiles,
    retrieval,
    show,
    sketch_features,
    stopwatch,
)
from drawn import Judge, colours_kept, detected, laughs_kept, opened
from torch import Tensor

from encoder.align import Aligner
from encoder.attributes import CHEEKS
from encoder.model import Encoder
from encoder.options import belonging
from encoder.pipeline import Translator
from encoder.search import Search, optimise_latent
from generators.checkpoint import load, resolve
from generators.command import console
from generators.cyclegan import CycleGenerator
from generators.data import first_pictures, name_of, named_pictures, open_dataset
from generators.distances import compare, feature_space, pooled_features
from generators.features import FeaturePyramid
from generators.images import (
    find_images,
    fit,
    grid,
    labelled,
    open_image,
    resize,
    to_float,
    to_uint8,
)
from generators.runs import frozen
from generators.stylegan2 import Generator

ROWS = 10  # people in the picture
QUICK: dict[str, Any] = {
    "images": 24,
    "anime_images": 200,
    "refine_steps": (0,),
    "search_steps": (2,),
    "timed": 2,
}


@dataclass(frozen=True)
class Config(Benchmark):
    data: str  # held-out aligned faces: a folder (names are file names) or parquet (row numbers)
    anime_data: str  # drawn faces, anything `open_dataset` reads
    images: int = 200  # people, evenly spread
    anime_images: int = 2000  # drawn faces, evenly spread, at most
    face_generator: str = "face128"
    encoder: str = "auto"
    # bundled name or NAME=PATH; @R: swapped from R only; auto: that of the face generator
    anime: tuple[str, ...] = ("auto",)
    swap_resolutions: tuple[int, ...] = (64, 32, 16, 8)  # of fine-tunes without @R
    refine_steps: tuple[int, ...] = (0,)  # of the latents, after the encoder
    search_steps: tuple[int, ...] = ()  # rows without the encoder: L-BFGS in w+ from the mean face
    timed: int = 0  # people, one at a time: seconds from a crop to its drawing; 0: not measured
    cyclegan: Path | None = None  # its generator of drawings, as a row of its own
    outputs: tuple[Path, ...] = ()  # folders with other methods' pictures of the same people
    spaces: tuple[str, ...] = ("efficientnet",)  # NAME or NAME=WEIGHTS of generators.distances
    detector_cascade: Path | None = None  # OpenCV's .xml for drawn faces: lbpcascade_animeface
    judge: Path | None = None  # what `drawn.py` has written
    batch_size: int = 25
    device: str = "cpu"
    picture: Path | None = None  # people x methods, evenly spread


# ---------------------------------------------------------------------------- pictures


def read_outputs(folder: Path, names: Sequence[str], resolution: int) -> Tensor:
    """(N, 3, R, R) in [-1, 1]: the folder's pictures of these names, in their order."""
    found: dict[str, list[Path]] = {}
    for file, relative in find_images(folder):
        found.setdefault(name_of(relative), []).append(file)
    if missing := [name for name in names if name not in found]:
        others = [name for name in found if name not in set(names)]
        has = f"; it has {some(others)} instead" if others else ""
        raise ValueError(
            f"{folder} has no picture for {len(missing)} of {len(names)} inputs: {some(missing)}"
            f"{has}. An output is named as its input (for parquet: the row number), suffix aside."
        )
    if double := [name for name in names if len(found[name]) > 1]:
        raise ValueError(f"{folder} has several pictures named {some(double)}; leave one of each")
    return to_float(torch.stack([fit(open_image(found[name][0]), resolution) for name in names]))


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@dataclass(frozen=True)
class FineTune:
    name: str
    path: Path
    swap_resolutions: tuple[int, ...]


def fine_tunes(config: Config) -> list[FineTune]:
    """`config.anime` taken apart: [NAME=]PATH[@R]."""
    result = []
    for spec in config.anime:
        match = re.fullmatch(r"(?:([^=]+)=)?(.+?)(?:@(\d+))?", spec)
        if match is None:
            raise ValueError(f"--anime {spec!r} is not NAME=PATH or NAME=PATH@RESOLUTION")
        name, path, resolution = match.groups()
        path = belonging(config.face_generator, "anime") if path == "auto" else path
        swaps = (int(resolution),) if resolution else config.swap_resolutions
        result.append(FineTune(name or Path(path).stem, resolve(path), swaps))
    return result


@dataclass(frozen=True)
class Made:
    """What one method makes of all inputs."""

    method: str
    pictures: Tensor  # (N, 3, R, R)
    seconds: dict[str, float] | None = None  # a picture, alone; None: not measured


@torch.no_grad()
def translations(config: Config, images: Tensor) -> Iterator[Made]:
    """Reconstructions and swaps n = 1, 2, …, of the encoder's latents, and of searched ones."""
    face = load(resolve(config.face_generator), Generator)
    encoder = load(resolve(config.encoder), Encoder)
    tunes, blocks = fine_tunes(config), face.config.block_resolutions
    ways = [(f", +{steps}" if steps else "", steps, False) for steps in config.refine_steps]
    ways += [(f", search {steps}", steps, True) for steps in config.search_steps]
    for suffix, steps, alone in ways:
        ws: tuple[Tensor, ...] = ()
        for tune in tunes:
            anime, name = load(tune.path, Generator), f"{tune.name} " if len(tunes) > 1 else ""
            for resolution in tune.swap_resolutions:
                translator = Translator(face, anime, encoder, swap_resolution=resolution,
                                        device=config.device, refine_steps=steps)  # fmt: skip
                find = partial(search, translator, steps) if alone else translator.encode
                if not ws:  # they do not depend on the fine-tune
                    pieces = images.split(config.batch_size)
                    ws = tuple(find(x.to(translator.device)) for x in pieces)
                    made = [translator.synthesise(w, True)[1] for w in ws]
                    whole = torch.cat([x for x in made if x is not None])
                    yield Made(f"reconstruction{suffix}", whole)
                drawn = torch.cat([translator.synthesise(w)[0] for w in ws])
                number = len([r for r in blocks if r >= resolution])
                seconds = timed(config, images, find, translator.synthesise)
                yield Made(f"{name}n = {number}{suffix}", drawn, seconds)


@torch.no_grad()
def by_cyclegan(config: Config, images: Tensor) -> Iterator[Made]:
    """What the baseline makes of them, if it is asked for."""
    if config.cyclegan is None:
        return
    network: CycleGenerator = frozen(load(config.cyclegan, CycleGenerator)).to(config.device)
    faces = resize(images, network.resolution).to(config.device)
    drawn = torch.cat([network(x) for x in faces.split(config.batch_size)])
    yield Made("CycleGAN", drawn, timed(config, faces, network))


def search(translator: Translator, steps: int, images: Tensor) -> Tensor:
    """Images (B, 3, S, S) -> ws (B, L, D) of the face generator, by optimisation alone."""
    return optimise_latent(
        translator.face,
        resize(images, translator.resolution),
        losses=translator.losses,
        search=Search(steps=steps),
    ).latent


def timed(config: Config, images: Tensor, *steps: Callable[[Any], Any]) -> dict[str, float] | None:
    """From one crop to its drawing by `steps`, of `config.timed` people, after a warm-up."""
    if not config.timed:
        return None
    device = torch.device(config.device)
    people = itertools.cycle(images.to(device).split(1))

    def draw() -> None:
        x = next(people)
        for step in steps:
            x = step(x)

    return percentiles(stopwatch(draw, config.timed, device))


# ------------------------------------------------------------------------------ report


def evaluate(config: Config) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Figures by method, and the pictures by method, the photos first, (N, 3, R, R) each."""
    face = load(resolve(config.face_generator), Generator)
    size = max(face.resolution, load(resolve(config.encoder), Encoder).config.resolution)
    names, inputs = named_pictures(config.data, config.images, size)
    if len(names) < 4:
        raise ValueError(f"{len(names)} faces are too few to compare; give 4 or more")
    others = [
        Made(folder.resolve().name, read_outputs(folder, names, face.resolution))
        for folder in config.outputs
    ]
    drawn = open_dataset(config.anime_data, face.resolution)
    anime = first_pictures(drawn, config.anime_images)
    pictures: dict[str, Tensor] = {}
    results: dict[str, Any] = {}
    ours = [*by_cyclegan(config, inputs), *translations(config, inputs)]
    for made in [Made("photo", inputs), *others, *ours]:
        if made.method in pictures:
            raise ValueError(f"two methods are called {made.method!r}; give them different names")
        # rounded to 8 bits as written pictures are
        pictures[made.method] = to_float(to_uint8(resize(made.pictures, face.resolution))).cpu()
        results[made.method] = made.seconds or {}

    pyramid = frozen(FeaturePyramid(weights="wheel")).to(config.device)
    spaces = [feature_space(spec).to(config.device) for spec in config.spaces]
    real = [pooled_features(space, anime, device=config.device) for space in spaces]
    photos = pictures["photo"]
    sought = sketch_features(pyramid, photos.to(config.device))
    judge = load(config.judge, Judge).to(config.device) if config.judge else None

    def drawn_faces(made: Tensor) -> dict[str, float]:
        shares: dict[str, float] = {}
        if config.detector_cascade is not None:
            shares["detected"] = detected(made, config.detector_cascade)
        if judge is not None:
            eyes, features = judge.passes(made).double().mean(dim=0).tolist()
            shares |= {"like_eyes": eyes, "whole_features": features}
        return shares

    mouths = opened(photos, Aligner())
    for method, shown in pictures.items():
        offered = sketch_features(pyramid, shown.to(config.device))
        results[method] |= {
            "correspondence": retrieval(distance_matrix(sought, offered)),
            "drawn": drawn_faces(shown),
            "hair": colours_kept(photos, shown),
            "skin": colours_kept(photos, shown, CHEEKS),
            "laughs": laughs_kept(mouths, shown),
            "anime": {
                space.name: compare(features, pooled_features(space, shown, device=config.device))
                for space, features in zip(spaces, real, strict=True)
            },
        }
        console.print(f"{method} done")
    counts = {"people": len(names), "anime": len(anime), "resolution": face.resolution}
    return {"counts": counts, "drawings": drawn_faces(anime), "results": results}, pictures


def rows_of_judges(report: dict[str, Any]) -> list[list[str]]:
    """What models are chosen by: a header, the drawings themselves, chance, then one row a method.
    KID, in the last of the spaces, is only reported."""
    shares, count = list(report["drawings"]), report["counts"]["people"]  # none without judges
    hair = ["lightness", "lightness_slope", "tint"]
    names = [name.replace("_", " ") for name in (*shares, *(f"hair: {key}" for key in hair))]
    names += ["skin: lightness", "skin: lightness slope", "laughs"]
    own = [f"{share:.2f}" for share in report["drawings"].values()]
    rest = 8 * "–"
    rows = [
        ["method", "top-1, %", "top-5, %", *names, "KID", "ms a picture"],
        ["drawings", "–", "–", *own, *rest],
        ["chance", f"{100 / count:.1f}", f"{min(500 / count, 100):.1f}", *(len(own) * "–"), *rest],
    ]
    for method, row in report["results"].items():
        found = [f"{100 * row['correspondence'][key]:.1f}" for key in ("top1", "top5")]
        judged = [row["drawn"][key] for key in shares] + [row["hair"][key] for key in hair]
        judged += [row["skin"][key] for key in hair[:2]] + [row["laughs"]]
        kid = list(row["anime"].values())[-1]["kid"]
        took = f"{row['p50_ms']:.3g}" if "p50_ms" in row else "–"
        rows.append([method, *found, *(f"{x:.2f}" for x in judged), f"{kid:.3g}", took])
    return rows


def rows_of(report: dict[str, Any], space: str) -> list[list[str]]:
    """The table of one feature space: a header, a row of chance, then one row a method."""
    count = report["counts"]["people"]
    rows = [
        ["method", "top-1, %", "top-5, %", "KID", "FD", "precision", "recall"],
        ["chance", f"{100 / count:.1f}", f"{min(500 / count, 100):.1f}", *4 * "–"],
    ]
    for method, row in report["results"].items():
        found = [f"{100 * row['correspondence'][key]:.1f}" for key in ("top1", "top5")]
        x = row["anime"][space]
        shares = [f"{x[key]:.2f}" for key in ("precision", "recall")]
        rows.append([method, *found, f"{x['kid']:.3g}", f"{x['fd']:.4g}", *shares])
    return rows


def sheet(pictures: dict[str, Tensor], path: Path, size: int = 96) -> None:
    """Evenly spread people, one a row; the methods are the columns, the photo first."""
    count = len(pictures["photo"])
    chosen = [i * count // ROWS for i in range(ROWS)] if count > ROWS else list(range(count))
    columns = torch.stack([made[chosen].cpu() for made in pictures.values()], dim=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = grid(resize(columns.flatten(0, 1), size), columns=len(pictures))
    labelled(whole, list(pictures)).save(path)


def run(config: Config) -> dict[str, Any]:
    report, pictures = evaluate(config)
    lines = {}
    tables = {space: rows_of(report, space) for space in report["results"]["photo"]["anime"]}
    for space, rows in ({"judges": rows_of_judges(report)} | tables).items():
        show([dict(zip(rows[0], row, strict=True)) for row in rows[1:]], title=space)
        lines[space] = markdown(rows)
    if config.picture is not None:
        sheet(pictures, config.picture)
    return report | {"markdown": lines}


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark("translation", Config, run, QUICK, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
