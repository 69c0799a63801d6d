"""The one way into every command: options, sentences in place of tracebacks, exit codes, signals.

    def main(argv: Sequence[str] | None = None) -> int:
        return command(Config, run, __doc__, argv)

Exit codes: 0 or what `run` returns (1: a part failed); 1 for a loss that is not finite; 2 where
nothing could be done, with a sentence that says why; 130 after Ctrl-C, 143 after SIGTERM, 141
where the reader of a pipe has gone. A traceback is a fault of this project.
"""

import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console

if TYPE_CHECKING:  # half a second that `--help` need not wait for
    import torch

console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


class NonFiniteLoss(RuntimeError):
    """Training stopped because a loss was NaN or infinite; the message names the batch's file."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception in the main thread: what clears up after Ctrl-C does so here too."""


def printable(text: object, limit: int = 200) -> str:
    """Text from a file, a path or another library as one line of at most `limit` characters.

    What could steer a terminal is written as an escape (\\x1b), what is too long loses its middle.
    """
    whole = str(text)
    if len(whole) > limit:
        head = limit * 2 // 3
        whole = f"{whole[:head]}…{whole[-(limit - head - 1) :]}"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in whole
    )


def command(
    config: Any,  # a dataclass of options, or a union of such
    run: Callable[[Any], int | None],
    description: str | None,
    argv: Sequence[str] | None = None,  # None: the command line's
) -> int:
    """Reads the options, runs, and returns the exit code; errors of use become a sentence."""

    def terminate(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        return run(tyro.cli(config, args=argv, description=description)) or 0
    except NonFiniteLoss as error:
        return _say(str(error), 1)
    except ValueError as error:
        return _say(str(error), 2)
    except Terminated as error:
        return _say(str(error) or "Stopped by SIGTERM.", 143)
    except KeyboardInterrupt as error:
        return _say(str(error) or "Stopped by Ctrl-C.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
        return 141
    except OSError as error:
        if error.errno is None:
            raise
        return _say(sentence_of(error), 2)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _say("There is not enough memory; lower the batch size or the resolution.", 2)
    finally:
        signal.signal(signal.SIGTERM, before)


def sentence_of(error: OSError) -> str:
    """What failed, where and why: "Cannot read or write a/b.png: No space left on device."."""
    where = f" {printable(error.filename)}" if error.filename else ""
    return f"Cannot read or write{where}: {printable(error.strerror or error)}."


@contextmanager
def worker_processes(
    count: int,
    method: Literal["spawn", "forkserver"],  # of starting them
    begin: Callable[[], None] | None = None,  # the first act of each
) -> Iterator[Callable[..., Future]]:
    """submit(function, *arguments) of a pool; no process is left, however the block is left."""
    resource_tracker.ensure_running()  # which would let Ctrl-C through again, below
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, multiprocessing.get_context(method), begin)

    def submit(*call: Any) -> Future:
        """A process that starts here inherits that Ctrl-C is for its parent to answer."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.submit(*call)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    try:
        yield submit
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def parse_device(name: str) -> "torch.device":
    """The device of that name, on which something fits; "auto" is the fastest one here.

    ValueError for a name of none, and for one that is not in this machine.
    """
    import torch

    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
            return device
        except (RuntimeError, AssertionError):
            pass
    raise ValueError(
        f"The device {printable(name)} cannot be used here; give cpu, cuda, cuda:1, mps or auto."
    )


def _say(sentence: str, code: int) -> int:
    """Prints the sentence, whose foreign parts may still hold what steers a terminal."""
    rank = os.environ.get("RANK", "0")
    prefix = f"Process {rank}: " if rank != "0" else ""
    for line in sentence.splitlines() or [""]:
        console.print(prefix + printable(line, limit=2000))
    return code


def _out_of_memory(error: BaseException) -> bool:
    """Also torch's: on a GPU a class of its own, on the CPU a RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )
