"""Speed of the synthesis network, by resolution and batch size, alone or against NVIDIA's code.

    python benchmarks/generator.py                                     # every size, 15 runs
    python benchmarks/generator.py --quick                             # under two minutes
    python benchmarks/generator.py --resolutions 256 --reference ../stylegan2-ada-pytorch

ONNX Runtime draws too, where it is installed. `--reference` is a local checkout of
github.com/NVlabs/stylegan2-ada-pytorch, whose licence is its own. All networks get the same random
weights and the same ws, and run in turn, so that whatever else the machine does hits all of them.
Wall time is what a user waits; CPU time (all threads of this process) is steadier on a shared
machine. The last line printed is one JSON object.

Shape letters: B batch, L layers of w+, D w dimension, R resolution.
"""

import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Benchmark, benchmark, peak_memory_mb, percentiles, show
from torch import Tensor, nn

from encoder.engines import installed, runner
from generators.graphs import Graph, block
from generators.stylegan2 import GeneratorConfig, SynthesisNetwork

Sample = tuple[float, float]  # wall and CPU seconds of one run


@dataclass(frozen=True)
class Config(Benchmark):
    resolutions: tuple[int, ...] = (64, 128, 256)  # output sides in pixels
    batch_sizes: tuple[int, ...] = (1, 8)
    channel_base: int = 16384  # channels at resolution r: min(channel_base // r, channel_max)
    channel_max: int = 512
    w_dim: int = 512
    runs: int = 15  # timed runs of each network and setting, after one warm-up
    threads: int = 0  # of torch; 0 leaves torch's own choice
    onnx: bool = True  # ONNX Runtime beside torch, where it is installed
    reference: Path | None = None  # checkout of NVlabs/stylegan2-ada-pytorch to compare with

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(*self.resolutions, *self.batch_sizes, self.runs) < 1:
            raise ValueError("resolutions, batch sizes and runs must be at least 1")
        if self.reference and not (self.reference / "training" / "networks.py").is_file():
            raise ValueError(
                f"{self.reference} has no training/networks.py; "
                "clone NVlabs/stylegan2-ada-pytorch there"
            )

    def runs_of(self, batch_size: int) -> int:
        return min(self.runs, 5 if batch_size == 1 else 2) if self.quick else self.runs


def our_synthesis(config: Config, resolution: int) -> SynthesisNetwork:
    """Random weights, with noise and biases that are not zero."""
    torch.manual_seed(0)
    shape = GeneratorConfig(
        resolution,
        w_dim=config.w_dim,
        channel_base=config.channel_base,
        channel_max=config.channel_max,
    )
    network = SynthesisNetwork(shape).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith("noise_strength") or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def reference_synthesis(config: Config, resolution: int, ours: SynthesisNetwork) -> nn.Module:
    """NVIDIA's network of the same shape with the weights of `ours`; only its filters stay."""
    folder = str(config.reference)
    if folder not in sys.path:
        sys.path.append(folder)
    networks = importlib.import_module("training.networks")
    sizes = {"channel_base": config.channel_base, "channel_max": config.channel_max}
    network = (
        networks.SynthesisNetwork(config.w_dim, resolution, 3, **sizes).eval().requires_grad_(False)
    )
    filters = {k: v for k, v in network.state_dict().items() if k.endswith("resample_filter")}
    network.load_state_dict(filters | ours.state_dict())
    return network


def onnx_synthesis(ours: SynthesisNetwork, ws: Tensor, threads: int) -> Callable[[], Tensor]:
    """The same network in ONNX Runtime, drawing these ws."""
    graph = Graph()
    x = image = ""
    name = graph.input("ws", ("B", *ws.shape[1:]))
    for r in ours.resolutions:
        x, image = block(graph, ours, r, x, image, name)
    graph.output("image", image, ("B", 3, r, r))
    run = runner(graph.model("synthesis").SerializeToString(), "onnxruntime", threads)
    return lambda: run(ws)[0]


def timed(run: Callable[[], Tensor]) -> Sample:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def summary(samples: list[Sample], batch_size: int) -> dict[str, float]:
    """Milliseconds of one run and images/s of the median run."""
    wall, cpu = ([sample[i] for sample in samples] for i in (0, 1))
    figures = percentiles(wall)
    return {
        "wall_ms_p50": round(figures["p50_ms"], 2),
        "wall_ms_p95": round(figures["p95_ms"], 2),
        "wall_ms_min": round(1000 * min(wall), 2),
        "cpu_ms_p50": round(percentiles(cpu)["p50_ms"], 2),
        "cpu_ms_min": round(1000 * min(cpu), 2),
        "images_per_second": round(batch_size / statistics.median(wall), 2),
    }


@torch.inference_mode()
def measure(config: Config, resolution: int, batch_size: int) -> dict[str, object]:
    """One row: our numbers; with a reference, its numbers, the ratios (> 1: ours is faster) and
    the parity."""
    ours = our_synthesis(config, resolution)
    ws = torch.randn(batch_size, 2 * len(ours.resolutions), config.w_dim)  # (B, L, D)
    networks: dict[str, Callable[[], Tensor]] = {"ours": lambda: ours(ws, noise_mode="const")}
    if config.onnx and installed("onnxruntime"):
        networks["onnxruntime"] = onnx_synthesis(ours, ws, torch.get_num_threads())
    if config.reference:
        theirs = reference_synthesis(config, resolution, ours)
        networks["reference"] = lambda: theirs(ws, noise_mode="const")
    images = {name: run() for name, run in networks.items()}  # the warm-up
    samples: dict[str, list[Sample]] = {name: [] for name in networks}
    for _ in range(config.runs_of(batch_size)):
        for name, run in networks.items():
            samples[name].append(timed(run))
    stats = {name: summary(taken, batch_size) for name, taken in samples.items()}
    row: dict[str, object] = {
        "resolution": resolution,
        "batch_size": batch_size,
        "runs": config.runs_of(batch_size),
    }
    row |= stats
    if config.reference:
        for key in ("wall_ms_p50", "cpu_ms_p50", "wall_ms_min", "cpu_ms_min"):
            row[f"ratio_{key}"] = round(stats["reference"][key] / stats["ours"][key], 2)
            if "onnxruntime" in stats:
                ratio = stats["reference"][key] / stats["onnxruntime"][key]
                row[f"ratio_onnxruntime_{key}"] = round(ratio, 2)
        row["max_abs_difference"] = float((images["ours"] - images["reference"]).abs().max())
        row["max_abs_value"] = float(images["reference"].abs().max())
    return row


def table_of(rows: list[dict]) -> list[dict]:
    """What is shown of the rows: a line for each network."""
    lines = []
    for row in rows:
        for name in ("ours", "onnxruntime", "reference"):
            if name in row:
                line = {"network": name, "R": row["resolution"], "B": row["batch_size"]}
                for key in ("wall_ms_p50", "wall_ms_p95", "cpu_ms_p50", "images_per_second"):
                    line[key.replace("_", " ")] = f"{row[name][key]:.1f}"
                compared = name != "reference" and "reference" in row
                of = "ratio_onnxruntime_" if name == "onnxruntime" else "ratio_"
                ratios = f"{row.get(of + 'wall_ms_p50')} / {row.get(of + 'cpu_ms_p50')}"
                lines.append(line | {"ratio wall / CPU": ratios if compared else ""})
    return lines


def run(config: Config) -> dict[str, Any]:
    warnings.filterwarnings("ignore")  # the reference was written for torch 1.7
    rows = [measure(config, r, b) for r in config.resolutions for b in config.batch_sizes]
    show(table_of(rows))
    return {
        "channel_base": config.channel_base,
        "channel_max": config.channel_max,
        "peak_memory_mb": round(peak_memory_mb()),
        "rows": rows,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark("generator", Config, run, {}, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
