"""Live: how many frames a second go from a camera's picture to its drawings, and how late they are.

    python benchmarks/live.py --output benchmarks/results/live.json
    python benchmarks/live.py --minutes 10 --backends onnxruntime --thread-counts 1 --faces 1
    python benchmarks/live.py --quick

The camera is a clip of 640 x 480 made from examples/ (benchmarks/clip.py: zoom, turn, pan, light,
noise), played as fast as it is drawn. A frame's time goes from its pixels in memory to its drawings
in bytes: track, crop, encode, smooth, synthesise; full searches for faces are among the frames, and
so in p95. *CPU ms* is what all threads of the process took per frame: it says, on a machine that
does other things as well, what a free one would do. *busy*: another process keeps one core at work.

With --minutes each row is also played for so long; *memory grows* is the resident memory of its
last quarter against its second, largest against median, and should be below 0.05.
Each row is measured in a process of its own. Ends with one JSON line.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from clip import Clip
from common import Benchmark, benchmark, first_line, in_processes, peak_memory_mb, percentiles, show
from PIL import Image
from rich.progress import track as bar

from encoder.pipeline import Translator
from encoder.video.track import Tracker
from generators.command import console
from generators.images import open_image, to_pil

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PICTURES = ("astronaut.jpg", "grace_hopper.jpg", "generated_1.png")
WARM_UP = 10  # frames
Backend = Literal["torch", "onnxruntime", "openvino"]
Shown = Literal["drawing", "both"]
QUICK: dict[str, Any] = {"seconds": 1.0, "thread_counts": (1,), "backends": ("torch",)}
QUICK |= {"faces": (1,), "shown": ("drawing",), "busy": (False,)}


@dataclass(frozen=True)
class Config(Benchmark):
    backends: tuple[Backend, ...] = ("torch", "onnxruntime", "openvino")
    thread_counts: tuple[int, ...] = (1, 2)
    faces: tuple[int, ...] = (1, 3)  # 1 to 3
    shown: tuple[Shown, ...] = ("drawing", "both")  # both: the reconstruction as well
    busy: tuple[bool, ...] = (False, True)  # one core is kept at work by another process
    seconds: float = 10.0  # of the clip, at 30 frames a second
    minutes: float = 0.0  # that each row is played for, to watch its memory

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(self.faces) <= {1, 2, 3} or min(self.thread_counts) < 1:
            raise ValueError("--faces are 1 to 3, --thread-counts 1 or more.")
        if not 0.5 <= self.seconds <= 600 or not 0 <= self.minutes <= 1000:
            raise ValueError("--seconds is 0.5 to 600, --minutes 0 or more.")


@dataclass(frozen=True)
class Job:
    backend: Backend
    threads: int
    faces: int
    shown: Shown
    busy: bool


def write_clip(faces: int, seconds: float, file: Path) -> None:
    """The clip's pixels (N, 480, 640, 3), to be read by every row."""
    pictures = [open_image(EXAMPLES / name) for name in PICTURES[:faces]]
    clip = Clip(pictures, (640, 480), seconds)
    np.save(file, np.stack([np.asarray(frame) for _, frame in clip.frames()]))


def draw(
    translator: Translator, tracker: Tracker, pixels: np.ndarray, moment: float, both: bool
) -> list[Image.Image]:
    """Drawings, and with `both` reconstructions, of the faces of one frame."""
    picture = Image.fromarray(pixels)
    tracks = [track for track in tracker(picture, moment) if not track.lost]
    if not tracks:
        return []
    crops = [translator.crop(picture, track.face) for track in tracks]
    ws = translator.encode(translator.prepare(crops))
    pairs = zip(tracks, ws, strict=True)
    ws = torch.stack([tracker.smooth_ws(track, w, moment) for track, w in pairs])
    anime, reconstruction = translator.synthesise(ws, both)
    return [to_pil(image) for images in (anime, reconstruction) if images is not None
            for image in images]  # fmt: skip


def measure(job: Job, file: Path, minutes: float) -> dict[str, Any]:
    """The figures of one row, in this process."""
    torch.set_num_threads(job.threads)
    translator = Translator.bundled(backend=job.backend, threads=job.threads)
    assert translator.aligner is not None
    tracker = Tracker(translator.aligner, most=1 if job.faces == 1 else None)
    frames = np.load(file, mmap_mode="r")
    both, drawn, seconds = job.shown == "both", 0, []
    turns = itertools.count()

    def next_frame() -> int:
        turn = next(turns)
        return len(draw(translator, tracker, frames[turn % len(frames)], turn / 30, both))

    for _ in range(WARM_UP):
        next_frame()
    cpu = time.process_time()
    for _ in range(len(frames)):
        start = time.perf_counter()
        drawn += next_frame()
        seconds.append(time.perf_counter() - start)
    cpu = time.process_time() - cpu
    figures = {
        "frames_per_second": round(len(seconds) / sum(seconds), 1),
        **percentiles(seconds),
        "cpu_ms": round(1000 * cpu / len(seconds), 1),
        "pictures_per_frame": round(drawn / len(seconds), 2),
        "peak_memory_mb": peak_memory_mb(),
    }
    if minutes:
        figures |= memory(next_frame, minutes)
    return figures


def memory(next_frame: Any, minutes: float) -> dict[str, Any]:
    """Resident memory while it plays, in MB, ten times a minute."""
    start, samples, count = time.perf_counter(), [], 0
    while (passed := time.perf_counter() - start) < 60 * minutes:
        next_frame()
        count += 1
        if passed >= 6 * len(samples):
            samples.append(resident_mb())
    quarter = max(1, len(samples) // 4)
    second, last = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    grown = max(last) / statistics.median(second) - 1
    return {"minutes": minutes, "frames": count, "resident_mb": [samples[0], samples[-1]],
            "memory_grows": round(grown, 4)}  # fmt: skip


def resident_mb() -> float:
    """Of this process now; where the system does not say it, the peak so far."""
    file = Path("/proc/self/statm")
    if not file.is_file():
        return peak_memory_mb()
    return round(int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


@contextlib.contextmanager
def core_at_work(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def row_of(job: Job, file: Path, minutes: float) -> dict[str, Any]:
    """What was asked and the figures, or the `reason` why there are none."""
    try:
        with core_at_work(job.busy):
            [figures] = in_processes(measure, job, file, minutes)
    except (RuntimeError, ValueError) as error:
        figures = {"reason": first_line(error)}
    return asdict(job) | figures


def run(config: Config) -> dict[str, Any]:
    asked = (config.backends, config.thread_counts, config.faces, config.shown, config.busy)
    jobs = [Job(*values) for values in itertools.product(*asked)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clips = {faces: Path(folder, f"{faces}.npy") for faces in config.faces}
        for faces, file in clips.items():
            write_clip(faces, config.seconds, file)
        for job in bar(jobs, "rows", console=console):
            rows.append(row_of(job, clips[job.faces], config.minutes))
            console.print(str(rows[-1]))
    names = list(dict.fromkeys(name for row in rows for name in row if name != "resident_mb"))
    show([{name: row.get(name, "–") for name in names} for row in rows])
    return {"size": [640, 480], "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark("live", Config, run, QUICK, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
