"""Super-resolution against bicubic: PSNR and LPIPS on held-out photos and drawings.

    python benchmarks/superres.py --data faces256/test.parquet@256 anime/test.parquet@96 \\
        --lpips-weights alex.safetensors --output benchmarks/results/superres64.json

Each picture of PATH@RESOLUTION is shrunk by 2 (from 256 pixels on also by 4, and its half by 2),
rounded to 8 bits as a written picture is, and enlarged again. Ends with one JSON line; `--quick`
looks at 8 pictures of each set.

Shape letters: B batch, N pictures, R resolution.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from report import about, finish
from rich.console import Console
from rich.table import Table
from torch import Tensor

from encoder.evaluate import image_metrics
from generators.checkpoint import load, resolve
from generators.data import first_pictures, open_dataset
from generators.images import resize, to_float, to_uint8
from generators.runs import frozen
from generators.superres import upscale

console = Console()
BATCH = 10


@dataclass(frozen=True)
class Config:
    data: tuple[str, ...]  # PATH@RESOLUTION: held-out pictures and their side in pixels
    network: str = "superres64"  # bundled name or .safetensors file
    images: int = 100  # of each set, evenly spread
    lpips: bool = True
    lpips_weights: Path | None = None  # AlexNet's; None: a download, said aloud
    output: Path | None = None  # JSON with the figures
    quick: bool = False


def written(images: Tensor) -> Tensor:
    return to_float(to_uint8(images))


@torch.no_grad()
def evaluate(config: Config) -> list[dict[str, Any]]:
    """One row for each data set, enlargement and method."""
    network = frozen(load(resolve(config.network), "superres"))
    metrics = image_metrics(lpips_weights=config.lpips_weights, with_lpips=config.lpips)
    judges = {key: metrics[key] for key in ("psnr", "lpips") if key in metrics}
    rows = []
    for spec in config.data:
        path, _, side = spec.rpartition("@")
        if not side.isdigit():
            raise ValueError(f"--data {spec!r} needs its resolution; write PATH@PIXELS")
        pictures = first_pictures(open_dataset(path, int(side)), config.images)
        large = int(side)
        steps = [(large // 2, large)]
        if large >= 256:
            steps += [(large // 4, large // 2), (large // 4, large)]
        for small, size in steps:
            methods = {"bicubic": lambda x, s=size: resize(x, s),
                       "network": lambda x, s=size: upscale(network, x, s)}  # fmt: skip
            for name, method in methods.items():
                sums: dict[str, float] = {}
                seconds = 0.0
                for batch in pictures.split(BATCH):
                    high = written(resize(batch, size))
                    low = written(resize(high, small))
                    start = time.process_time()
                    result = written(method(low))
                    seconds += time.process_time() - start
                    for key, metric in judges.items():
                        value = metric(result, high).sum().item()
                        sums[key] = sums.get(key, 0.0) + value
                means = {key: value / len(pictures) for key, value in sums.items()}
                rows.append({"data": Path(path).parent.name, "from": small, "to": size,
                             "method": name} | means
                            | {"cpu_ms": 1e3 * seconds / len(pictures)})  # fmt: skip
                console.print(rows[-1], style="dim")
    return rows


def main() -> None:
    try:
        config = tyro.cli(Config, description=__doc__)
        rows = evaluate(replace(config, images=8) if config.quick else config)
    except ValueError as error:
        Console(stderr=True).print(f"[red]{error}[/red]")
        raise SystemExit(2) from None
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()))
    console.print(table)
    finish(
        about("superres", sys.argv[1:]) | {"images": config.images, "results": rows}, config.output
    )


if __name__ == "__main__":
    main()
