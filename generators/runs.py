"""The run folder of a training: configuration, metrics, samples, checkpoints that survive kill -9.

    RUN/config.json                              what was asked for
    RUN/metrics.jsonl                            one line per logged step
    RUN/samples/step-00001000.png                sample grids
    RUN/checkpoints/step-00001000.safetensors    the last two: tensors and plain values
    RUN/tensorboard/                             what Accelerate's tracker writes

Resume is the same command. It is exact because nothing random is carried over: every draw comes
from a generator seeded by (seed, step, stream), and the losses logged after the last checkpoint are
dropped and computed again.
"""

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from generators.command import console, printable
from generators.disk import held, write_atomically

KEEP = 2  # checkpoints
FORMAT = "training 2"  # of a checkpoint
M = TypeVar("M", bound=nn.Module)


def record(
    file: Path, config: Mapping[str, Any], changeable: tuple[str, ...] = (), begun: bool = True
) -> None:
    """Writes the configuration of what is in the file's folder; what is `begun` goes on with its
    own. ValueError when that differs in more than the `changeable` fields."""
    new = json.loads(json.dumps(config, default=str))
    if begun and file.exists():
        old, now = flat(read_config(file)), flat(new)
        fields = (old.keys() | now.keys()) - set(changeable)
        changed = sorted(k for k in fields if old.get(k) != now.get(k))
        if changed:
            raise ValueError(
                f"{file.parent} holds a run with another {', '.join(changed)}; "
                "repeat its command to go on with it, or give another run folder"
            )
    write_atomically(file, lambda p: p.write_text(json.dumps(new, indent=2) + "\n"))


def read_config(file: Path) -> dict[str, Any]:
    """ValueError where the file is not what `record` wrote."""
    try:
        config = json.loads(file.read_text()) if file.is_file() else None
    except (ValueError, RecursionError):  # of JSON and of UTF-8
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not the configuration of a run; give another run folder.")
    return config


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    result: dict[str, Any] = {}
    for key, value in config.items():
        nested = (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
        result |= nested
    return result


RANGES: dict[str, Callable[[float], bool]] = {
    "of 1 or more": lambda x: x >= 1,
    "of 0 or more": lambda x: x >= 0,
    "above 0": lambda x: x > 0,
    "from 0 to 1": lambda x: 0 <= x <= 1,
}


def check_numbers(config: Any, ranges: Mapping[str, Sequence[str]]) -> None:
    """ValueError unless all numbers of a dataclass of options, nested ones too, are finite, and
    those named for a range of RANGES lie in it. None, an option not given, does."""
    for name, value in flat(dataclasses.asdict(config)).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} is {value}; give a finite number.")
    for text, names in ranges.items():
        for name in names:
            value = getattr(config, name)
            if value is not None and not RANGES[text](value):
                raise ValueError(f"--{name.replace('_', '-')} is {value}; give a number {text}.")


class RunFolder:
    """Owns one run folder. Only the main process should write to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"

    @contextmanager
    def opened(self, config: Mapping[str, Any], changeable: tuple[str, ...]) -> Iterator[None]:
        """Makes the folders and records the configuration; the folder is this process's own until
        the end, whatever that is.

        ValueError when another training is at work in it, or when it holds a run that differs in
        more than the `changeable` fields.
        """
        with held(self.path):
            for folder in (self.samples, self.checkpoints):
                folder.mkdir(exist_ok=True)
            for folder in (self.path, self.samples, self.checkpoints):
                for leftover in folder.glob(f".{'[0-9a-f]' * 16}.*.tmp"):
                    leftover.unlink()  # of a process that was killed
            if any(self.checkpoints.glob("step-*.pt")):
                raise ValueError(
                    f"{self.path} holds a run of an older version of this project; go on with that "
                    "version, or give another run folder."
                )
            record(self.path / "config.json", config, changeable, bool(self.saved()))
            yield

    # -------------------------------------------------------------------- checkpoints

    def saved(self) -> list[Path]:
        """The checkpoints, the newest last."""
        return sorted(self.checkpoints.glob("step-*.safetensors"))

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Writes checkpoints/step-XXXXXXXX.safetensors whole or not at all, and drops all but the
        newest KEEP; what is beyond `step` could not be read, or is computed anew."""
        path = self.checkpoints / f"step-{step:08d}.safetensors"
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(values)
        metadata = {"format": FORMAT, "values": text, "checksum": checksum(stored, text)}
        write_atomically(path, lambda p: save_file(stored, p, metadata))
        saved = self.saved()
        until = saved.index(path) + 1
        for old in saved[: max(until - KEEP, 0)] + saved[until:]:
            old.unlink()

    def resume(self, load: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> str:
        """Gives the newest checkpoint to `load`; if that cannot be, the one before. Returns why.

        ValueError if there are checkpoints and none can be loaded.
        """
        reasons = []
        for path in reversed(self.saved()):
            try:
                load(*read_checkpoint(path))
            except ValueError as error:
                reasons.append(f"{path.name} cannot be used: {printable(error)}.")
                continue
            return f"{' '.join(reasons)} Going on from {path.name}.\n" if reasons else ""
        if reasons:
            raise ValueError(
                f"{self.checkpoints} has no checkpoint to go on from. {' '.join(reasons)} "
                "Put back a copy, or begin anew in another run folder."
            )
        return ""

    # ------------------------------------------------------------------------ metrics

    def rewind_metrics(self, step: int) -> None:
        """Drops the lines logged after `step`, and a last one that was cut.

        ValueError where the file is not what `log` wrote.
        """
        if not self.metrics.exists():
            return
        if not self.metrics.is_file():
            raise ValueError(f"{self.metrics} is not a file; move it away.")
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        kept = []
        for i, line in enumerate(lines):
            try:
                if int(json.loads(line)["step"]) <= step:
                    kept.append(line.rstrip() + b"\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                if i + 1 < len(lines):
                    raise ValueError(
                        f"Line {i + 1} of {self.metrics} is not of a training; move the file away."
                    ) from None
        if kept != lines:
            write_atomically(self.metrics, lambda p: p.write_bytes(b"".join(kept)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl."""
        try:
            with open(self.metrics, "a") as file:
                file.write(json.dumps({"step": step} | dict(values)) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.metrics)) from error

    def save_sheet(self, step: int, sheet: Image.Image) -> None:
        """samples/step-XXXXXXXX.png"""
        path = self.samples / f"step-{step:08d}.png"
        write_atomically(path, lambda p: sheet.save(p, "PNG"))

    def save_bad_batch(self, step: int, rank: int, tensors: dict[str, Tensor]) -> Path:
        """Keeps what a non-finite loss was computed from; returns the file."""
        path = self.path / f"non-finite-step-{step:08d}-rank-{rank}.safetensors"
        stored = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        write_atomically(path, lambda p: save_file(stored, p))
        return path


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `RunFolder.save` was given, and nothing else: no code is run. ValueError says why not,
    as the end of a sentence."""
    if not path.is_file():
        raise ValueError("it is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError("it is of another version or another program")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        values = json.loads(metadata["values"])
    except (SafetensorError, OSError, KeyError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"it is damaged ({error})") from error
    if metadata.get("checksum") != checksum(tensors, metadata["values"]):
        raise ValueError("it is damaged (its checksum is another)")
    if not isinstance(values, dict):
        raise ValueError("it holds no step")
    return tensors, values


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Of the bytes of contiguous tensors on the CPU, and of the text."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


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


def frozen(module: M) -> M:
    """The module in evaluation mode, without gradients for its weights."""
    return module.eval().requires_grad_(False)


@contextmanager
def progress(
    total: int | None, start: int, enabled: bool, unit: str = "steps"
) -> Iterator[Any]:
    """A rich progress bar; yields advance(step, **values): rate, ETA and the newest values."""
    if not enabled:
        yield lambda step, **values: None
        return
    bars = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
    texts = (TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*bars, *texts, console=console) as bar:
        task = bar.add_task("", total=total, completed=start)

        def advance(step: int, **values: float) -> None:
            bar.update(task, completed=step)
            if values:
                newest = " ".join(f"{name} {value:.3g}" for name, value in values.items())
                rate = bar.tasks[0].speed
                bar.update(task, description=(f"{rate:.1f}/s " if rate else "") + newest)

        yield advance
