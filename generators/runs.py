"""The run folder of a training: configuration, metrics, samples, checkpoints that survive kill -9.

    RUN/config.json                     what was asked for
    RUN/metrics.jsonl                   one line per logged step
    RUN/samples/step-00001000.png       sample grids
    RUN/checkpoints/step-00001000.pt    the last two: tensors and plain values, weights_only=True
    RUN/tensorboard/                    what Accelerate's tracker writes

Resume is the same command. It is exact because nothing random is carried over: every draw comes
from a generator seeded by (seed, step, stream), and the losses logged after the last checkpoint are
dropped and computed again.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

KEEP = 2  # checkpoints
M = TypeVar("M", bound=nn.Module)


class NonFiniteLoss(RuntimeError):
    """Training stopped because a loss was NaN or infinite; the message names the batch's file."""


def write_atomically(path: Path, write: Any) -> None:
    """Calls write(temporary path) and renames: `path` is either the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's own: safetensors would leave 0600
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def record(
    file: Path, config: Mapping[str, Any], changeable: tuple[str, ...] = (), begun: bool = True
) -> None:
    """Writes the configuration of what is in the file's folder; what is `begun` goes on with its
    own. ValueError when that differs in more than the `changeable` fields."""
    new = json.loads(json.dumps(config, default=str))
    if begun and file.exists():
        old, now = flat(json.loads(file.read_text())), flat(new)
        fields = (old.keys() | now.keys()) - set(changeable)
        changed = sorted(k for k in fields if old.get(k) != now.get(k))
        if changed:
            raise ValueError(
                f"{file.parent} holds a run with another {', '.join(changed)}; "
                "repeat its command to go on with it, or give another run folder"
            )
    write_atomically(file, lambda p: p.write_text(json.dumps(new, indent=2) + "\n"))


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    result: dict[str, Any] = {}
    for key, value in config.items():
        nested = (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
        result |= nested
    return result


class RunFolder:
    """Owns one run folder. Only the main process should write to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"

    def prepare(self, config: Mapping[str, Any], changeable: tuple[str, ...] = ()) -> None:
        """Makes the folders and records the configuration.

        ValueError when it holds a run that differs in more than the `changeable` fields.
        """
        self.samples.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        for leftover in self.checkpoints.glob(".*.tmp"):
            leftover.unlink()
        record(self.path / "config.json", config, changeable, self.latest() is not None)

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        found = sorted(self.checkpoints.glob("step-*.pt"))
        return found[-1] if found else None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes checkpoints/step-XXXXXXXX.pt atomically and drops all but the newest KEEP."""
        write_atomically(
            self.checkpoints / f"step-{step:08d}.pt",
            lambda p: torch.save(state | {"step": step}, p),
        )
        for old in sorted(self.checkpoints.glob("step-*.pt"))[:-KEEP]:
            old.unlink()

    def resume(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The newest state (its "step" included), or None. Reads tensors and plain values only."""
        newest = self.latest()
        return (
            None if newest is None else torch.load(newest, map_location=device, weights_only=True)
        )

    def rewind_metrics(self, step: int) -> None:
        """Drops the lines logged after `step`, and a half-written last one."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        kept = []
        for line in file.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue
        write_atomically(file, lambda p: p.write_text("".join(kept)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | dict(values)) + "\n")

    def save_bad_batch(self, step: int, rank: int, tensors: dict[str, Tensor]) -> Path:
        """Keeps what a non-finite loss was computed from; returns the file."""
        from safetensors.torch import save_file

        path = self.path / f"non-finite-step-{step:08d}-rank-{rank}.safetensors"
        write_atomically(
            path,
            lambda p: save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, p),
        )
        return path


def seed_of(*parts: object) -> int:
    """A 63-bit seed that is a hash of the parts: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def step_generator(seed: int, step: int, stream: str) -> torch.Generator:
    """A CPU generator of one step and purpose. Draw the global batch, take your rank's rows."""
    return torch.Generator().manual_seed(seed_of(seed, step, stream))


def rows_of_rank(whole: Tensor, rank: int, world: int) -> Tensor:
    """The rank's equal share of a global batch (B_global, …) -> (B_global / world, …)."""
    share = len(whole) // world
    return whole[rank * share : (rank + 1) * share]


def average_gradients(module: nn.Module, world: int) -> None:
    """All-reduces the gradients to their mean over processes, in one message."""
    if world == 1:
        return
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    torch.distributed.all_reduce(flat)
    flat /= world
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * module, over parameters; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
    for mean, now in zip(average.buffers(), module.buffers(), strict=True):
        mean.copy_(now)


class LossMeter:
    """Means of scalar losses between two readings, kept on the device: reading is the only sync.

    It also remembers the first step with a non-finite value: its batch can be drawn again.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.bad_step = torch.full((), -1, device=device)

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        for name, scalar in values.items():
            value = scalar.detach().to(dtype)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
            fresh_bad = ~torch.isfinite(value) & (self.bad_step < 0)
            self.bad_step = torch.where(fresh_bad, step, self.bad_step)

    def read(self, world: int) -> tuple[dict[str, float], int | None]:
        """Means over steps and processes since the last reading, and the first bad step or None."""
        names = sorted(self.sums)
        if not names:
            return {}, None
        means = torch.stack([self.sums[name] / self.counts[name] for name in names])
        if world > 1:
            torch.distributed.all_reduce(means)
            means /= world
        bad = int(self.bad_step)
        self.sums, self.counts = {}, {}
        return dict(zip(names, means.tolist(), strict=True)), None if bad < 0 else bad


def frozen(module: M) -> M:
    """The module in evaluation mode, without gradients for its weights."""
    return module.eval().requires_grad_(False)


@contextmanager
def progress(total: int, start: int, enabled: bool, unit: str = "steps") -> Iterator[Any]:
    """A rich progress bar; yields advance(step, **values): rate, ETA and the newest values."""
    if not enabled:
        yield lambda step, **values: None
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}{task.fields[values]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("train", total=total, completed=start, rate="", values="")

        def advance(step: int, **values: float) -> None:
            bar.update(task, completed=step)
            speed = bar.tasks[0].speed
            if speed:
                bar.update(task, rate=f"{speed:.1f}/s ")
            if values:
                bar.update(task, values=" ".join(f"{k} {v:.3g}" for k, v in values.items()))

        yield advance
