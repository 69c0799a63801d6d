"""What the benchmarks share: the stopwatch, a process of its own for each row, the report.

seconds = stopwatch(lambda: network(x), repeats=20, device=device)
row = percentiles(seconds) | {"peak_memory_mb": peak_memory_mb(device)}
[row] = in_processes(measure, config)                                  # the same, undisturbed
finish(about("quality", sys.argv[1:]) | {"results": …}, config.output)
"""

import json
import multiprocessing
import os
import platform
import re
import resource
import shlex
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from encoder.pipeline import clock
from generators.stylegan2 import GeneratorConfig

T = TypeVar("T")
LIBRARIES = ["torch", "timm", "facenet_pytorch", "accelerate", "tyro", "encoder.players"]
SPEED = {"p50 ms": "p50_ms", "p95 ms": "p95_ms", "images/s": "images_per_second",
         "peak MB": "peak_memory_mb"}  # columns of a table, and what a row calls them  # fmt: skip
console = Console(width=None if sys.stdout.isatty() else 100)  # rich would take 80 for a file's
MEMORY = (
    "peak_memory_mb: on the CPU the peak resident memory of a process that measured this row only, "
    "Python and torch (memory_of_imports_mb) included; on CUDA torch's peak of allocated memory"
)


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


def finish(report: dict[str, Any], output: Path | None) -> None:
    """Writes the report to `output`, if given, and prints it as the last line."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(report))


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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        jobs = [pool.submit(_as_rank, i, count, port, function, arguments) for i in range(count)]
        return [job.result() for job in jobs]


def speed_table(*asked: str) -> Table:
    """With a column for each name, and those of SPEED."""
    table = Table(*asked, box=SIMPLE, pad_edge=False, collapse_padding=True)
    for name in SPEED:
        table.add_column(name, justify="right")
    return table


def speeds(row: dict[str, Any]) -> list[str]:
    """A row's figures in those columns; a dash for what it does not have."""
    return [f"{row[key]:.1f}" if key in row else "–" for key in SPEED.values()]


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


# ------------------------------------------------------------------------------ networks


def resized(
    config: GeneratorConfig, resolution: int, base: int | None, most: int | None
) -> GeneratorConfig:
    """The same family at another resolution; `base`, `most`: other channel_base, channel_max."""
    base, most = base or config.channel_base, most or config.channel_max
    return replace(config, resolution=resolution, channel_base=base, channel_max=most, widths=())
