"""Commands of the project as processes: on the CPU, killed half-way, or two together."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
LAUNCH += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def code_of(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """The exit code of a command, in this process."""
    try:
        return main(arguments)
    except SystemExit as caught:  # of a wrong option
        assert isinstance(caught.code, int)
        return caught.code


def environment() -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run(arguments: list[str], cwd: Path, launcher: list[str] | None = None) -> str:
    """Runs `python ARGUMENTS` to its successful end; what it said."""
    done = subprocess.run(
        [*(launcher or [sys.executable]), *arguments],
        env=environment(), cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def run_two(arguments: list[str], cwd: Path) -> str:
    """The same as two processes of one training."""
    output = run(arguments, cwd, LAUNCH)
    assert "2 process(es)" in output
    return output
