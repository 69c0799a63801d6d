"""The one training loop: steps, and once in a while log, sample, score, save; stop and resume.

    class Mine(Training): …                # its networks, one step, what is shown of it
    run(Mine(config, accelerator))         # or goes on where the run folder stands

Ctrl-C and SIGTERM let the step under way end, write a checkpoint, and the same command goes on. Of
several processes all stop after the same step.
"""

import dataclasses
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from PIL import Image
from rich.pretty import pprint
from torch import Tensor, nn

from generators import checkpoint
from generators.command import NonFiniteLoss, Terminated, console
from generators.runs import RunFolder, check_numbers, progress
from generators.state import LossMeter, TrainingState


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options of every training."""

    output: Path  # run folder; the same command goes on with what it holds
    batch_size: int  # pictures of one process in one forward pass
    seed: int = 0  # of everything that is drawn
    data_licence: str = "not stated"  # kept in the weights' metadata
    log_every: int = 25  # steps between lines of metrics.jsonl
    sample_every: int = 250  # steps between sample grids
    eval_every: int = 1_000  # steps between held-out scores
    save_every: int = 250  # steps between checkpoints
    tracker: Literal["tensorboard", "none"] = "tensorboard"  # beside metrics.jsonl
    threads: int = 0  # of the CPU, in each process; 0: torch's own choice

    def __post_init__(self) -> None:
        every = ("batch_size", "log_every", "sample_every", "eval_every", "save_every")
        check_numbers(self, {"of 1 or more": every, "of 0 or more": ("threads",)})
        above = (self.output.absolute(), *self.output.absolute().parents)
        there = next(path for path in above if os.path.lexists(path))
        if not there.is_dir():
            raise ValueError(f"{there} is not a folder; give another --output.")


class Training:
    """What a kind of training brings to the loop. A subclass sets these, and says the rest below.

    The main process alone is asked for scores and sheets.
    """

    config: RunConfig
    accelerator: Accelerator
    state: TrainingState
    steps: int  # in all
    pictures: int  # real ones of a step, over all processes
    outputs: dict[str, nn.Module]  # written at the end under these names; averages also as best
    changeable: ClassVar[tuple[str, ...]] = (  # fields that a run may go on with changed
        *("output", "log_every", "sample_every", "eval_every", "save_every", "tracker"),
        *("data_licence", "threads"),
    )
    best_of: ClassVar[str]  # the score whose lowest value is the best
    shown: ClassVar[tuple[str, ...]]  # losses and scores beside the progress bar

    def step(self, step: int, meter: LossMeter) -> None:
        """Lowers the losses once, moves the averages, and adds the losses to the meter."""
        raise NotImplementedError

    def batch(self, step: int) -> dict[str, Tensor]:
        """What this process looks at in a step."""
        raise NotImplementedError

    def seek(self, step: int) -> None:
        """Puts streamed data where `step` begins; all other draws are functions of the step."""

    def logged(self) -> dict[str, float]:
        """What stands beside the losses in metrics.jsonl."""
        return {"images": self.state.step * self.pictures}

    def evaluate(self) -> dict[str, float]:
        """Scores on held-out pictures; none where there are no such pictures."""
        return {}

    def sheet(self) -> Image.Image:
        raise NotImplementedError

    def provenance(self) -> dict[str, str]:
        """Where the weights come from: data, licence, …"""
        return {}

    def at_the_end(self) -> None:
        """When all outputs are written."""


def make_accelerator(config: RunConfig, cpu: bool = False) -> Accelerator:
    """cpu: also where there is a GPU. Sets the threads, too."""
    if config.threads:
        torch.set_num_threads(config.threads)
    return Accelerator(
        cpu=cpu,
        log_with=config.tracker if config.tracker != "none" else None,
        project_dir=str(config.output),
        kwargs_handlers=[GradScalerKwargs(init_scale=2**10)],
    )


def run(training: Training) -> dict[str, float]:
    """Runs or resumes a training to its last step; returns the last held-out scores.

    Raises ValueError where the run folder cannot be used, NonFiniteLoss, with the batch saved, when
    a loss is not finite, and KeyboardInterrupt or Terminated after a signal.
    """
    config, state, accelerator = training.config, training.state, training.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    main, folder, meter = rank == 0, RunFolder(config.output), LossMeter(accelerator.device)

    def load(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        meter.load(tensors, rank)
        state.load(tensors, values)

    with needing_all(world), tracker_errors(), ExitStack() as stack:
        # ---- the run folder: ours alone, and of this configuration
        if main:
            values = dataclasses.asdict(config)
            stack.enter_context(folder.opened(values, training.changeable))
        accelerator.wait_for_everyone()

        # ---- resume: networks, optimisers, step, losses not logged yet; nothing random
        said = folder.resume(load)
        training.seek(state.step)
        if main:
            folder.rewind_metrics(state.step)
            pprint(values, console=console, expand_all=False)
            console.print(
                f"{said}{accelerator.device}, {world} process(es), {accelerator.mixed_precision} "
                f"precision; starting at step {state.step}"
            )
        if config.tracker != "none":
            options = {"tensorboard": {"purge_step": state.step}}  # drops what comes anew
            accelerator.init_trackers("tensorboard", init_kwargs=options)

        size, total = training.pictures, training.steps
        every = (config.log_every, config.sample_every, config.eval_every, config.save_every)
        bar = progress(total * size, state.step * size, main, "pictures")
        with bar as advance, Signals(world) as signals:
            while state.step < total:
                training.step(state.step, meter)
                state.step += 1

                # ---- once in a while: read the losses (the only sync), score, sample, log, save
                last = state.step == total
                to_log, to_sample, to_score, to_save = (last or state.step % n == 0 for n in every)
                stop = signals.received_by_any(state.step)
                to_read = to_log or to_score or to_save
                if to_read or stop:  # what is not finite gets into no checkpoint
                    stop_at_non_finite(training, meter, folder)
                means = meter.read(world) if to_read else {}
                if to_score and main:
                    means |= score(training)
                if to_sample and main:
                    folder.save_sheet(state.step, training.sheet())
                if to_read and main:
                    folder.log(state.step, training.logged() | means)
                    accelerator.log(means, state.step)
                if to_save or stop:
                    tensors = meter.tensors(world)
                    if main:
                        folder.save(state.step, state.tensors() | tensors, state.values())
                if stop:
                    raise stop
                advance(state.step * size, **{k: means[k] for k in training.shown if k in means})

        # ---- the end: files that stand alone
        if main:
            for name in training.outputs:
                write_weights(training, name, training.outputs[name])
            training.at_the_end()
        accelerator.end_training()
    return state.scores


def stop_at_non_finite(training: Training, meter: LossMeter, folder: RunFolder) -> None:
    """NonFiniteLoss, in every process, if a loss since the last look was not finite in any."""
    rank, world = training.accelerator.process_index, training.accelerator.num_processes
    bad = meter.bad(world)
    if bad is None:
        return
    training.seek(bad)
    file = folder.save_bad_batch(bad, rank, training.batch(bad))
    raise NonFiniteLoss(
        f"A loss is not finite at step {bad}; its batch is in {file}. Lower a learning rate or a "
        "loss weight, and begin anew in another run folder."
    )


def score(training: Training) -> dict[str, float]:
    """Scores the averages; the best ones so far are written, the first as "best"."""
    state, scores = training.state, training.evaluate()
    state.scores = scores
    if scores and scores[training.best_of] < state.best:
        state.best = scores[training.best_of]
        averages = {name: n for name, n in training.outputs.items() if name in state.averages}
        for i, (name, network) in enumerate(averages.items()):
            write_weights(training, f"best_{name}" if i else "best", network)
    return scores


def write_weights(training: Training, name: str, network: nn.Module) -> None:
    """OUTPUT/NAME.safetensors, with where it comes from."""
    state, config = training.state, training.config
    provenance = {
        "licence": config.data_licence,
        "steps": str(state.step),
        "images_seen": str(state.step * training.pictures),
        **{name: f"{value:.5g}" for name, value in state.scores.items()},
    }
    path = config.output / f"{name}.safetensors"
    checkpoint.save(path, network, provenance=provenance | training.provenance())
    console.print(f"written: {path}")


class Signals:
    """Within it, Ctrl-C and SIGTERM wait for the end of the step; a second Ctrl-C does not."""

    def __init__(self, world: int) -> None:
        self.world, self.number, self.since = world, 0, 0.0
        # a group of its own, on the CPU: asking it waits for no GPU
        self.group: Any = torch.distributed.new_group(backend="gloo") if world > 1 else None

    def __enter__(self) -> "Signals":
        ours = threading.current_thread() is threading.main_thread()  # Python asks for that
        numbers = (signal.SIGINT, signal.SIGTERM) if ours else ()
        self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.number and kind is None:  # after the last step
            signal.raise_signal(self.number)

    def note(self, number: int, _: Any) -> None:
        # launchers pass on what the terminal has sent already: not yet a second one
        if number == signal.SIGINT and self.number and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self.since = number, time.monotonic()
            with suppress(OSError):  # not by the console: it may be at work just now
                os.write(2, b"Stopping at the end of this step.\n")

    def received_by_any(self, step: int) -> KeyboardInterrupt | None:
        """What to raise after `step`, the same in all processes."""
        number = self.number
        if self.world > 1:
            largest = torch.tensor(number)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, self.group)
            number = int(largest)
        if not number:
            return None
        kind, name = (
            (Terminated, "SIGTERM") if number == signal.SIGTERM else (KeyboardInterrupt, "Ctrl-C")
        )
        return kind(f"Stopped by {name}; step {step} is saved, the same command goes on.")


@contextmanager
def needing_all(world: int) -> Iterator[None]:
    """What torch raises where another process has gone, as one sentence (ValueError)."""
    try:
        yield
    except RuntimeError as error:
        if world == 1 or not re.search("gloo|NCCL|peer|socket|TCPStore", str(error), re.I):
            raise
        raise ValueError(
            "Another process of this training has ended, so this one ends too; the same command "
            "goes on from the last checkpoint."
        ) from error


@contextmanager
def tracker_errors() -> Iterator[None]:
    """TensorBoard's thread keeps an OSError for its next caller: no need for a traceback, too."""
    before = threading.excepthook
    threading.excepthook = lambda x: None if isinstance(x.exc_value, OSError) else before(x)
    try:
        yield
    finally:
        threading.excepthook = before
