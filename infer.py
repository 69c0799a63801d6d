"""Photos to anime faces: a picture, a folder or a glob in, as many results out.

    python infer.py --input photos/ --output out/
    python infer.py --input me.jpg --output out/ --save anime,grid,latents --refine-steps 50
    python infer.py --input me.jpg --output out/ --size 256       # enlarged by super-resolution
    accelerate launch infer.py --input photos/ --output out/      # each process takes its share

Writes OUT/sub/name.png for photos/sub/name.jpg, and OUT/manifest.jsonl with one line per picture.
Where several pictures share a stem, the whole name is kept: a.jpg.png, a.png.png. Exit code 0, 1
where pictures failed (they are listed, the others are done), 2 where nothing could be done.
"""

import glob
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import PartialState
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from encoder.align import Aligner
from encoder.pipeline import FilesConfig, Item, Translator, translate
from generators import checkpoint
from generators.curvature import curvature_of
from generators.images import find_images, result_names
from generators.principal import DEVIATIONS
from generators.runs import write_atomically
from generators.superres import SuperResolution

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What the name of a result may add to its stem:
ENDING = re.compile(r"(_face\d+)?(_aligned|_reconstruction|_latents|_grid)?$")
MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class InferConfig(FilesConfig):
    face_generator: str = "face64"  # bundled name or .safetensors file
    anime_generator: str = "anime64"  # a fine-tune of the face generator
    encoder: str = "encoder64"  # trained for the face generator
    superres: str = "superres64"  # enlarges to a --size above the generator's own; or: bicubic
    swap_resolution: int = 16  # blocks from this resolution on are the anime generator's
    truncation: float = 1.0  # below 1: closer to the average face
    style_limit: float = DEVIATIONS  # lower: cleaner drawings, higher (or inf): more of the photo
    refine_steps: int = 0  # of latent optimisation per picture; slower, and closer to the photo
    curvature: str | None = None  # of the face generator, for refining; face64 has curvature64
    align: bool = True  # off: the pictures are aligned crops already
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; tyro exits by itself, with 2, where an option is wrong."""
    config = tyro.cli(InferConfig, args=argv, description=__doc__)
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    state = PartialState(cpu=config.device == "cpu")
    try:
        return run(config, state, console)
    except ValueError as error:
        message = str(error)
    except OSError as error:
        message = f"Cannot write to --output {config.output}: {error.strerror or error}."
    except torch.OutOfMemoryError:
        message = "The device has not enough memory; lower --batch-size."
    if state.is_main_process:
        console.print(message)
    return 2


def run(config: InferConfig, state: PartialState, console: Console) -> int:
    """Translates this process's share of the pictures; the main process reports on all."""
    # 1. What is to be done, and whether it can be.
    items = plan(config)
    translator = load(config, pick_device(config.device, state))
    config.output.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()  # all have looked for files in the way before the first one writes

    # 2. Do it.
    start = time.perf_counter()
    share = items[state.process_index :: state.num_processes]
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("pictures"), TimeRemainingColumn())
    with (
        open(part(config.output, state.process_index), "w", encoding="utf-8") as notes,
        Progress(*columns, console=console, disable=not state.is_main_process) as progress,
    ):
        task = progress.add_task("", total=len(share))

        def done(item: Item) -> None:
            print(item.line(), file=notes, flush=True)
            progress.advance(task)

        translate(share, translator, config, done)
    state.wait_for_everyone()

    # 3. Report.
    failed = []
    if state.is_main_process:
        seconds = time.perf_counter() - start
        lines = merge_manifests(items, config.output, state.num_processes)
        failed = [line for line in lines if line["status"] == "failed"]
        translated = len(lines) - len(failed)
        for line in failed:
            console.print(line["reason"])
        console.print(
            f"{translated} of {len(lines)} pictures translated, "
            f"{translated / seconds:.1f} pictures/s by {state.num_processes} process(es); "
            f"results and {MANIFEST} are in {config.output}"
        )
    state.wait_for_everyone()
    return 1 if failed else 0


def load(config: InferConfig, device: torch.device) -> Translator:
    return Translator.load(
        config.face_generator,
        config.anime_generator,
        config.encoder,
        swap_resolution=config.swap_resolution,
        device=device,
        dtype=DTYPES[config.dtype],
        aligner=Aligner("cpu" if device.type == "mps" else device) if config.align else None,
        truncation=config.truncation,
        style_limit=config.style_limit,
        refine_steps=config.refine_steps,
        curvature=curvature_of(config.face_generator, config.curvature),
        superres=load_superres(config),
    )


def load_superres(config: InferConfig) -> SuperResolution | None:
    """None where no --size is given, or where it is to be reached by bicubic."""
    if config.size is None or config.superres == "bicubic":
        return None
    bundled = checkpoint.BUNDLED.get(config.superres)
    if bundled is not None and not bundled.is_file():
        raise ValueError(
            f"The weights {config.superres} are not here ({bundled}); enlarge with --superres "
            "bicubic, or train a network with python -m generators.train --architecture superres "
            "and give its file with --superres."
        )
    return checkpoint.load(checkpoint.resolve(config.superres), "superres")


def pick_device(name: str, state: PartialState) -> torch.device:
    """The device of that name, or this process's own. ValueError where it cannot be used."""
    try:
        device = state.device if name in ("auto", state.device.type) else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here; try --device cpu.") from error
    return device


# -------------------------------------------------------------------------- names, manifest


def plan(config: FilesConfig) -> list[Item]:
    """The inputs with the names of their results; ValueError where a file must not be replaced."""
    output = config.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a folder.")
    read_manifest(output / MANIFEST)  # fails early, if it must
    sources = find_images(config.input)
    here = output.resolve()  # earlier results below the input folder are no inputs
    sources = [source for source in sources if here not in source[0].resolve().parents] or sources
    names = result_names([name for _, name in sources], ENDING)
    items = [Item(path, output / name) for (path, _), name in zip(sources, names, strict=True)]

    inputs = {path.resolve() for path, _ in sources}
    for item in items:
        files = [*item.files(config).values()]
        if config.faces == "all":
            files += sorted(item.base.parent.glob(glob.escape(item.base.name) + "_face[0-9]*"))
        for file in files:
            if file.resolve() in inputs:
                raise ValueError(
                    f"{file} is an input and would be replaced; give another --output."
                )
            if file.exists() and not config.overwrite:
                raise ValueError(
                    f"{file} exists; give another --output, or --overwrite to replace results."
                )
    return items


def part(folder: Path, process: int) -> Path:
    """Where a process notes its finished pictures while it runs, in the manifest's format."""
    return folder / f".manifest-{process}.jsonl"


def read_manifest(file: Path) -> dict[str, str]:
    """{input: line}, empty where there is no file."""
    if not file.exists():
        return {}
    try:
        return {json.loads(line)["input"]: line for line in file.read_text("utf-8").splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} was not written by this program; move it away, or give another folder."
        ) from error


def merge_manifests(items: list[Item], folder: Path, processes: int) -> list[dict[str, Any]]:
    """The parts of all processes -> manifest.jsonl; returns the lines of `items`, in their order.

    Lines of earlier runs stay where they are about other pictures.
    """
    lines = read_manifest(folder / MANIFEST)
    parts = [part(folder, process) for process in range(processes)]
    new = {name: line for file in parts for name, line in read_manifest(file).items()}
    new = {str(item.path): new[str(item.path)] for item in items}
    lines = {name: line for name, line in lines.items() if name not in new} | new
    write_atomically(
        folder / MANIFEST, lambda file: file.write_text("\n".join(lines.values()) + "\n", "utf-8")
    )
    for file in parts:
        file.unlink()
    return [json.loads(line) for line in new.values()]


if __name__ == "__main__":
    sys.exit(main())
