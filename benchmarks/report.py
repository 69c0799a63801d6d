"""What every benchmark says of itself: the machine, the command without local paths, one JSON line.

report = about("quality", sys.argv[1:]) | {"results": …}
finish(report, config.output)
"""

import json
import os
import platform
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


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
