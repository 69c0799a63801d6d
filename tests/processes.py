"""Commands of the project as processes: on the CPU, killed half-way, or two together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
LAUNCH += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def environment() -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run(arguments: list[str], cwd: Path, launcher: list[str] | None = None) -> str:
    """Runs `python ARGUMENTS` to its successful end; its output."""
    done = subprocess.run(
        [*(launcher or [sys.executable]), *arguments],
        env=environment(), cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_two(arguments: list[str], cwd: Path) -> str:
    """The same as two processes of one training."""
    output = run(arguments, cwd, LAUNCH)
    assert "2 process(es)" in output
    return output


def kill_9(arguments: list[str], cwd: Path, run_folder: Path) -> None:
    """Starts `python ARGUMENTS` and kills it once it has saved its first checkpoint."""
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment(), cwd=cwd, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(run_folder.glob("checkpoints/step-*.pt")) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
