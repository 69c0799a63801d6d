"""Kill trainings at random moments: does the same command go on and end with the same bits?

    python benchmarks/kill.py                   # 20 moments of each training, some minutes
    python benchmarks/kill.py --quick           # 2 of each, under a minute

A tiny encoder and a tiny generator are trained once without interruption. Then, again and again,
the same command is ended by SIGKILL at a moment drawn evenly over that run, given once more, and
left to its end; metrics and weights are compared bit by bit. Processes are forked from one that has
imported the libraries, so that the moments fall into the training. Ends with one JSON line; the
exit code is 1 if a run was not equal.
"""

import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import LIBRARIES, Benchmark, benchmark
from rich.progress import track
from safetensors.torch import load_file

from encoder import train as encoder_training
from generators import checkpoint
from generators import train as generator_training
from generators.command import console
from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.images import to_pil
from generators.stylegan2 import Generator, GeneratorConfig

MAINS: dict[str, Callable[[Sequence[str]], int]]
MAINS = {"encoder": encoder_training.main, "generator": generator_training.main}


@dataclass(frozen=True)
class Config(Benchmark):
    moments: int = 20  # of each training
    seed: int = 0  # of the moments

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moments < 1:
            raise ValueError(f"--moments is {self.moments}; give 1 or more.")


def tiny_world(folder: Path) -> None:
    """Pictures, a generator and a discriminator of 16 pixels."""
    rng = torch.Generator().manual_seed(1)
    (folder / "faces").mkdir(parents=True)
    for i in range(20):
        colour, grain = torch.rand(3, 1, 1, generator=rng), torch.randn(3, 20, 20, generator=rng)
        to_pil(colour + 0.3 * grain - 0.5).save(folder / "faces" / f"{i}.png")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        generator = Generator(GeneratorConfig(16, 8, 12, 2, widths=(8, 8, 8)))
        discriminator = Discriminator(DiscriminatorConfig(16, widths=(8, 8, 8)))
    generator.w_avg.normal_(std=0.1, generator=rng)
    checkpoint.save(folder / "face.safetensors", generator)
    checkpoint.save(folder / "d.safetensors", discriminator)


def arguments(training: str, world: Path, run: Path, **changes: Any) -> list[str]:
    """The command line of a training of some seconds; {"log_every": 2} is --log-every 2."""
    options: dict[str, Any] = {"data": world / "faces", "output": run, "log_every": 1}
    options |= {"save_every": 3, "tracker": "none"}
    if training == "encoder":
        options |= {"face_generator": world / "face.safetensors", "steps": 12, "batch_size": 4}
        options |= {"backbone": "mobilenetv3_small_050", "width": 16, "depth": 1, "warmup": 2}
        options |= {"discriminator": world / "d.safetensors", "loss.adversarial": 0.1}
    else:
        options |= {"images": 48, "batch_size": 4, "resolution": 16, "latent_dim": 8}
        options |= {"mapping_layers": 2, "channel_base": 64, "channel_max": 8, "augment": "ada"}
        options |= {"discriminator": "residual", "reconstruction_weight": 1, "warmup_images": 12}
        options |= {"perceptual_weight": 0}
    pairs = [(f"--{k.replace('_', '-')}", str(v)) for k, v in (options | changes).items()]
    words = [word for pair in pairs for word in pair]
    return words if training == "encoder" else ["stylegan2", *words]


def in_silence(training: str, argv: Sequence[str]) -> None:
    """The command on the CPU with one thread, in a process of its own."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.exit(MAINS[training](argv))


def start(training: str, argv: Sequence[str]) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*LIBRARIES, "generators.train"])
    process = context.Process(target=in_silence, args=(training, argv))
    process.start()
    return process


def to_its_end(training: str, argv: Sequence[str]) -> float:
    """Seconds; RuntimeError where it fails."""
    begun, process = time.monotonic(), start(training, argv)
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"a training of the {training} ended with {process.exitcode}")
    return time.monotonic() - begun


def same(training: str, a: Path, b: Path) -> bool:
    """Metrics and weights of two run folders."""
    if (a / "metrics.jsonl").read_bytes() != (b / "metrics.jsonl").read_bytes():
        return False
    for name in ("encoder",) if training == "encoder" else ("generator", "discriminator"):
        one, two = (load_file(run / f"{name}.safetensors") for run in (a, b))
        if one.keys() != two.keys() or not all(torch.equal(one[key], two[key]) for key in one):
            return False
    return True


def run(config: Config) -> dict[str, Any]:
    rng, rows = random.Random(config.seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_world(folder)
        for training in MAINS:
            whole, first = folder / training, folder / f"{training}-first"
            to_its_end(training, arguments(training, folder, first))  # imports the libraries
            seconds = to_its_end(training, arguments(training, folder, whole))
            for i in track(range(config.moments), training, console=console):
                broken = folder / f"{training}-{i}"
                argv, moment = arguments(training, folder, broken), rng.random() * seconds
                process = start(training, argv)
                time.sleep(moment)
                process.kill()
                process.join()
                saved = sorted((broken / "checkpoints").glob("step-*"))
                to_its_end(training, argv)
                rows.append(
                    {
                        "training": training,
                        "killed_after_s": round(moment, 2),
                        "of_s": round(seconds, 2),
                        "last_checkpoint": saved[-1].stem if saved else None,
                        "equal": same(training, whole, broken),
                    }
                )
    unequal = [row for row in rows if not row["equal"]]
    console.print(f"{len(rows) - len(unequal)} of {len(rows)} ended with the same bits")
    return {"rows": rows, "equal": len(rows) - len(unequal), "failed": len(unequal)}


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark("kill", Config, run, {"moments": 2}, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
