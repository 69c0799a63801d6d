"""What the benchmarks share: the command, the stopwatch, processes for rows, metrics, tables.

seconds = stopwatch(lambda: network(x), repeats=20, device=device)
row = percentiles(seconds) | {"peak_memory_mb": peak_memory_mb(device)}
[row] = in_processes(measure, config)                                  # the same, undisturbed
return benchmark("quality", Config, run, {"samples": 100}, __doc__, argv)       # in each `main`

Shape letters: B batch, N M pictures, R resolution, F features.
"""

import json
import os
import platform
import re
import resource
import shlex
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from encoder.metrics import LUMA, FaceEmbedder, Lpips, Metric, image_metrics
from encoder.options import belonging
from encoder.pipeline import clock
from generators.command import command, console, parse_device, worker_processes
from generators.disk import may_write, write_atomically
from generators.features import FeaturePyramid, unit_channels
from generators.images import resize
from generators.stylegan2 import GeneratorConfig

T = TypeVar("T")
LIBRARIES = ["torch", "timm", "facenet_pytorch", "accelerate", "tyro", "encoder.train"]
FAMILY = {"anime_generator": "anime", "encoder": "encoder", "curvature": "curvature",
          "directions": "directions"}  # options, and the kind of their networks  # fmt: skip
SPEED = {"p50 ms": "p50_ms", "p95 ms": "p95_ms", "images/s": "images_per_second",
         "peak MB": "peak_memory_mb"}  # columns of a table, and what a row calls them  # fmt: skip
MEMORY = (
    "peak_memory_mb: on the CPU the peak resident memory of a process that measured this row only, "
    "Python and torch (memory_of_imports_mb) included; on CUDA torch's peak of allocated memory"
)

# ------------------------------------------------------------------------ the command


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The options of every benchmark. Networks that are "auto" belong to the face generator."""

    output: Path | None = None  # JSON with the figures and the command
    overwrite: bool = False  # replace what is in the way of what is written
    quick: bool = False  # a little of everything: does it work?

    def __post_init__(self) -> None:
        parse_device(getattr(self, "device", "cpu"))
        counts = {name: getattr(self, name, 1) for name in ("images", "batch_size", "repeats")}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {count}; give 1 or more.")
        if getattr(self, "threads", 0) < 0:
            raise ValueError("--threads is 0 or more.")
        for name, kind in FAMILY.items():
            if getattr(self, name, None) == "auto":
                object.__setattr__(self, name, belonging(self.face_generator, kind))
        for name in ("output", "csv", "plot", "picture"):
            if (path := getattr(self, name, None)) is not None:
                may_write(path, self.overwrite)


def benchmark(
    name: str,
    config: type[Benchmark],
    run: Callable[[Any], dict[str, Any]],  # -> the report's own part; "failed": 1 or more end in 1
    quick: Mapping[str, Any],  # fields that --quick changes
    description: str | None,
    argv: Sequence[str] | None = None,
) -> int:
    """Runs and prints the report as one line of JSON, the last; the exit code."""

    def whole(given: Benchmark) -> int:
        asked: Any = replace(given, **quick) if given.quick else given
        if getattr(asked, "threads", 0):
            torch.set_num_threads(asked.threads)
        report = about(name, sys.argv[1:] if argv is None else argv) | run(asked)
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        if given.output is not None:
            write_atomically(given.output, lambda file: file.write_text(text, encoding="utf-8"))
        print(json.dumps(report))
        return min(report.get("failed", 0), 1)

    return command(config, whole, description, argv)


def about(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The benchmark, its command with paths cut to their last part, and the machine."""
    short = [re.sub(r"[^=]*[/\\](?=[^/\\])", "", a.rstrip("/\\")) for a in arguments]
    command = shlex.join(["python", f"benchmarks/{script}.py", *short])
    today = time.strftime("%Y-%m-%d")
    return {"benchmark": script, "date": today, "command": command, "machine": machine()}


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
    }


# ------------------------------------------------------------------------------ measuring


def stopwatch(
    call: Callable[[], Any], repeats: int, device: torch.device, warm_up: int = 2
) -> list[float]:
    """Seconds of each of `repeats` calls after the warm-up, the device synchronised."""
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(repeats):
        start = clock(device)
        call()
        seconds.append(clock(device) - start)
    return seconds


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile in milliseconds; of few samples p95 is near the largest."""
    ms = [1000 * s for s in seconds]
    p95 = statistics.quantiles(ms, n=20, method="inclusive")[-1] if len(ms) > 1 else ms[0]
    return {"p50_ms": round(statistics.median(ms), 3), "p95_ms": round(p95, 3)}


def peak_memory_mb(device: torch.device | str = "cpu") -> float:
    """Of this process so far, in MB of 2^20 bytes; see MEMORY."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def in_processes(function: Callable[..., T], *arguments: Any, count: int = 1) -> list[T]:
    """function(*arguments) in `count` fresh processes at once, which torch.distributed can join.

    They are forked from a server that has only imported the libraries: quick to start, and their
    peak memory is their own (after fork and exec, ru_maxrss would begin at the parent's peak).
    What one of them raises is raised here; RuntimeError if one is killed.
    """
    forkserver.set_forkserver_preload(LIBRARIES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with worker_processes(count, "forkserver") as submit:
        jobs = [submit(_as_rank, i, count, port, function, arguments) for i in range(count)]
        return [job.result() for job in jobs]


def first_line(error: Exception) -> str:
    """Of its message, without folders: why a row has no figures."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"/\S*/", "", lines[0])[:150]


def _as_rank(rank: int, world: int, port: int, function: Callable[..., T], arguments: Any) -> T:
    """With what torchrun tells its processes, if there are several."""
    if world > 1:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {key: str(value) for key, value in values.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return function(*arguments)


# ---------------------------------------------------------------------------- metrics


def metrics_of(
    lpips: Mapping[str, Path], id_weights: Path | None, device: torch.device
) -> dict[str, Metric]:
    """mse, psnr, ms_ssim, and of what there are weights for: lpips_alex, lpips_vgg, id."""
    metrics = image_metrics(with_lpips=False)
    for net in ("alex", "vgg"):
        if net in lpips:
            metrics[f"lpips_{net}"] = Lpips(net, lpips[net]).to(device)
        else:
            console.print(f"no column lpips_{net}: give --lpips-{net} FILE")
    if id_weights is not None:
        embed = FaceEmbedder(id_weights).to(device)
        metrics["id"] = lambda a, b: 1 - (embed(a) * embed(b)).sum(dim=1)
    return metrics


@torch.no_grad()
def scores(
    metrics: Mapping[str, Metric], made: Tensor, images: Tensor, batch_size: int = 16
) -> dict[str, float]:
    """The mean over pictures (N, 3, R, R) of each metric."""
    pairs = list(zip(made.split(batch_size), images.split(batch_size), strict=True))
    return {
        name: float(torch.cat([metric(a, b) for a, b in pairs]).double().mean())
        for name, metric in metrics.items()
    }


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


# ------------------------------------------------------------------------------ tables


def show(table: Table | Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """A table, or one of rows with the same keys."""
    if not isinstance(table, Table):
        rows = table
        table = Table(*rows[0], title=title, box=SIMPLE, pad_edge=False, collapse_padding=True)
        for row in rows:
            table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()))
    if not console.is_terminal:
        console.width = 120  # rich would take 80
    console.print(table, soft_wrap=False)


def markdown(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def speed_table(*asked: str) -> Table:
    """With a column for each name, and those of SPEED."""
    table = Table(*asked, box=SIMPLE, pad_edge=False, collapse_padding=True)
    for name in SPEED:
        table.add_column(name, justify="right")
    return table


def speeds(row: dict[str, Any]) -> list[str]:
    """A row's figures in those columns; a dash for what it does not have."""
    return [f"{row[key]:.1f}" if key in row else "–" for key in SPEED.values()]


# ------------------------------------------------------------------------------ networks


def resized(
    config: GeneratorConfig, resolution: int, base: int | None, most: int | None
) -> GeneratorConfig:
    """The same family at another resolution; `base`, `most`: other channel_base, channel_max."""
    base, most = base or config.channel_base, most or config.channel_max
    return replace(config, resolution=resolution, channel_base=base, channel_max=most, widths=())
