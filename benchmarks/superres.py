"""Super-resolution against bicubic: PSNR and LPIPS on held-out photos and drawings.

    python benchmarks/superres.py --data faces256/test.parquet@256 anime/test.parquet@96 \\
        --lpips-weights alex.safetensors --output benchmarks/results/superres64.json

Each picture of PATH@RESOLUTION is shrunk by 2 (from 256 pixels on also by 4, and its half by 2),
rounded to 8 bits as a written picture is, and enlarged again. Ends with one JSON line; `--quick`
looks at 8 pictures of each set.

Shape letters: B batch, N pictures, R resolution.
"""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Benchmark, benchmark, show
from torch import Tensor

from encoder.metrics import image_metrics
from generators.checkpoint import load, resolve
from generators.data import first_pictures, open_dataset
from generators.images import resize, to_float, to_uint8
from generators.runs import frozen
from generators.superres import SuperResolution, upscale

BATCH = 10


@dataclass(frozen=True)
class Config(Benchmark):
    data: tuple[str, ...]  # PATH@RESOLUTION: held-out pictures and their side in pixels
    network: str = "superres64"  # bundled name or .safetensors file
    images: int = 100  # of each set, evenly spread
    lpips: bool = True
    lpips_weights: Path | None = None  # AlexNet's; None: a download, said aloud

    def __post_init__(self) -> None:
        super().__post_init__()
        for spec in self.data:
            if not re.fullmatch(r".+@[1-9]\d{0,3}", spec):
                raise ValueError(f"--data {spec} needs its resolution; write PATH@PIXELS")


def written(images: Tensor) -> Tensor:
    return to_float(to_uint8(images))


@torch.no_grad()
def evaluate(config: Config) -> list[dict[str, Any]]:
    """One row for each data set, enlargement and method."""
    network = frozen(load(resolve(config.network), SuperResolution))
    metrics = image_metrics(lpips_weights=config.lpips_weights, with_lpips=config.lpips)
    judges = {key: metrics[key] for key in ("psnr", "lpips") if key in metrics}
    rows = []
    for spec in config.data:
        path, _, side = spec.rpartition("@")
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
    return rows


def run(config: Config) -> dict[str, Any]:
    rows = evaluate(config)
    show(rows)
    return {"images": config.images, "results": rows}


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark("superres", Config, run, {"images": 8}, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
