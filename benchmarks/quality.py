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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from common import Benchmark, benchmark, show

from generators.checkpoint import load, resolve
from generators.data import first_pictures, open_dataset
from generators.dcgan import DcganGenerator
from generators.disk import write_atomically
from generators.distances import compare, draw, feature_space, kernel_distance, pooled_features
from generators.images import grid
from generators.stylegan2 import Generator

SHEET = 96  # samples in the picture, at truncation 0.8


@dataclass(frozen=True)
class Config(Benchmark):
    generators: tyro.conf.Positional[tuple[str, ...]]  # bundled names or .safetensors files
    data: str  # held-out pictures
    spaces: tuple[str, ...] = ("efficientnet",)  # NAME or NAME=WEIGHTS of generators.distances
    truncations: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 1.0)
    samples: int = 1200  # and at most so many held-out pictures, evenly spread
    seed: int = 1  # of the samples
    device: str = "cpu"
    picture: Path | None = None  # 96 uncurated samples of the first generator


def evaluate(config: Config) -> list[dict[str, Any]]:
    """One row for each generator, truncation and space."""
    networks: dict[str, Any] = {
        Path(g).stem: load(resolve(g), Generator, DcganGenerator) for g in config.generators
    }
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


def run(config: Config) -> dict[str, Any]:
    rows = evaluate(config)
    show(rows)
    if config.picture is not None:
        network = load(resolve(config.generators[0]), Generator, DcganGenerator).to(config.device)
        samples = torch.cat(list(draw(network, SHEET, config.seed, truncation=0.8)))
        picture = grid(samples.cpu(), columns=16)
        write_atomically(config.picture, partial(picture.save, format="PNG"))
    return {"samples": config.samples, "results": rows}


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark("quality", Config, run, {"samples": 100}, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
