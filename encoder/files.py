"""Pictures in, results out: what all commands do that take a folder and fill another.

    results = Results(config, {"anime": ".png", "grid": "_grid.png"}, "anime,grid")
    with results:
        for job in results.todo:
            with results.attempt(job):                     # what fails for one keeps no other
                picture = open_image(job.path)
                results.begin(job)
                write_atomically(job.files()["anime"], …)
                results.done(job, loss=0.1)
    return results.report("translated")

OUT/manifest.jsonl has one line per picture: "input", "status" (ok, failed, begun), "reason",
"outputs", "settings" that decide a result, and what the command adds. It is written as work goes
on, so after an interruption the same command goes on: a picture is finished when its line says so
for the same settings and its files are there. A file that is there and is not the same picture's
of the same settings is never replaced but by --overwrite.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from encoder.align import Aligner, Face
from encoder.films import CAMERA, is_film
from encoder.films import SUFFIXES as FILMS
from encoder.options import FilesConfig, chosen
from generators.command import console, printable
from generators.disk import find_files, may_write, write_atomically
from generators.images import SUFFIXES, find_images, result_names
from generators.runs import flat

MANIFEST = "manifest.jsonl"
LONGEST_NAME = 255  # bytes, on nearly every file system
# Fields of the configurations that change no result:
CHANGEABLE = ("input", "output", "overwrite", "batch_size", "device", "save", "film_format",
              "backend", "threads")  # fmt: skip


def find_inputs(source: str) -> list[tuple[Path, Path]]:
    """`find_images`, and films. A camera's recording is named for the time it begins at, so that
    none is in the way of the next."""
    camera = CAMERA.fullmatch(source)
    if camera:
        name = re.sub(r"\W+", "_", camera[1])[:50]
        return [(Path(source), Path(f"webcam_{name}_{time.strftime('%Y%m%d-%H%M%S')}"))]
    return find_files(source, SUFFIXES | FILMS, "picture or film")


def find_faces(aligner: Aligner, picture: Image.Image, path: Path) -> list[Face]:
    """The faces of the picture at `path`, largest first; ValueError where there is none."""
    faces = aligner.detect(picture)
    if not faces:
        raise ValueError(
            f"No face found in {path}; give a clearer picture, or --no-align for an aligned crop."
        )
    return faces


@dataclass
class Job:
    """One picture or film, and where its results go."""

    path: Path  # of the picture; of a camera "webcam:0"
    relative: Path  # the same, relative to the input folder
    base: Path  # OUT/sub/name, to which a result's ending is added
    endings: Mapping[str, str]  # {artefact: ending}
    own: set[Path] = field(default_factory=set)  # results of it that were written before
    outputs: list[str] = field(default_factory=list)  # relative to OUT
    film: bool = False

    def files(self, face: int = 1) -> dict[str, Path]:
        """{artefact: file} of the first, second, … face."""
        longest = max(len(ending.encode()) for ending in self.endings.values())
        stem = self.base.name if face == 1 else f"{self.base.name}_face{face}"
        stem = shortened(stem, LONGEST_NAME - longest)
        return {name: self.base.with_name(stem + end) for name, end in self.endings.items()}


def shortened(name: str, longest: int) -> str:
    """A name of at most `longest` bytes: of a longer one the head and a hash of all of it."""
    data = os.fsencode(name)
    if len(data) <= longest:
        return name
    digest = hashlib.blake2b(data, digest_size=6).hexdigest()
    return data[: longest - len(digest)].decode(errors="ignore") + digest


class Results:
    """The output folder of one command: what is to be done, and what has become of it.

    Several processes may share the work of `todo`, each of its own pictures; one of them reports.
    """

    def __init__(
        self,
        config: FilesConfig,
        endings: Mapping[str, str],  # {artefact: what its file's name adds to the picture's}
        save: str,  # comma list of the artefacts that are wanted
        numbered: str = "",  # pattern of what else may be added
        films: Mapping[str, str] | None = None,  # as `endings`, for films; None: films are passed
    ) -> None:
        """Finds the pictures and films, names their results and reads what was done before; writes
        nothing.

        ValueError where nothing is found, or a file must not be replaced.
        """
        self.folder, self.overwrite = config.output, config.overwrite
        self.settings = settings_of(config)
        sources = find_images(config.input) if films is None else find_inputs(config.input)
        here = os.path.realpath(self.folder)  # earlier results below the input are no inputs
        outside = [s for s in sources if here not in map(str, Path(real(s[0])).parents)]
        sources = outside or sources
        self.inputs = {real(path) for path, _ in sources}

        # Names are the same whatever is saved, so that a later command may add to the results.
        ends = [*endings.values(), *(films or {}).values()]
        added = "|".join(re.escape(Path(end).stem) for end in ends if end[0] != ".")
        names = result_names([name for _, name in sources], re.compile(f"{numbered}({added})?$"))

        self.what = "pictures"
        lines = read_manifest(self.folder / MANIFEST)
        self.jobs: list[Job] = []
        self.todo: list[Job] = []
        for (path, relative), name in zip(sources, names, strict=True):
            film = films is not None and (is_film(path) or path.suffix == ".safetensors")
            wanted = chosen(save, (films if film else None) or endings)
            job = Job(path, relative, self.folder / name, wanted, film=film)
            self.jobs.append(job)
            if not self.finished(job, lines.get(str(path))):
                self.check(job, job.files().values())
                self.todo.append(job)
        if films_there := sum(job.film for job in self.jobs):
            self.what = "films" if films_there == len(self.jobs) else "pictures and films"
        if len(self.todo) < len(self.jobs):
            ready = len(self.jobs) - len(self.todo)
            console.print(f"{ready} of {len(self.jobs)} {self.what} are finished already")

    def finished(self, job: Job, line: dict[str, Any] | None) -> bool:
        """Whether the manifest's line and the files say so; keeps which files are its own."""
        if line is None or self.overwrite:
            return False
        outputs = {self.folder / name for name in line["outputs"]}
        wanted = set(job.files().values())
        changed = sorted(
            name
            for name in self.settings.keys() | line["settings"].keys()
            if self.settings.get(name) != line["settings"].get(name)
        )
        if changed and (there := [file for file in outputs & wanted if file.exists()]):
            raise ValueError(
                f"{there[0]} was made with another {', '.join(changed)}; give another --output, "
                "or --overwrite to replace it"
            )
        job.own = set() if changed else outputs
        done = not changed and line["status"] == "ok"
        return done and all(file.exists() for file in outputs | wanted)

    def check(self, job: Job, files: Iterable[Path]) -> None:
        """ValueError for a file that must not be written."""
        for file in files:
            if real(file) in self.inputs:
                raise ValueError(
                    f"{file} is an input and would be replaced; give another --output."
                )
            may_write(file, self.overwrite or file in job.own)

    # ------------------------------------------------------------------------- while it runs

    def __enter__(self) -> Results:
        file = self.folder / MANIFEST
        if file.exists():
            with locked(self.folder):
                data = file.read_bytes()
                if not data.endswith(b"\n"):  # half a line, of one who was killed
                    os.truncate(file, data.rfind(b"\n") + 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            where = printable(self.folder)
            console.print(f"What is done is in {where}; the same command goes on from there.")

    @contextmanager
    def attempt(self, job: Job) -> Iterator[None]:
        """Notes what fails for a picture in place of raising it."""
        try:
            yield
            return
        except ValueError as error:
            reason = str(error)
        except OSError as error:
            reason = f"Cannot write the result of {job.path}: {error.strerror or error}."
        there = [name for name in job.outputs if (self.folder / name).exists()]
        self.note(job, "failed", reason=printable(reason, 1000), outputs=there)

    def begin(self, job: Job, files: Iterable[Path] | None = None) -> None:
        """To be called before the first file is written; `files`: all that will be, where they are
        not just the first face's."""
        files = list(job.files().values() if files is None else files)
        self.check(job, files)  # another command may have been here since
        kept = {file for file in job.own if file.exists()} - set(files)
        job.outputs = [file.relative_to(self.folder).as_posix() for file in [*files, *sorted(kept)]]
        self.note(job, "begun", outputs=job.outputs)

    def done(self, job: Job, **details: Any) -> None:
        """To be called once all files are written."""
        self.note(job, "ok", outputs=job.outputs, **details)

    def note(self, job: Job, status: str, **details: Any) -> None:
        line = {"input": str(job.path), "status": status} | details | {"settings": self.settings}
        data = (json.dumps(line) + "\n").encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder), open(self.folder / MANIFEST, "ab", buffering=0) as file:
            size = file.tell()
            written = 0
            try:
                while written < len(data):
                    written += file.write(data[written:]) or 0
            except OSError as error:
                file.truncate(size)
                raise OSError(error.errno, error.strerror, str(self.folder / MANIFEST)) from error

    # ------------------------------------------------------------------------------- afterwards

    def report(self, verb: str, more: str = "") -> int:
        """Leaves the manifest with one line per picture, this command's last and in their order;
        says what failed. The exit code."""
        file, names = self.folder / MANIFEST, [str(job.path) for job in self.jobs]
        with locked(self.folder):
            lines = read_manifest(file)
            rest = {name: line for name, line in lines.items() if name not in set(names)}
            lines = rest | {name: lines[name] for name in names if name in lines}
            text = "".join(json.dumps(line) + "\n" for line in lines.values())
            write_atomically(file, lambda target: target.write_text(text, "utf-8"))
        asked = [lines[str(job.path)] for job in self.todo]
        failed = [line for line in asked if line["status"] != "ok"]
        for line in failed:
            console.print(printable(line.get("reason", f"{line['input']} was not finished"), 1000))
        console.print(
            f"{len(asked) - len(failed)} of {len(asked)} {self.what} {verb}{more}; "
            f"results and {MANIFEST} are in {printable(self.folder)}"
        )
        return 1 if failed else 0


def settings_of(config: Any) -> dict[str, Any]:
    """{"search.steps": 100, …} of all that decides a result, as JSON has it."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in CHANGEABLE}
    own = [style for style in str(values.pop("styles", "")).split(",") if "=" in style]
    values |= {"styles": ",".join(own)} if own else {}  # the bundled ones are told by their files
    if values.get("reference", "") is None:  # then these decide nothing
        values = {k: v for k, v in values.items() if k not in ("reference_strength", "seed")}
    if not values.get("edit", True):  # nor do these
        values = {k: v for k, v in values.items() if k not in ("edit", "directions")}
    plain = (bool, int, str, type(None))
    return {
        name: value
        if isinstance(value, plain) or (isinstance(value, float) and math.isfinite(value))
        else str(value)
        for name, value in flat(values).items()
    }


def read_manifest(file: Path) -> dict[str, dict[str, Any]]:
    """{input: its last line}, in the order of those; empty where there is no file."""
    if not file.exists():
        return {}
    result: dict[str, dict[str, Any]] = {}
    try:
        for data in file.read_bytes().split(b"\n")[
            :-1
        ]:  # the last: b"", or half a line, of one who was killed
            line = json.loads(data)
            name, settings, outputs = line["input"], line["settings"], line["outputs"]
            if not isinstance(settings, dict) or not all(isinstance(x, str) for x in outputs):
                raise TypeError
            result.pop(name, None)
            result[name] = line | {"status": str(line["status"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} was not written by this program; move it away, or give another --output."
        ) from error
    return result


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time, the others wait. The lock is the folder's own: it leaves no file, and
    ends with its process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(ImportError, OSError):  # a system, or a file system, without locks
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def real(path: Path) -> str:
    return os.path.realpath(path)  # Path.resolve raises for a link to itself
