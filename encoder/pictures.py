"""Photos to drawings, as many as are asked for: what `encoder.infer` does, films left to `video`.

    code = translate_all(InferConfig(input="photos/", output=Path("out")))
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from encoder.align import Aligner
from encoder.directions import load_directions
from encoder.engines import engine_of
from encoder.files import Job, Results, find_faces
from encoder.options import (
    ENDINGS,
    STYLES,
    InferConfig,
    chosen,
    drawn,
    edits_of,
    endings_of,
)
from encoder.pipeline import Translator, clock
from encoder.reference import References
from encoder.video import translate as video
from generators import checkpoint
from generators.command import console, parse_device, printable
from generators.curvature import curvature_of
from generators.disk import write_atomically
from generators.images import open_image
from generators.latents import write_latents
from generators.runs import progress
from generators.superres import SuperResolution

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WORTH_EXPORTING = 1000  # pictures from which on half a minute of export is won back


def translate_all(config: InferConfig) -> int:
    """Translates this process's share of the pictures; the main process reports on all."""
    # 1. What is to be done, and whether it can be.
    device = parse_device(config.device)
    state = PartialState(cpu=device.type == "cpu")
    styles = config.styles_of(config.styles)
    endings = [endings_of(e, {*STYLES, *styles}) for e in (ENDINGS, video.ENDINGS)]
    save = drawn(config.save, styles)
    results = Results(config, endings[0], save, r"(_face\d+)?", endings[1])
    if not results.todo:
        return 0
    if device.type == state.device.type and device.index is None:
        device = state.device  # each process has its own
    few = len(results.todo) < WORTH_EXPORTING and not any(job.film for job in results.todo)
    translator = load(config, device, few)
    references: References | None = None
    if config.reference is not None:
        names = [job.relative.as_posix() for job in results.todo]
        how = (config.reference_strength, config.seed)
        references = References.read(config.reference, translator, names, *how)
    state.wait_for_everyone()  # all know what is to be done before the first one writes

    # 2. Do it.
    start = time.perf_counter()
    share = results.todo[state.process_index :: state.num_processes]
    shown = state.is_main_process and console.is_terminal
    films = [job for job in share if job.film]
    pictures = [job for job in share if not job.film]
    with results:
        with progress(len(pictures), 0, shown and bool(pictures), "pictures") as advance:
            translate(pictures, results, translator, config, advance, references)
        for job in films:
            if shown:
                console.print(printable(job.path))
            with results.attempt(job):
                video.draw_film(job, results, translator, config, shown, references)
    state.wait_for_everyone()
    seconds = time.perf_counter() - start

    # 3. Report.
    code = 0
    if state.is_main_process:
        took = f" in {seconds:.1f} s by {state.num_processes} process(es)"
        code = results.report("translated", took)
    state.wait_for_everyone()
    return code


def load(config: InferConfig, device: torch.device, few: bool = False) -> Translator:
    dtype = DTYPES[config.dtype]
    engine = engine_of(config, device, dtype, config.batch_size, few)
    how = {key: engine[key] for key in ("backend", "threads")}
    given = config.curvature
    return Translator.load(
        config.face_generator,
        config.styles_of(config.styles),
        config.encoder,
        swap_resolution=config.swap_resolution,
        device=device,
        dtype=dtype,
        aligner=Aligner(device, **how) if config.align else None,
        truncation=config.truncation,
        style_limit=config.style_limit,
        refine_steps=config.refine_steps,
        curvature=None if given is None else curvature_of(config.face_generator, given),
        superres=load_superres(config),
        directions=load_directions(config.face_generator, config.directions, config.edit),
        edits=edits_of(config.edit),
        **engine,
    )


def load_superres(config: InferConfig) -> SuperResolution | None:
    """None where no --size is given, or where it is to be reached by bicubic."""
    if config.size is None or config.superres == "bicubic":
        return None
    bundled = checkpoint.BUNDLED.get(config.superres)
    if bundled is not None and not bundled.is_file():
        raise ValueError(
            f"The weights {config.superres} are not here ({bundled}); enlarge with --superres "
            "bicubic, or train a network with python -m generators.train superres, "
            "and give its file with --superres."
        )
    return checkpoint.load(checkpoint.resolve(config.superres), SuperResolution)


# ------------------------------------------------------------------------ pictures to results


@dataclass
class Seen:
    """One picture on its way: what the manifest will say of it."""

    job: Job
    number: int  # of the picture, from 1
    todo: int = 0  # faces not yet written
    faces: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)  # ms

    def took(self, part: str, seconds: float) -> None:
        self.timings[part] = self.timings.get(part, 0.0) + 1e3 * seconds


def crops(
    jobs: list[Job], results: Results, translator: Translator, config: InferConfig
) -> Iterator[tuple[Seen, int, Image.Image]]:
    """(picture, number of the face from 1, crop), read one picture at a time."""
    for count, job in enumerate(jobs, 1):
        seen, cut = Seen(job, count), []
        with results.attempt(job):
            start = time.perf_counter()
            picture = open_image(job.path)
            seen.took("read", time.perf_counter() - start)
            start = time.perf_counter()
            if translator.aligner is None:
                cut = [translator.crop(picture)]
            else:
                faces = find_faces(translator.aligner, picture, job.path)
                faces = faces[:1] if config.faces == "largest" else faces
                cut = [translator.crop(picture, face) for face in faces]
                seen.faces = [
                    {"box": face.box.round(1).tolist(), "score": round(face.score, 4)}
                    for face in faces
                ]
            seen.took("align", time.perf_counter() - start)
            numbers = range(1, len(cut) + 1)
            results.begin(job, [file for n in numbers for file in job.files(n).values()])
            seen.todo = len(cut)  # stays 0 where something failed
        for number, crop in enumerate(cut[: seen.todo], 1):
            yield seen, number, crop


def translate(
    jobs: list[Job],
    results: Results,
    translator: Translator,
    config: InferConfig,
    advance: Any,
    references: References | None = None,
) -> None:
    """Writes results batch by batch; only one batch of crops is held at a time."""
    faces = crops(jobs, results, translator, config)
    wanted = bool(chosen(config.save, ENDINGS).keys() & {"reconstruction", "grid"})
    while batch := list(itertools.islice(faces, config.batch_size)):
        start = time.perf_counter()
        images = translator.prepare([crop for _, _, crop in batch])
        ws = translator.encode(images)
        encoded = clock(translator.device)
        names = [seen.job.relative.as_posix() for seen, _, _ in batch]
        own = None if references is None else references.mixed(ws, names)
        pictures = translator.drawings(ws, None, wanted, drawing_ws=own)
        synthesised = clock(translator.device)
        made = {"aligned": images, "latents": ws} | pictures
        made = {name: tensor.cpu() for name, tensor in made.items()}

        for i, (seen, number, _) in enumerate(batch):
            advance(seen.number)
            seen.took("encode", (encoded - start) / len(batch))
            seen.took("synthesise", (synthesised - encoded) / len(batch))
            begun = time.perf_counter()
            with results.attempt(seen.job):
                write(seen.job, number, {k: v[i] for k, v in made.items()}, translator, config.size)
                seen.took("write", time.perf_counter() - begun)
                seen.todo -= 1
                if seen.todo == 0:  # never, once a face has failed
                    timings = {name: round(ms, 3) for name, ms in seen.timings.items()}
                    given = {} if references is None else references.line(names[i])
                    results.done(seen.job, faces=seen.faces, timings_ms=timings, **given)


def write(
    job: Job, number: int, made: dict[str, Tensor], translator: Translator, size: int | None
) -> None:
    """One face: pictures (3, R, R) in [-1, 1], here brought to the wanted size, and "latents"
    (L, D); each file whole or not."""
    video.check_finite(made.values(), job.path)
    files = job.files(number)
    pictures = video.tiles(files, made, translator, size or translator.resolution)
    for name, file in files.items():
        if name == "latents":
            write_latents(file, {"ws": made[name]})
        else:
            write_atomically(file, partial(pictures[name].save, format="PNG"))
