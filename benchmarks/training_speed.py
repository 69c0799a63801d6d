"""Speed and memory of an encoder training step: backbones, resolutions, precisions, processes.

    python benchmarks/training_speed.py --threads 1 --output benchmarks/results/training_cpu.json
    python benchmarks/training_speed.py --device cuda --resolutions 256 --batch-size 32
    python benchmarks/training_speed.py --quick                                 # under a minute

A step is `encoder.train.EncoderTraining.step` with the default losses (MSE and latent): forward,
losses, backward, gradients averaged over processes, clipping, AdamW, moving average. It also draws
its batch: three quarters from random pictures in memory, a quarter rendered by the generator.
Reading and decoding files is not in it. The encoder's weights are random; so are the generator's,
except at its own resolution. Several processes talk by gloo on the CPU and NCCL on CUDA, as under
torchrun, and share the threads. Each row is measured in processes of its own. Ends with one JSON
line.

Shape letters: B batch, N pictures, R resolution.
"""

import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from common import (
    MEMORY,
    Benchmark,
    benchmark,
    first_line,
    in_processes,
    peak_memory_mb,
    percentiles,
    resized,
    show,
    speed_table,
    speeds,
    stopwatch,
)
from rich.progress import track

from encoder.train import EncoderTrainConfig, EncoderTraining
from generators.checkpoint import load, resolve, save
from generators.command import console
from generators.data import PictureTensor
from generators.state import LossMeter
from generators.stylegan2 import Generator

Precision = Literal["fp32", "bf16", "fp16"]
BACKBONES = ("tf_efficientnet_lite0", "mobilenetv4_conv_small", "resnet18d", "hgnetv2_b0")
QUICK: dict[str, Any] = {"backbones": BACKBONES[:1], "resolutions": (64,), "repeats": 5}
QUICK |= {"precisions": ("fp32",), "processes": (1,)}


@dataclass(frozen=True)
class Config(Benchmark):
    backbones: tuple[str, ...] = BACKBONES  # timm networks with features_only
    resolutions: tuple[int, ...] = (64, 128, 256)  # R of generator and encoder
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
    processes: tuple[int, ...] = (1, 2)
    batch_size: int = 16  # of one process
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 0  # of each process; 0: torch's own choice, shared out
    repeats: int = 20  # timed steps of each row, after two of warm-up
    face_generator: str = "face128"
    channel_base: int | None = None  # of the random generators; None: the face generator's
    channel_max: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.processes) < 1:
            raise ValueError("--processes is 1 or more")
        if unknown := [name for name in self.backbones if not timm.is_model(name)]:
            raise ValueError(f"timm knows no {', '.join(unknown)}; see timm.list_models()")
        resolve(self.face_generator)


@dataclass(frozen=True)
class Job:
    """What a row is about."""

    backbone: str
    resolution: int
    precision: Precision
    processes: int


def jobs(config: Config) -> Iterator[Job]:
    for r, backbone in itertools.product(config.resolutions, config.backbones):
        for precision, n in itertools.product(config.precisions, config.processes):
            yield Job(backbone, r, precision, n)


def obstacle(config: Config, job: Job) -> str | None:
    """Why this device cannot do it."""
    if config.device == "cpu":
        return "fp16 training needs a GPU" if job.precision == "fp16" else None
    gpus = torch.cuda.device_count()
    return f"needs {job.processes} GPUs, not {gpus}" if job.processes > gpus else None


def generator_file(config: Config, resolution: int, folder: Path) -> tuple[str, str]:
    """(file, "trained" or "random weights")."""
    path = resolve(config.face_generator)
    face: Generator = load(path, Generator)
    if resolution == face.resolution:
        return str(path), "trained"
    file = folder / f"{resolution}.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        shape = resized(face.config, resolution, config.channel_base, config.channel_max)
        save(file, Generator(shape))
    return str(file), "random weights"


def measure(config: Config, job: Job, generator: str) -> dict[str, Any]:
    """Seconds of each step and the memory of this process, one of `job.processes`."""
    threads = config.threads or max(1, torch.get_num_threads() // job.processes)
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="no" if job.precision == "fp32" else job.precision,
        kwargs_handlers=[GradScalerKwargs(init_scale=2**10)],
    )
    assert accelerator.num_processes == job.processes
    torch.set_num_threads(threads)  # Accelerate has a choice of its own
    device, rng = accelerator.device, torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"face_generator": generator, "backbone": job.backbone}
    shape = (64, 3, job.resolution, job.resolution)
    pictures = PictureTensor(torch.randint(256, shape, generator=rng, dtype=torch.uint8))
    options |= {"data": "", "output": Path(), "batch_size": config.batch_size}
    training = EncoderTraining(EncoderTrainConfig(**options), accelerator, pictures)
    meter, number = LossMeter(device), itertools.count()
    seconds = stopwatch(lambda: training.step(next(number), meter), config.repeats, device)
    means, bad = meter.read(job.processes), meter.bad(job.processes)
    peak = peak_memory_mb(device)
    accelerator.end_training()
    if bad is not None:
        raise RuntimeError(f"a loss was not finite at step {bad}")
    return {"seconds": seconds, "peak_memory_mb": peak, "threads": threads, "loss": means["loss"]}


def row_of(config: Config, job: Job, folder: Path) -> dict[str, Any]:
    """What was asked and the figures, or the `reason` why there are none.

    A step is as long as its slowest process; memory is that of the largest one.
    """
    if (reason := obstacle(config, job)) is not None:
        return asdict(job) | {"reason": reason}
    file, weights = generator_file(config, job.resolution, folder)
    row: dict[str, Any] = asdict(job) | {"generator": weights}
    try:
        ranks = in_processes(measure, config, job, file, count=job.processes)
    except RuntimeError as error:
        return row | {"reason": first_line(error)}
    row |= percentiles([max(step) for step in zip(*(x["seconds"] for x in ranks), strict=True)])
    images = config.batch_size * job.processes
    return row | {
        "images_per_second": round(1000 * images / row["p50_ms"], 2),
        "peak_memory_mb": max(x["peak_memory_mb"] for x in ranks),
        "threads": ranks[0]["threads"],
        "loss": round(ranks[0]["loss"], 4),
    }


def show_rows(rows: list[dict[str, Any]], batch_size: int) -> None:
    table = speed_table("backbone", "R", "generator", "precision", "processes")
    for row in rows:
        weights = row.get("generator", "").removesuffix(" weights")
        asked = (row["backbone"], row["resolution"], weights, row["precision"], row["processes"])
        table.add_row(*map(str, asked), *speeds(row))
    show(table)
    console.print(f"{batch_size} pictures a step in each process")
    for reason in dict.fromkeys(row["reason"] for row in rows if "reason" in row):
        which = [f"{x['backbone']} {x['precision']}" for x in rows if x.get("reason") == reason]
        console.print(f"{', '.join(dict.fromkeys(which))}: {reason}")


def run(config: Config) -> dict[str, Any]:
    [imports] = in_processes(peak_memory_mb)
    todo = list(jobs(config))
    with tempfile.TemporaryDirectory() as name:
        rows = [row_of(config, job, Path(name)) for job in track(todo, "rows", console=console)]
    show_rows(rows, config.batch_size)
    step = "forward to moving average, drawing from memory included; reading files not"
    report: dict[str, Any] = {"device": config.device, "batch_size": config.batch_size}
    report |= {"repeats": config.repeats, "step": step}
    report |= {"memory": f"{MEMORY}; of the largest process", "memory_of_imports_mb": imports}
    return report | {"rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark("training_speed", Config, run, QUICK, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
