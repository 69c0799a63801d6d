"""How good the samples of generators are: FD, KID, precision and recall by truncation.

    python benchmarks/quality.py face64 --data faces/test.parquet \\
        --spaces efficientnet alexnet=alex.safetensors --output benchmarks/results/face64.json \\
        --picture benchmarks/results/face64_samples.png

Name two spaces: a generator trained against efficientnet's features is judged too kindly by them.
KID is given twice, of the features as they are and divided by their root mean square on the real
pictures: raw features of some networks are so large that the cubic kernel measures little but their
norm. Ends with one JSON line; `--quick` takes 100 samples.

Shape letters: N pictures, F features.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from report import about, finish
from rich.console import Console
from rich.table import Table

from generators.checkpoint import load_one_of, resolve
from generators.data import first_pictures, open_dataset
from generators.distances import compare, draw, feature_space, kernel_distance, pooled_features
from generators.images import grid

console = Console()
KINDS = ("generator", "dcgan")
SHEET = 96  # samples in the picture, at truncation 0.8


@dataclass(frozen=True)
class Config:
    generators: tyro.conf.Positional[tuple[str, ...]]  # bundled names or .safetensors files
    data: str  # held-out pictures
    spaces: tuple[str, ...] = ("efficientnet",)  # NAME or NAME=WEIGHTS of generators.distances
    truncations: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 1.0)
    samples: int = 1200  # and at most so many held-out pictures, evenly spread
    seed: int = 1
    device: str = "cpu"
    output: Path | None = None  # JSON with the figures
    picture: Path | None = None  # 96 uncurated samples of the first generator
    quick: bool = False


def evaluate(config: Config) -> list[dict[str, Any]]:
    """One row for each generator, truncation and space."""
    networks = {Path(g).stem: load_one_of(resolve(g), KINDS) for g in config.generators}
    resolution = next(iter(networks.values())).resolution
    held_out = first_pictures(open_dataset(config.data, resolution), config.samples)
    rows = []
    for spec in config.spaces:
        space = feature_space(spec).to(config.device)
        real = pooled_features(space, held_out, device=config.device)  # (N, F)
        rms = real.square().mean().sqrt()
        for name, network in networks.items():
            network.to(config.device)
            for truncation in config.truncations:
                images = draw(network, config.samples, config.seed, truncation)
                fake = pooled_features(space, images, device=config.device)
                unit = {"kid_unit_rms": kernel_distance(real / rms, fake / rms)[0]}
                row = {"generator": name, "space": space.name, "truncation": truncation}
                rows.append(row | compare(real, fake) | unit)
    return rows


def main() -> None:
    try:
        config = tyro.cli(Config, description=__doc__)
        config = replace(config, samples=100) if config.quick else config
        rows = evaluate(config)
    except ValueError as error:
        Console(stderr=True).print(f"[red]{error}[/red]")
        raise SystemExit(2) from None
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(x if isinstance(x, str) else f"{x:.3g}" for x in row.values()))
    console.print(table)
    if config.picture is not None:
        config.picture.parent.mkdir(parents=True, exist_ok=True)
        network = load_one_of(resolve(config.generators[0]), KINDS).to(config.device)
        samples = torch.cat(list(draw(network, SHEET, config.seed, truncation=0.8)))
        grid(samples.cpu(), columns=16).save(config.picture)
    finish(
        about("quality", sys.argv[1:]) | {"samples": config.samples, "results": rows}, config.output
    )


if __name__ == "__main__":
    main()
