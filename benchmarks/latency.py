"""How long a photo takes on its way to anime: align, encode, synthesise, and all of it at once.

    python benchmarks/latency.py --threads 1 --output benchmarks/results/latency_cpu.json
    python benchmarks/latency.py --device cuda --dtype fp16 --resolutions 64 256
    python benchmarks/latency.py --backends torch onnxruntime openvino --variants --busy 2
    python benchmarks/latency.py --styles 3 --variants --backends torch onnxruntime --stages
    python benchmarks/latency.py --quick                                  # under a minute

Stages: *align* (MTCNN and the FFHQ crop, one picture a call), *encode*, *face* and *anime* (one
synthesis each), *both* (reconstruction and anime, their early blocks computed once), *end to end*
(pictures in memory to anime: align, crop, encode, synthesise). Each call of *align* and *end to
end* takes the next pictures, so that their p95 is over pictures too.

Variants: *contiguous* and *channels_last* are the layout of the convolutions' weights; the networks
make their activations channels_last themselves. *compiled* is channels_last under torch.compile, in
one graph; it needs a C++ compiler. Its second call must equal eager's (TOLERANCE); where it does
not, or nothing compiles, the row says so and has no times.

Backends (`encoder.engines`) of a stage run in turn in one process, so that whatever else the
machine does hits all of them; CPU time is given too, of all threads. `--busy 2` starts two
processes that do nothing but take processor time, as the other programs of a laptop do.

`--styles 3` compares drawing in 1, 2, 3 styles from one pass of the early blocks (*styles*) with as
many syntheses one after the other (*passes*), in turn; speed does not depend on a style's weights.

At the resolution of the face generator its trained networks are used, at others random ones of the
same family: speed does not depend on the weights. Each row is measured in a process of its own.
Ends with one JSON line. Shape letters: B batch, L layers of w+, D dimension of w, R resolution.
"""

import copy
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
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
from PIL import Image
from rich.progress import track

from encoder.align import Aligner
from encoder.engines import Backend, choose
from encoder.model import Encoder
from encoder.pipeline import Translator
from generators.checkpoint import load, resolve
from generators.command import console
from generators.images import find_images, open_image
from generators.stylegan2 import Generator
from generators.tails import load_style
from generators.threads import use_threads

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-1, "fp16": 1e-2}  # of compiled against eager; values to ±1
STAGES = ("encode", "face", "anime", "both", "end to end")  # after align
OF_BACKENDS = ("align", "encode", "anime", "both", "end to end")
Variant = Literal["contiguous", "channels_last", "compiled"]
QUICK: dict[str, Any] = {"resolutions": (64,), "batch_sizes": (1,), "repeats": 5}
QUICK["variants"] = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Config(Benchmark):
    resolutions: tuple[int, ...] = (64, 128, 256, 512, 1024)  # R, from 16 up
    batch_sizes: tuple[int, ...] = (1, 8)
    variants: tuple[Variant, ...] = ("contiguous", "channels_last", "compiled")
    backends: tuple[Backend, ...] = ()  # rows by backend, in fp32 on a CPU
    stages: tuple[str, ...] = OF_BACKENDS  # of the backends
    styles: int = 0  # from one pass: rows of 1, 2, … of them, by backend (without any: torch)
    busy: int = 0  # processes beside, that take processor time
    device: str = "cpu"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # alignment stays fp32
    threads: int = 0  # of the CPU; 0: what fits the work, as in infer.py
    repeats: int = 20  # timed calls of each row, after two of warm-up
    pictures: Path = EXAMPLES  # photos of faces; those without one are left out
    face_generator: str = "face128"  # with the next two: the trained networks
    anime_generator: str = "auto"
    encoder: str = "auto"
    channel_base: int | None = None  # of the random generators; None: the face generator's
    channel_max: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.styles < 0:
            raise ValueError("styles must be 0 or more")
        if min(self.batch_sizes) < 1:
            raise ValueError("batch sizes must be at least 1")
        if min(self.resolutions) < 16:
            raise ValueError("resolutions must be 16 or more: anime begins at the block of 16")
        for name in (self.face_generator, self.anime_generator, self.encoder):
            resolve(name)
        for backend in self.backends:
            choose(backend, torch.device(self.device), DTYPES[self.dtype])
        if unknown := set(self.stages) - set(OF_BACKENDS):
            raise ValueError(f"there is no stage {unknown}; choose from {', '.join(OF_BACKENDS)}")


@dataclass(frozen=True)
class Job:
    """What a row is about."""

    stage: str
    resolution: int
    batch_size: int
    variant: str


def jobs(config: Config) -> Iterator[Job]:
    if config.variants:
        yield Job("align", config.resolutions[0], 1, "eager")
    for r, b in itertools.product(config.resolutions, config.batch_sizes):
        for stage, variant in itertools.product(STAGES, config.variants):
            yield Job(stage, r, b, variant)


# ----------------------------------------------------------------- what is measured


def pictures_with_faces(folder: Path, aligner: Aligner) -> list[Image.Image]:
    pictures = [open_image(file) for file, _ in find_images(folder)]
    found = [picture for picture in pictures if aligner.detect(picture)]
    if not found:
        raise ValueError(f"there is no face in {folder}; give photos of faces as --pictures")
    return found


def load_networks(config: Config, resolution: int) -> tuple[Generator, Generator, Encoder, str]:
    """Face, anime, encoder, and "trained" or "random weights"."""
    face: Generator = load(resolve(config.face_generator), Generator)
    encoder: Encoder = load(resolve(config.encoder), Encoder)
    if resolution == face.resolution:
        return face, load_style(config.anime_generator, face), encoder, "trained"
    torch.manual_seed(0)
    shape = resized(face.config, resolution, config.channel_base, config.channel_max)
    face, anime = Generator(shape), Generator(shape)
    looked = replace(encoder.config, resolution=resolution, num_ws=face.num_ws)
    return face, anime, Encoder(looked), "random weights"


def network_work(translator: Translator, job: Job) -> Callable[[int], Sequence[torch.Tensor]]:
    """The i-th call of a stage that begins with tensors: always the same random ones."""
    rng, face = torch.Generator().manual_seed(0), translator.face
    side = (job.batch_size, 3, translator.crop_size, translator.crop_size)
    layout = torch.contiguous_format if job.variant == "contiguous" else torch.channels_last
    images = (2 * torch.rand(side, generator=rng) - 1).to(translator.device, memory_format=layout)
    spread = torch.randn(job.batch_size, face.num_ws, face.w_dim, generator=rng)
    ws = face.w_avg + 0.5 * spread.to(translator.device)  # (B, L, D)

    @torch.inference_mode()
    def reconstruct() -> torch.Tensor:
        return translator.synthesis.face(ws.to(translator.dtype))

    calls: dict[str, Callable[[], Sequence[torch.Tensor]]] = {
        "encode": lambda: [translator.encode(images)],
        "face": lambda: [reconstruct()],
        "anime": lambda: translator.synthesise(ws)[:1],
        "both": lambda: [x for x in translator.synthesise(ws, True) if x is not None],
    }
    call = calls[job.stage]
    return lambda i: call()


def picture_work(
    pictures: list[Image.Image], aligner: Aligner, size: int, batch_size: int
) -> Callable[[int], list[Image.Image]]:
    """The i-th call aligns the next `batch_size` pictures: crops of size x size."""

    def call(i: int) -> list[Image.Image]:
        turns = range(i * batch_size, (i + 1) * batch_size)
        batch = [pictures[turn % len(pictures)] for turn in turns]
        return [aligner.crop(picture, aligner.detect(picture)[0], size) for picture in batch]

    return call


def compile_stage(translator: Translator, stage: str) -> None:
    """In place, what a stage calls."""
    if stage in ("encode", "end to end"):
        translator.encoder.compile(fullgraph=True)
    if stage == "face":
        translator.synthesis.face.compile(fullgraph=True)
    elif stage != "encode":
        translator.draw = torch.compile(translator.draw, fullgraph=True)


def compile_and_compare(
    compiling: Callable[[], None],
    work: Callable[[int], Sequence[torch.Tensor]],
    most: float,
) -> float:
    """Compiles in place; the largest difference of the second call to eager's.

    Raises RuntimeError, with the reason, if nothing compiles or the difference is above `most`.
    """
    expected = [x.clone() for x in work(0)]
    compiling()
    try:
        work(0)
        second = work(0)
    except RuntimeError as error:  # what all of torch's compilers raise derives from it
        kind = type(error).__name__
        raise RuntimeError(f"does not compile: {kind}, {first_line(error)}") from None
    pairs = zip(second, expected, strict=True)
    difference = float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())
    if not difference <= most:  # nor NaN
        raise RuntimeError(f"second call is {difference:.2g} off eager's, more than {most:g}")
    return difference


def measure(config: Config, job: Job) -> dict[str, Any]:
    """The figures of one row, in this process."""
    device = torch.device(config.device)
    use_threads(config.threads, job.batch_size * job.resolution**2)
    figures: dict[str, Any] = {}
    work: Callable[[int], Sequence[Any]]
    if job.stage in ("align", "end to end"):
        aligner = Aligner(device)
        pictures = pictures_with_faces(config.pictures, aligner)
    if job.stage == "align":
        work = picture_work(pictures, aligner, job.resolution, job.batch_size)
    else:
        face, anime, encoder, figures["weights"] = load_networks(config, job.resolution)
        translator = Translator(face, anime, encoder, device=device, dtype=DTYPES[config.dtype])
        if job.variant == "contiguous":
            for network in (translator.encoder, translator.synthesis):
                network.to(memory_format=torch.contiguous_format)
        if job.stage == "end to end":
            align = picture_work(pictures, aligner, translator.crop_size, job.batch_size)

            def work(i: int) -> Sequence[Any]:
                images = translator.prepare(align(i))
                return translator.synthesise(translator.encode(images))[:1]

        else:
            work = network_work(translator, job)
        if job.variant == "compiled":
            whole = partial(compile_stage, translator, job.stage)
            figures["difference"] = compile_and_compare(whole, work, TOLERANCE[config.dtype])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    turn = itertools.count()
    seconds = stopwatch(lambda: work(next(turn)), config.repeats, device)
    figures |= percentiles(seconds)
    figures["images_per_second"] = round(1000 * job.batch_size / figures["p50_ms"], 2)
    return figures | {"peak_memory_mb": peak_memory_mb(device)}


# ------------------------------------------------------------------------ the backends


def measure_backends(config: Config, stage: str, resolution: int, batch: int) -> list[dict]:
    """A row for each backend, their calls in turn, in this process."""
    threads = use_threads(config.threads, batch * resolution**2)
    face, anime, encoder, weights = load_networks(config, resolution)
    works: dict[str, Callable[[int], Any]] = {}
    for backend in config.backends:
        aligner = Aligner("cpu", backend=backend, threads=threads)
        looks = stage in ("encode", "end to end")  # the others need no export of the encoder
        translator = Translator(
            face, anime, encoder, backend=backend, threads=threads, export=looks
        )
        works[backend] = backend_work(config, translator, aligner, stage, batch)
    rows = []
    for backend, figures in in_turn(works, config.repeats).items():
        asked = {"stage": stage, "resolution": resolution, "batch_size": batch, "variant": backend}
        figures["images_per_second"] = round(1000 * batch / figures["p50_ms"], 2)
        rows.append(asked | {"weights": weights, "threads": threads, "busy": config.busy} | figures)
    return rows


def in_turn(works: Mapping[Any, Callable[[int], Any]], repeats: int) -> dict[Any, dict[str, Any]]:
    """The figures of each, the i-th call of all before the next one of any, after a warm-up."""
    samples: dict[Any, list[tuple[float, float]]] = {name: [] for name in works}
    for i in range(-1, repeats):
        for name, work in works.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work(max(i, 0))
            if i >= 0:
                taken = time.perf_counter() - wall, time.process_time() - cpu
                samples[name].append(taken)
    return {
        name: percentiles([wall for wall, _ in taken])
        | {"cpu_ms": percentiles([cpu for _, cpu in taken])["p50_ms"]}
        for name, taken in samples.items()
    }


def measure_styles(config: Config, backend: Backend, resolution: int, batch: int) -> list[dict]:
    """Rows of 1, 2, … styles from one pass, and of as many passes, all in turn."""
    threads = use_threads(config.threads, batch * resolution**2)
    face, anime, encoder, weights = load_networks(config, resolution)
    names = [f"style{i}" for i in range(config.styles)]
    tunes = {name: copy.deepcopy(anime) for name in names}
    translator = Translator(face, tunes, encoder, backend=backend, threads=threads, export=False)
    rng = torch.Generator().manual_seed(0)
    ws = face.w_avg + 0.5 * torch.randn(batch, face.num_ws, face.w_dim, generator=rng)

    def passes(styles: list[str]) -> None:
        for name in styles:
            translator.drawings(ws, [name])

    works: dict[Any, Callable[[int], Any]] = {}
    for count in range(1, config.styles + 1):
        works["styles", count] = lambda _, few=names[:count]: translator.drawings(ws, few)
        works["passes", count] = lambda _, few=names[:count]: passes(few)
    rows = []
    found = in_turn(works, config.repeats)
    for (kind, count), figures in found.items():
        asked = {"stage": f"{count} {kind}", "resolution": resolution, "batch_size": batch}
        figures["images_per_second"] = round(1000 * batch * count / figures["p50_ms"], 2)
        figures["of_passes"] = round(figures["p50_ms"] / found["passes", count]["p50_ms"], 3)
        about = {"variant": backend, "weights": weights, "threads": threads, "busy": config.busy}
        rows.append(asked | about | figures)
    return rows


def backend_work(
    config: Config, translator: Translator, aligner: Aligner, stage: str, batch: int
) -> Callable[[int], Any]:
    """The i-th call of a stage."""
    job = Job(stage, translator.resolution, batch, "channels_last")
    if stage not in ("align", "end to end"):
        return network_work(translator, job)
    pictures = pictures_with_faces(config.pictures, aligner)
    align = picture_work(pictures, aligner, translator.crop_size, batch)
    if stage == "align":
        return align
    return lambda i: translator.synthesise(translator.encode(translator.prepare(align(i))))


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that only take processor time, while the block runs."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


def rows_of_backends(config: Config, stage: str, resolution: int, batch: int) -> list[dict]:
    with busy(config.busy):
        [rows] = in_processes(measure_backends, config, stage, resolution, batch)
    return rows


# --------------------------------------------------------------------------- report


def row_of(config: Config, job: Job) -> dict[str, Any]:
    """What was asked and the figures, or the `reason` why there are none."""
    try:
        [figures] = in_processes(measure, config, job)
    except RuntimeError as error:
        figures = {"reason": first_line(error)}
    return asdict(job) | figures


def show_rows(rows: list[dict[str, Any]]) -> None:
    """A table, and under it the reasons of rows without figures."""
    table = speed_table("stage", "R", "B", "variant", "CPU ms", "weights")
    if compared := any("difference" in row for row in rows):
        table.add_column("off eager", justify="right")
    if passes := any("of_passes" in row for row in rows):
        table.add_column("of passes", justify="right")
    for row in rows:
        asked = [str(row[key]) for key in ("stage", "resolution", "batch_size", "variant")]
        off = [f"{row['difference']:.0e}" if "difference" in row else ""] * compared
        off += [f"{row['of_passes']:.2f}" if "of_passes" in row else ""] * passes
        weights = row.get("weights", "").removesuffix(" weights")
        asked.append(f"{row['cpu_ms']:.1f}" if "cpu_ms" in row else "")
        table.add_row(
            *asked, weights, *speeds(row), *off, end_section=row["variant"] == rows[-1]["variant"]
        )
    show(table)
    for row in rows:
        if "reason" in row:
            which = f"{row['stage']}, {row['resolution']}², B = {row['batch_size']}"
            console.print(f"{which}, {row['variant']}: {row['reason']}")


def run(config: Config) -> dict[str, Any]:
    [imports] = in_processes(peak_memory_mb)
    todo = list(jobs(config))
    rows = [row_of(config, job) for job in track(todo, "rows", console=console)]
    if config.backends:
        kinds = itertools.product(config.stages, config.resolutions, config.batch_sizes)
        for kind in track(list(kinds), "backends", console=console):
            rows += rows_of_backends(config, *kind)
    if config.styles:
        backends = config.backends or ("torch",)
        for kind in itertools.product(backends, config.resolutions, config.batch_sizes):
            with busy(config.busy):
                [made] = in_processes(measure_styles, config, *kind)
            rows += made
    show_rows(rows)
    memory = f"{MEMORY}; compiled rows hold the compiler too"
    report: dict[str, Any] = {"device": config.device, "dtype": config.dtype}
    report |= {"repeats": config.repeats, "memory": memory, "memory_of_imports_mb": imports}
    return report | {"rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark("latency", Config, run, QUICK, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
