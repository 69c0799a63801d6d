"""One encoder pass against the mean face and latent optimisation, on the same held-out faces.

    python benchmarks/inversion.py --data faces/test.parquet --images 50 \\
        --lpips-weights alex.safetensors --output benchmarks/results/inversion64.json

Seconds are per picture in batches of `batch_size`, after one warm-up batch, device synchronised,
the generator's pass included. Ends with one JSON line. `--quick` takes seconds: few pictures and
steps.

Shape letters: B batch, L layers of w+, D dimension of w, R resolution.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from report import about, finish
from rich.console import Console
from rich.table import Table
from torch import Tensor

from encoder.evaluate import image_metrics
from encoder.invert import optimize_latent
from encoder.losses import LossSet
from encoder.model import Encoder
from generators.checkpoint import load, resolve
from generators.data import first_pictures, open_dataset
from generators.images import grid
from generators.runs import frozen
from generators.stylegan2 import Generator

console = Console()


@dataclass(frozen=True)
class Config:
    data: str  # held-out aligned faces
    images: int = 50
    face_generator: str = "face64"
    encoder: str = "encoder64"
    steps: tuple[int, ...] = (25, 100)  # of refinement after the encoder
    optimisation_steps: int = 1000  # from the mean, in w+
    learning_rate: float = 0.05
    batch_size: int = 25
    lpips_weights: Path | None = None  # AlexNet's; None: a download, said aloud
    device: str = "cpu"
    output: Path | None = None  # JSON with the figures and the command
    picture: Path | None = None  # input x method grid
    quick: bool = False


def methods(config: Config, generator: Generator, encoder: Encoder) -> dict[str, Callable]:
    """{name: images (B, 3, R, R) -> ws (B, L, D)}; what is optimised is mse, as in refinement."""
    losses = LossSet({"mse": 1.0})

    def mean(images: Tensor) -> Tensor:
        return generator.w_avg.expand(len(images), generator.num_ws, -1)

    def search(start: Callable[[Tensor], Tensor], steps: int) -> Callable[[Tensor], Tensor]:
        rate = config.learning_rate
        return lambda x: optimize_latent(
            generator, x, start=start(x), steps=steps, losses=losses, learning_rate=rate
        )

    rows: dict[str, Callable] = {"mean face": mean, "encoder": encoder}
    rows |= {f"encoder + {steps}": search(encoder, steps) for steps in config.steps}
    rows[f"optimisation {config.optimisation_steps}"] = search(mean, config.optimisation_steps)
    return rows


@torch.no_grad()
def run(config: Config) -> dict[str, Any]:
    device = torch.device(config.device)
    generator: Generator = frozen(load(resolve(config.face_generator), "generator")).to(device)
    encoder: Encoder = frozen(load(resolve(config.encoder), "encoder")).to(device)
    images = first_pictures(open_dataset(config.data, generator.resolution), config.images)
    metrics = image_metrics("alex", config.lpips_weights, device=device)

    def synchronise() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    results, columns = {}, [images[:8]]
    for name, method in methods(config, generator, encoder).items():
        if not name.startswith("optimisation"):
            generator.synthesis(method(images[: config.batch_size].to(device)))  # warm-up
        made, seconds = [], 0.0
        for batch in images.split(config.batch_size):
            start = synchronise()
            made.append(generator.synthesis(method(batch.to(device))))
            seconds += synchronise() - start
        reconstructions = torch.cat(made).clamp(-1, 1)
        row = {key: metric(reconstructions, images.to(device)).mean().item()
               for key, metric in metrics.items()}  # fmt: skip
        results[name] = row | {"seconds_per_image": seconds / len(images)}
        columns.append(reconstructions[:8].cpu())
        console.print(name, {key: round(value, 4) for key, value in results[name].items()})
    if config.picture is not None:
        grid(torch.stack(columns, dim=1).flatten(0, 1), columns=len(columns)).save(config.picture)
    return results


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    if config.quick:
        config = Config(**asdict(config) | {"images": 8, "steps": (5,), "optimisation_steps": 20})
    results = run(config)
    table = Table("method", *next(iter(results.values())))
    for name, row in results.items():
        table.add_row(name, *(f"{value:.4g}" for value in row.values()))
    console.print(table)
    finish(about("inversion", sys.argv[1:]) | {"images": config.images, "results": results},
           config.output)  # fmt: skip


if __name__ == "__main__":
    main()
