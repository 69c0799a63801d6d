"""How good the samples of generators are: FD, KID, precision and recall by truncation.

    python benchmarks/quality.py face64 --data faces/test.parquet \\
        --spaces efficientnet alexnet=alex.safetensors --output benchmarks/results/face64.json \\
        --picture benchmarks/results/face64_samples.png

Name two spaces: a generator trained against efficientnet's features is judged too kindly by them.
KID is given twice, of the features as they are and divided by their root mean square on the real
pictures: raw features of some networks are so large that the cubic kernel measures little but their
norm. `--training-data` scores the pictures that were trained on as if they were samples, which is
what a generator that had learnt them perfectly would get, and with `--encoder` its reconstructions
of them, which is what the first generator could get by other latents. Ends with one JSON line;
`--quick` takes 100 samples.

Shape letters: N pictures, F features.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from common import Benchmark, benchmark, show
from torch import Tensor

from encoder.model import Encoder
from generators.checkpoint import load, resolve
from generators.data import first_pictures, open_dataset
from generators.dcgan import DcganGenerator
from generators.disk import write_atomically
from generators.distances import (
    FeatureSpace,
    compare,
    draw,
    feature_space,
    kernel_distance,
    pooled_features,
)
from generators.images import grid, to_float, to_uint8
from generators.stylegan2 import Generator

BATCH = 32  # pictures encoded together
SHEET = 96  # samples in the picture, at truncation 0.8


@dataclass(frozen=True)
class Config(Benchmark):
    generators: tyro.conf.Positional[tuple[str, ...]]  # bundled names or .safetensors files
    data: str  # held-out pictures
    training_data: str | None = None  # real pictures to score as samples are
    encoder: str | None = None  # of the first generator, to score its reconstructions of these
    spaces: tuple[str, ...] = ("efficientnet",)  # NAME or NAME=WEIGHTS of generators.distances
    truncations: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 1.0)
    samples: int = 1200  # and at most so many held-out pictures, evenly spread
    seed: int = 1  # of the samples
    device: str = "cpu"
    picture: Path | None = None  # 96 uncurated samples of the first generator

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder is not None and self.training_data is None:
            raise ValueError("--encoder reconstructs --training-data; give these, too.")


def score(space: FeatureSpace, real: Tensor, images: Tensor | Iterable[Tensor]) -> dict[str, float]:
    """Of pictures, against the features (N, F) of real ones."""
    fake = pooled_features(space, images, device=next(space.parameters()).device)
    rms = real.square().mean().sqrt()
    return compare(real, fake) | {"kid_unit_rms": kernel_distance(real / rms, fake / rms)[0]}


@torch.no_grad()
def reconstructions(config: Config, pictures: Tensor) -> Iterator[Tensor]:
    """Of (N, 3, R, R) in batches, rounded to 8 bits."""
    encoder = load(resolve(str(config.encoder)), Encoder).to(config.device)
    network = load(resolve(config.generators[0]), Generator).to(config.device)
    for batch in pictures.split(BATCH):
        yield to_float(to_uint8(network.synthesis(encoder(batch.to(config.device)))))


def evaluate(config: Config) -> list[dict[str, Any]]:
    """One row for each space and each generator and truncation, then those of --training-data."""
    networks: dict[str, Any] = {
        Path(g).stem: load(resolve(g), Generator, DcganGenerator).to(config.device)
        for g in config.generators
    }
    resolution = next(iter(networks.values())).resolution
    held_out = first_pictures(open_dataset(config.data, resolution), config.samples)
    training = None
    if config.training_data is not None:
        training = first_pictures(open_dataset(config.training_data, resolution), config.samples)
    rows: list[dict[str, Any]] = []
    for spec in config.spaces:
        space = feature_space(spec).to(config.device)
        real = pooled_features(space, held_out, device=config.device)  # (N, F)
        scored: dict[tuple[str, float | None], Tensor | Iterable[Tensor]] = {
            (name, truncation): draw(network, config.samples, config.seed, truncation)
            for name, network in networks.items()
            for truncation in config.truncations
        }
        if training is not None:
            scored["training pictures", None] = training
            if config.encoder is not None:
                name = f"their reconstructions by {Path(config.encoder).stem}"
                scored[name, None] = reconstructions(config, training)
        for (name, truncation), images in scored.items():
            row = {"generator": name, "space": space.name, "truncation": truncation}
            rows.append(row | score(space, real, images))
    return rows


def run(config: Config) -> dict[str, Any]:
    rows = evaluate(config)
    show(rows)
    if config.picture is not None:
        network: Any = load(resolve(config.generators[0]), Generator, DcganGenerator)
        network.to(config.device)
        samples = torch.cat(list(draw(network, SHEET, config.seed, truncation=0.8)))
        picture = grid(samples.cpu(), columns=16)
        write_atomically(config.picture, partial(picture.save, format="PNG"))
    return {"samples": config.samples, "results": rows}


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark("quality", Config, run, {"samples": 100}, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
