"""Photo to anime on two axes: how anime the pictures are, and how much of the person they keep.

    python benchmarks/translation.py --data faces/test.parquet --anime-data anime/test.parquet \\
        --output benchmarks/results/translation64.json --picture translation.png
    python benchmarks/translation.py --data photos/ --anime-data anime/ \\
        --outputs others/cyclegan others/ugatit                  # other methods, same file names
    python benchmarks/translation.py … --anime soft=a.safetensors@8 hard=b.safetensors@32

*Anime*: FD, KID, precision and recall of the outputs against drawn faces, in named feature spaces.
*Correspondence*: all N outputs are ranked by their distance to each input; how often is the input's
own output first (top-1), or among the first five (top-5)? Chance is 1/N and 5/N. The distance is
perceptual, of grey, low-passed, contrast-normalised copies, so that neither palette nor texture
decides: pose, hair outline and light do. Alone, either axis is easy: the photo itself corresponds
perfectly, one drawing for everybody may be a perfect drawing. All pictures are compared at the
generators' resolution. Ends with one JSON line; `--quick` looks at 24 people.

Shape letters: B batch, N M pictures, R resolution, L layers of w+, D dimension of w, F features.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from report import about, finish
from rich.console import Console
from rich.table import Table
from torch import Tensor

from encoder.pipeline import Translator
from encoder.pixels import LUMA
from generators.blocks import labelled
from generators.checkpoint import load, resolve
from generators.data import PictureStream, first_pictures, open_dataset
from generators.distances import compare, feature_space, pooled_features
from generators.features import FeaturePyramid, unit_channels
from generators.images import find_images, fit, grid, open_image, resize, to_float, to_uint8
from generators.runs import frozen

console = Console()
ROWS = 10  # people in the picture
QUICK: dict[str, Any] = {"images": 24, "anime_images": 200, "refine_steps": (0,)}


@dataclass(frozen=True)
class Config:
    data: str  # held-out aligned faces: a folder (names are file names) or parquet (row numbers)
    anime_data: str  # drawn faces, anything `open_dataset` reads
    images: int = 200  # people, evenly spread
    anime_images: int = 2000  # drawn faces, evenly spread, at most
    face_generator: str = "face64"
    encoder: str = "encoder64"
    anime: tuple[str, ...] = ("anime64",)  # bundled name or NAME=PATH; @R: swapped from R only
    swap_resolutions: tuple[int, ...] = (64, 32, 16, 8)  # of fine-tunes without @R
    refine_steps: tuple[int, ...] = (0,)  # of the latents, after the encoder
    outputs: tuple[Path, ...] = ()  # folders with other methods' pictures of the same people
    spaces: tuple[str, ...] = ("efficientnet",)  # NAME or NAME=WEIGHTS of generators.distances
    batch_size: int = 25
    device: str = "cpu"
    output: Path | None = None  # JSON with the figures
    picture: Path | None = None  # people x methods, evenly spread
    quick: bool = False


# ---------------------------------------------------------------------------- pictures


def read_inputs(source: str, count: int, resolution: int) -> tuple[list[str], Tensor]:
    """`count` names and pictures (N, 3, R, R) in [-1, 1], evenly spread over the source.

    A folder's names are paths without suffix; others are row numbers among the readable rows.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and not any(folder.rglob("*.parquet")):
        files = find_images(folder)
        count = min(count, len(files))
        files = [files[i * len(files) // count] for i in range(count)]
        pixels = torch.stack([fit(open_image(file), resolution) for file, _ in files])
        return [name_of(relative) for _, relative in files], to_float(pixels)
    dataset = open_dataset(source, resolution)
    if isinstance(dataset, PictureStream):
        raise ValueError("a stream has no evenly spread pictures; give a folder or parquet files")
    size, count = len(dataset), min(count, len(dataset))
    return [str(i * size // count) for i in range(count)], first_pictures(dataset, count)


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


def name_of(path: Path) -> str:
    return path.with_suffix("").as_posix()


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
        swaps = (int(resolution),) if resolution else config.swap_resolutions
        result.append(FineTune(name or Path(path).stem, resolve(path), swaps))
    return result


@torch.no_grad()
def translations(config: Config, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(method, its pictures of all inputs (N, 3, R, R)): reconstructions and swaps n = 1, 2, …"""
    face = load(resolve(config.face_generator), "generator")
    encoder = load(resolve(config.encoder), "encoder")
    tunes, blocks = fine_tunes(config), face.config.block_resolutions
    for steps in config.refine_steps:
        refined = f", +{steps}" if steps else ""
        ws: tuple[Tensor, ...] = ()
        for tune in tunes:
            anime, name = load(tune.path, "generator"), f"{tune.name} " if len(tunes) > 1 else ""
            for resolution in tune.swap_resolutions:
                translator = Translator(face, anime, encoder, swap_resolution=resolution,
                                        device=config.device, refine_steps=steps)  # fmt: skip
                if not ws:  # they do not depend on the fine-tune
                    pieces = images.split(config.batch_size)
                    ws = tuple(translator.encode(x.to(translator.device)) for x in pieces)
                    made = [translator.synthesise(w, True)[1] for w in ws]
                    yield f"reconstruction{refined}", torch.cat([x for x in made if x is not None])
                drawn = torch.cat([translator.synthesise(w)[0] for w in ws])
                number = len([r for r in blocks if r >= resolution])
                yield f"{name}n = {number}{refined}", drawn


# ---------------------------------------------------------------------- correspondence


def sketch(images: Tensor, low: int = 16, side: int = 64) -> Tensor:
    """(B, 3, R, R) -> (B, 3, side, side): grey, without details finer than `low` pixels across,
    of mean 0 and standard deviation 1/2; flat pictures stay flat."""
    luma = torch.einsum("bchw,c->bhw", images, images.new_tensor(LUMA))[:, None]  # (B, 1, R, R)
    smooth = resize(resize(luma, low, "area"), side)
    smooth = smooth - smooth.mean(dim=(2, 3), keepdim=True)
    scale = smooth.square().mean(dim=(2, 3), keepdim=True).sqrt().clamp(min=1e-3)
    return (0.5 * smooth / scale).expand(-1, 3, -1, -1)


@torch.no_grad()
def sketch_features(pyramid: FeaturePyramid, images: Tensor, batch_size: int = 50) -> Tensor:
    """(N, F): the inner product of two rows decides their `perceptual_distance`, see there."""
    rows = []
    for batch in images.split(batch_size):
        levels = [unit_channels(x) / x[0, 0].numel() ** 0.5 for x in pyramid(sketch(batch))]
        rows.append(torch.cat([level.flatten(1) for level in levels], dim=1))
    return torch.cat(rows)


def distance_matrix(a: Tensor, b: Tensor, rows: int = 512) -> Tensor:
    """Sketch features (N, F), (M, F) -> (N, M) on the CPU: each pair's `perceptual_distance`.

    |x - y|² = |x|² + |y|² - 2 xy: a matrix product, where a loop over pairs would take N M passes.
    """
    b_squares = b.square().sum(dim=1)
    blocks = [x.square().sum(dim=1)[:, None] + b_squares - 2 * x @ b.T for x in a.split(rows)]
    return torch.cat(blocks).clamp(min=0).cpu()


def retrieval(distances: Tensor, tops: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """(N, N), row i the distances of input i to all outputs -> {"top1", "top5"} in [0, 1].

    Outputs at equal distance (to rounding) are in random order, of which this is the expectation:
    one output for all inputs scores 1/N.
    """
    own = distances.diagonal()[:, None]
    margin = 1e-5
    nearer = (distances < own - margin).sum(dim=1)
    equal = ((distances - own).abs() <= margin).sum(dim=1)  # itself included
    return {f"top{k}": float(((k - nearer) / equal).clamp(0, 1).double().mean()) for k in tops}


# ------------------------------------------------------------------------------ report


def evaluate(config: Config) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Figures by method, and the pictures by method, the photos first, (N, 3, R, R) each."""
    face = load(resolve(config.face_generator), "generator")
    size = max(face.resolution, load(resolve(config.encoder), "encoder").config.resolution)
    names, inputs = read_inputs(config.data, config.images, size)
    if len(names) < 4:
        raise ValueError(f"{len(names)} faces are too few to compare; give 4 or more")
    others = [(f.resolve().name, read_outputs(f, names, face.resolution)) for f in config.outputs]
    drawn = open_dataset(config.anime_data, face.resolution)
    anime = first_pictures(drawn, config.anime_images)
    pictures: dict[str, Tensor] = {}
    for method, made in [("photo", inputs), *others, *translations(config, inputs)]:
        if method in pictures:
            raise ValueError(f"two methods are called {method!r}; give them different names")
        # rounded to 8 bits as written pictures are
        pictures[method] = to_float(to_uint8(resize(made, face.resolution))).cpu()

    pyramid = frozen(FeaturePyramid(weights="wheel")).to(config.device)
    spaces = [feature_space(spec).to(config.device) for spec in config.spaces]
    real = [pooled_features(space, anime, device=config.device) for space in spaces]
    sought = sketch_features(pyramid, pictures["photo"].to(config.device))
    results = {}
    for method, made in pictures.items():
        offered = sketch_features(pyramid, made.to(config.device))
        results[method] = {
            "correspondence": retrieval(distance_matrix(sought, offered)),
            "anime": {
                space.name: compare(features, pooled_features(space, made, device=config.device))
                for space, features in zip(spaces, real, strict=True)
            },
        }
        console.print(f"{method} done", style="dim")
    counts = {"people": len(names), "anime": len(anime), "resolution": face.resolution}
    return {"counts": counts, "results": results}, pictures


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


def markdown(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def sheet(pictures: dict[str, Tensor], path: Path, size: int = 96) -> None:
    """Evenly spread people, one a row; the methods are the columns, the photo first."""
    count = len(pictures["photo"])
    chosen = [i * count // ROWS for i in range(ROWS)] if count > ROWS else list(range(count))
    columns = torch.stack([made[chosen].cpu() for made in pictures.values()], dim=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = grid(resize(columns.flatten(0, 1), size), columns=len(pictures))
    labelled(whole, list(pictures)).save(path)


def main() -> None:
    try:
        config = tyro.cli(Config, description=__doc__)
        config = replace(config, **QUICK) if config.quick else config
        report, pictures = evaluate(config)
    except ValueError as error:
        Console(stderr=True).print(f"[red]{error}[/red]")
        raise SystemExit(2) from None
    lines = {}
    for space in report["results"]["photo"]["anime"]:
        rows = rows_of(report, space)
        table = Table(*rows[0], title=space)
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
        lines[space] = markdown(rows)
    if config.picture is not None:
        sheet(pictures, config.picture)
    finish(about("translation", sys.argv[1:]) | report | {"markdown": lines}, config.output)


if __name__ == "__main__":
    main()
