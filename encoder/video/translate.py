"""A film or a camera to a drawn film: faces followed, drawn, smoothed in time, put together.

    python infer.py --input clip.mp4 --output out/ --layout side-by-side --size 256
    python infer.py --input webcam:0 --output out/ --layout in-place        # Ctrl-C ends it
    python infer.py --input out/clip_latents.safetensors --output again/    # of --save latents

Frames go through in small batches and are written as they are drawn, so that memory does not grow
with the film. A film is written whole or not at all; only a camera's is kept where Ctrl-C ends it.
Where a face is lost its last drawing stays: BLINK seconds in its frame, HOLD seconds in a row of
drawings, which is grey before and after.

Shape letters: L layers of w+, D dimension of w, R the generators' resolution.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from encoder.files import Job, Results
from encoder.films import CAMERA, Film, FilmWriter, load_av, read_film
from encoder.geometry import paste
from encoder.options import DrawConfig
from encoder.pipeline import Translator
from encoder.reference import References
from encoder.video.shots import (
    Places,
    Shot,
    follower,
    most_at_once,
    shots_of,
    shots_of_latents,
)
from encoder.video.trace import TraceWriter
from encoder.video.track import Tracker
from generators.command import printable
from generators.disk import write_atomically
from generators.images import grid, resize, to_pil
from generators.runs import progress

ENDINGS = {"anime": ".mp4", "aligned": "_aligned.mp4", "reconstruction": "_reconstruction.mp4",
           "latents": "_latents.safetensors", "grid": "_grid.mp4"}  # fmt: skip
STRIP = ("aligned", "reconstruction")  # of "grid", before the drawings
HOLD = 2.0  # seconds that a drawing stays in the row when its face has gone
BLINK = 0.15  # seconds that it stays in its frame
FEATHER = 0.2  # width of the seam around a drawing in its frame, as a part of the crop's side
GREY = (128, 128, 128)  # a place without a drawing


# --------------------------------------------------------------------------- drawings


def tiles(
    names: Iterable[str], made: Mapping[str, Tensor], translator: Translator, side: int
) -> dict[str, Image.Image]:
    """What is shown of one face, by name, of pictures (3, R, R) in [-1, 1]; `side` pixels high."""
    names, shown, strip = set(names), {}, (*STRIP, *translator.synthesis.styles)
    for part in strip:
        if part == "aligned" and names & {part, "grid"}:  # as the encoder saw it: nothing is added
            shown[part] = resize(made[part], side)
        elif names & {part, "grid"}:
            shown[part] = translator.enlarge(made[part][None], side)[0]
    pictures = {name: to_pil(shown[name]) for name in strip if name in names}
    if "grid" in names:
        pictures["grid"] = grid(torch.stack([shown[part] for part in strip]), len(strip))
    return pictures


def check_finite(made: Iterable[Tensor], path: Path) -> None:
    if not all(part.isfinite().all() for part in made):
        raise ValueError(f"The result of {path} is not finite; try --dtype fp32.")


class Painter:
    """Draws the faces of frames, and puts each frame together."""

    def __init__(
        self,
        job: Job,
        translator: Translator,
        config: DrawConfig,
        places: int,
        references: References | None = None,
    ) -> None:
        self.path, self.translator, self.config, self.places = job.path, translator, config, places
        self.photo, self.references = job.relative.as_posix(), references
        self.names = [name for name in job.endings if name != "latents"]
        self.drawn: dict[int, tuple[float, dict[str, Image.Image]]] = {}  # the last, by place

    def draw(self, shots: list[Shot]) -> None:
        """The latents of all faces of some frames, smoothed, and their pictures."""
        faces = [(shot, seen) for shot in shots for seen in shot.faces]
        made: dict[str, Tensor] = {}
        if cut := [(shot, seen) for shot, seen in faces if seen.crop is not None]:
            images = self.translator.prepare([seen.crop for _, seen in cut if seen.crop])
            made["aligned"] = images.cpu()
            for (shot, seen), ws in zip(cut, self.translator.encode(images), strict=True):
                seen.ws = Tracker.smooth_ws(seen.track, ws, shot.time)
        known = [(shot, seen) for shot, seen in faces if seen.ws is not None]
        if not known or not self.names:
            return
        ws = torch.stack([seen.ws for _, seen in known if seen.ws is not None])
        wanted = bool({"reconstruction", "grid"} & set(self.names))
        ws = ws.to(self.translator.device)
        drawing_ws = None
        if self.references is not None:
            drawing_ws = self.references.mixed(ws, [self.photo] * len(ws))
        made |= self.translator.drawings(ws, None, wanted, drawing_ws=drawing_ws)
        made = {name: images.cpu() for name, images in made.items()}
        check_finite([ws, *made.values()], self.path)
        for i, (shot, seen) in enumerate(known):
            own = {name: images[i] for name, images in made.items()}
            seen.shown = tiles(self.names, own, self.translator, self.side(shot))

    def side(self, shot: Shot) -> int:
        """Of a drawing: as asked for, or of the frame beside it, or as the generator draws."""
        if self.config.size is None and self.config.layout == "side-by-side" and shot.picture:
            return shot.picture.height
        return self.config.size or self.translator.resolution

    def frame(self, name: str, shot: Shot) -> Image.Image:
        """What film `name` shows at that time."""
        if self.config.layout == "in-place" and name != "grid" and shot.picture:
            picture = shot.picture
            for seen in reversed(shot.faces):  # the largest comes last, in front
                time, shown = self.drawn.get(seen.place, (-BLINK, {}))
                if name in shown and shot.time - time <= BLINK and seen.matrix is not None:
                    picture = paste(picture, shown[name], seen.matrix, FEATHER)
            return picture
        side = self.side(shot)
        parts = len(STRIP) + len(self.translator.synthesis.styles)
        wide = side * (parts if name == "grid" else 1)
        left = 0
        if self.config.layout == "side-by-side" and shot.picture:
            left = max(1, round(shot.picture.width * side / shot.picture.height))
        row = Image.new("RGB", (left + wide * self.places, side), GREY)
        if left and shot.picture:
            row.paste(shot.picture.resize((left, side), Image.Resampling.LANCZOS))
        for place, (time, shown) in self.drawn.items():
            if shot.time - time <= HOLD and place < self.places:
                row.paste(shown[name], (left + place * wide, 0))
        return row

    def remember(self, shot: Shot) -> None:
        """Before `frame`: what was drawn of it stays until there is something newer."""
        for seen in shot.faces:
            if seen.shown:
                self.drawn[seen.place] = shot.time, seen.shown


# --------------------------------------------------------------------------- films


@dataclass
class Source:
    """What is drawn: a film, a camera, or the latents of a film."""

    shots: Iterator[Shot]
    places: int  # in a row of drawings
    film: Film | None  # None: latents
    heard: list[Any]  # packets of sound, as they come
    total: int | None  # frames, where that is known
    camera: bool


@contextmanager
def opened(job: Job, translator: Translator, config: DrawConfig) -> Iterator[Source]:
    if job.path.suffix == ".safetensors":
        check_latents(job, translator, config)
        known = shots_of_latents(job.path, translator)
        places = 1 + max(seen.place for shot in known for seen in shot.faces)
        yield Source(iter(known), places, None, [], len(known), False)
        return
    camera = bool(CAMERA.fullmatch(str(job.path)))
    places = 1
    if config.faces == "all" and config.layout != "in-place" and translator.aligner is not None:
        if camera:
            raise ValueError(
                "How many faces a camera will show is not known; give --layout in-place, or "
                "--faces largest."
            )
        places = most_at_once(job.path, translator, config)
    heard: list[Any] = []
    with read_film(job.path) as film, stoppable(camera) as stopped:
        frames = until(stopped, film.frames(heard.append))
        row = Places(None if config.layout == "in-place" else places)
        shots = shots_of(frames, follower(translator, config), row, translator)
        yield Source(shots, places, film, heard, film.expected, camera)


def check_latents(job: Job, translator: Translator, config: DrawConfig) -> None:
    if config.layout != "drawing" or translator.refine_steps:
        raise ValueError(
            f"{job.path} holds latents and no frames; draw it with --layout drawing and without "
            "--refine-steps, or give the film."
        )
    if unfit := sorted(set(job.endings) - {*translator.synthesis.styles, "reconstruction"}):
        raise ValueError(f"Of latents --save makes anime and reconstruction, not {unfit[0]}.")


@contextmanager
def stoppable(camera: bool) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed. A second one interrupts at once, as the first does a film."""
    pressed: list[int] = []
    if not camera:
        yield lambda: False
        return

    def note(number: int, _: Any) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def until(stopped: Callable[[], bool], frames: Iterable[Any]) -> Iterator[Any]:
    for frame in frames:
        if stopped():
            return
        yield frame


def draw_film(
    job: Job,
    results: Results,
    translator: Translator,
    config: DrawConfig,
    shown: bool,
    references: References | None = None,
) -> None:
    """Writes what is wanted of one film. ValueError or OSError, where that cannot be, or where
    the film broke off; what was there is then drawn, and kept."""
    av = load_av(f"drawing {job.path.name}")
    begun = perf_counter()
    with opened(job, translator, config) as source:
        results.begin(job)
        done: dict[str, Any] = {}

        def write(files: dict[str, Path]) -> None:
            painter = Painter(job, translator, config, source.places, references)
            done.update(write_films(files, source, painter, config.batch_size, shown))
            if not done["frames"]:
                raise ValueError(f"{job.path} has no frames; give a film with pictures.")
            if not done["faces"]:
                raise ValueError(
                    f"No face found in {job.path}; give a clearer film, or --no-align for one "
                    "that is cropped to a face."
                )

        try:
            whole(job.files(), write)
        except av.FFmpegError as error:
            reason = printable(error.strerror or error)
            raise ValueError(f"Cannot write the film of {job.path}: {reason}.") from error
        if source.film is not None and (cut := source.film.cut_short()):
            raise ValueError(cut)
        seconds = perf_counter() - begun
        done["frames_per_second"] = round(done["frames"] / seconds, 2)
        given = {} if references is None else references.line(job.relative.as_posix())
        results.done(job, **done, **given)


def whole(files: Mapping[str, Path], write: Callable[[dict[str, Path]], None]) -> None:
    """Calls `write` with temporary files, which take their names when all are written."""

    def next_one(left: list[str], temporary: dict[str, Path]) -> None:
        if not left:
            write(temporary)
            return
        name, *rest = left
        write_atomically(files[name], lambda file: next_one(rest, temporary | {name: file}))

    next_one(list(files), {})


def write_films(
    files: Mapping[str, Path], source: Source, painter: Painter, batch_size: int, shown: bool
) -> dict[str, Any]:
    """Reads, draws and writes all frames; what the manifest says of them."""
    writers: dict[str, FilmWriter] = {}
    rate = source.film.rate if source.film else Fraction(30)
    sound = source.film.sound if source.film else None
    frames, seconds, numbers = 0, 0.0, set[int]()
    with ExitStack() as open_files:
        streams = {name: open_files.enter_context(open(file, "wb")) for name, file in files.items()}
        trace = TraceWriter(streams["latents"]) if "latents" in files else None
        advance = open_files.enter_context(progress(source.total, 0, shown, "frames"))
        for shots in batches(source.shots, 1 if source.camera else batch_size):
            painter.draw(shots)
            for shot in shots:
                painter.remember(shot)
                for name in painter.names:
                    picture = painter.frame(name, shot)
                    if name not in writers:
                        heard = sound if not writers else None  # goes with the first film
                        writers[name] = FilmWriter(streams[name], picture.size, rate, heard)
                    writers[name].add(picture, shot.time)
                for seen in shot.faces:
                    numbers.add(seen.track.number)
                    if trace is not None and seen.ws is not None:
                        trace.add(shot.time, seen.track.number, seen.track.face.points, seen.ws)
            hear(source.heard, writers)
            frames, seconds = frames + len(shots), shots[-1].time
            advance(frames, faces=len(shots[-1].faces))
        hear(source.heard, writers)
        for writer in writers.values():
            writer.close()
        if trace is not None:
            trace.close()
    first = next(iter(writers.values()), None)
    how = "none" if first is None or first.sound is None else "copied" if first.copies else "aac"
    done = {"frames": frames, "seconds": round(seconds, 3), "faces": len(numbers), "sound": how}
    return done | ({"damaged": source.film.damaged} if source.film and source.film.damaged else {})


def hear(heard: list[Any], writers: Mapping[str, FilmWriter]) -> None:
    if writers:
        for packet in heard:
            next(iter(writers.values())).hear(packet)
    heard.clear()


def batches(shots: Iterator[Shot], faces: int) -> Iterator[list[Shot]]:
    """Frames in lists of about so many faces."""
    batch: list[Shot] = []
    for shot in shots:
        batch.append(shot)
        if sum(max(1, len(shot.faces)) for shot in batch) >= faces:
            yield batch
            batch = []
    if batch:
        yield batch
