"""The options that commands share; without torch, so that --help and mistakes are answered at once.

    @dataclass(frozen=True, kw_only=True)
    class MyConfig(FilesConfig, Drawing): …        # pictures in, results out, drawn by the networks
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from generators.bundled import FACE, companion
from generators.command import printable

# What infer writes of a picture, and what its name ends in:
ENDINGS = {"anime": ".png", "aligned": "_aligned.png", "reconstruction": "_reconstruction.png",
           "latents": "_latents.safetensors", "grid": "_grid.png"}  # fmt: skip
LARGEST = 8192  # side of a written picture in pixels

# --------------------------------------------------------------------------- networks


@dataclass(frozen=True, kw_only=True)
class Models:
    """The networks that look at photos and draw; "auto" is what belongs to the face generator, of
    one that is not bundled, the default's."""

    face_generator: str = FACE  # face128, face64 (smaller and faster), or a .safetensors file
    anime_generator: str = "auto"  # a fine-tune of it: the style "anime"; bundled name or file
    encoder: str = "auto"  # trained for it; bundled name or file

    def __post_init__(self) -> None:
        for role, kind in (("anime_generator", "anime"), ("encoder", "encoder")):
            if getattr(self, role) == "auto":
                object.__setattr__(self, role, belonging(self.face_generator, kind))

    def styles_of(self, styles: str) -> dict[str, str]:
        """See `styles_of`."""
        return styles_of(styles, self.face_generator, self.anime_generator)


def belonging(face_generator: str, kind: str) -> str:
    """The bundled model of a kind, for that face generator or for the default."""
    return companion(face_generator, kind) or companion(FACE, kind) or ""


@dataclass(frozen=True, kw_only=True)
class Networks(Models):
    """Options of every command that looks at photos and draws."""

    align: bool = True  # off: the pictures are aligned crops already
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the fastest that is here
    threads: int = 0  # of the CPU; 0: what fits the work


@dataclass(frozen=True, kw_only=True)
class Drawing(Networks):
    """Options of commands that draw one photo after the other."""

    backend: Literal["auto", "torch", "onnxruntime", "openvino"] = "auto"  # the last two: on a CPU


# ---------------------------------------------------------------------------- styles

STYLES = ("anime", "sketch", "paint")  # bundled, of each face generator


def styles_of(
    styles: str, face_generator: str = FACE, anime_generator: str = "auto"
) -> dict[str, str]:
    """{name: bundled name or file} of a comma list of names and NAME=FILE.

    The bundled ones are those of the face generator, "anime" is `anime_generator`. ValueError for a
    style that there is not, and for a name that cannot be a part of a file's name, or is one of
    what is written already.
    """
    known = {style: belonging(face_generator, style) for style in STYLES}
    short = {file: style for style, file in known.items()}
    if anime_generator != "auto":
        known["anime"] = anime_generator
    found: dict[str, str] = {}
    for given in styles.split(","):
        name, named, file = (part.strip() for part in given.partition("="))
        name = short.get(name, name)
        if not named and name not in known:
            raise ValueError(
                f"There is no style {printable(name) or 'without a name'}; choose from "
                f"{', '.join(STYLES)}, or give NAME=FILE.safetensors, a fine-tune of the face "
                "generator."
            )
        if named and not (re.fullmatch(r"[A-Za-z0-9-]{1,32}", name) and file):
            raise ValueError(
                f"A style of your own is NAME=FILE, its name of letters and digits, not "
                f"{printable(given)}."
            )
        if name in found or name in (ENDINGS.keys() | {"face"}) - {"anime"}:
            raise ValueError(f"The style {name} is there twice, or is no name for a style.")
        found[name] = file or known[name]
    return found


def endings_of(endings: Mapping[str, str], styles: Iterable[str]) -> dict[str, str]:
    """The endings with one for each style's drawing: that of "anime" for itself, else _STYLE and
    the same suffix."""
    suffix, rest = endings["anime"], {k: v for k, v in endings.items() if k != "anime"}
    return {s: suffix if s == "anime" else f"_{s}{suffix}" for s in styles} | rest


def drawn(save: str, styles: Iterable[str]) -> str:
    """A comma list of artefacts in which "anime" stands for the drawings of all styles."""
    names = [name.strip() for name in save.split(",")]
    return ",".join(",".join(styles) if name == "anime" else name for name in names)


# ------------------------------------------------------------------------------ edits


@dataclass(frozen=True)
class Edit:
    """So many steps along a direction of w+, in the layers first … last."""

    name: str
    strength: float  # steps: standard deviations of the data along the direction
    first: int = 0
    last: int | None = None  # None: to the last there is


def edits_of(given: Iterable[str]) -> tuple[Edit, ...]:
    """Edits of "smile=1.5", "pc3=-2@4-7", "yaw=1@0-"; ValueError for what is none."""
    edits = []
    for text in given:
        number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,2})?"
        found = re.fullmatch(rf"(.+)=({number})(?:@(\d{{1,4}})(-?)(\d{{0,4}}))?", text.strip())
        if found is None:
            raise ValueError(
                f"An edit is NAME=STEPS, or NAME=STEPS@LAYERS, such as smile=1.5 or pc3=-2@4-7, "
                f"not {printable(text) or 'nothing'}."
            )
        name, steps, first, to, last = found.groups()
        begin = int(first or 0)
        end = int(last) if last else None if to or not first else begin
        if end is not None and end < begin:
            raise ValueError(f"The layers of {printable(text)} end before they begin.")
        edits.append(Edit(name, float(steps), begin, end))
    return tuple(edits)


# ------------------------------------------------------------------------------ files


@dataclass(frozen=True, kw_only=True)
class FilesConfig:
    input: str  # a picture, a folder (with its sub-folders) or a quoted glob
    output: Path  # folder, made if need be; the same command goes on with what it holds
    overwrite: bool = False  # replace results that exist


def chosen(save: str, endings: Mapping[str, str]) -> dict[str, str]:
    """The endings of a comma list of artefacts; ValueError for one that there is not."""
    names = [name.strip() for name in save.split(",")]
    if unknown := sorted(set(names) - endings.keys()):
        raise ValueError(
            f"--save does not know {', '.join(unknown)}; choose from {', '.join(endings)}"
        )
    return {name: ending for name, ending in endings.items() if name in names}


def check_size(size: int | None) -> None:
    if size is not None and not 1 <= size <= LARGEST:
        raise ValueError(f"--size is a side in pixels, 1 to {LARGEST}, not {size}")


# ------------------------------------------------------------------------------ films


@dataclass(frozen=True, kw_only=True)
class FollowConfig:
    """Options of how faces are followed through a film."""

    faces: Literal["largest", "all"] = "largest"  # of each picture; of a film, all through it
    smoothing: float = 1.0  # of a film in time, of points and latents; 0: none, 2: twice as calm
    detect_every: int = 30  # frames of a film between full searches for faces

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < math.inf:
            raise ValueError(f"--smoothing is a number of 0 or more, not {self.smoothing}")
        if self.detect_every < 1:
            raise ValueError(f"--detect-every is 1 frame or more, not {self.detect_every}")


@dataclass(frozen=True, kw_only=True)
class DrawConfig(FollowConfig):
    """Options of what is drawn."""

    size: int | None = None  # side of the drawings in pixels; None: the generator's own
    batch_size: int = 8  # faces per pass
    layout: Literal["drawing", "side-by-side", "in-place"] = "drawing"  # of films; in their frames


# ------------------------------------------------------------------------------ infer


@dataclass(frozen=True, kw_only=True)
class InferConfig(FilesConfig, Drawing, DrawConfig):
    input: str  # a picture or film, a folder, a quoted glob, webcam:0, a film's latents
    styles: str = "anime"  # comma list of anime, sketch, paint, and NAME=FILE: a drawing of each
    save: str = "anime"  # comma list of anime (all styles), aligned, reconstruction, latents, grid
    superres: str = "superres64"  # enlarges to a --size above the generator's own; or: bicubic
    swap_resolution: int = 16  # blocks from this resolution on are the anime generator's
    truncation: float = 1.0  # below 1: closer to the average face
    style_limit: float = math.inf  # lower: cleaner drawings, higher (or inf): more of the photo
    refine_steps: int = 0  # of latent optimisation per picture; slower, and closer to the photo
    curvature: str | None = None  # curvature128: refine closer to the photo, less cleanly drawn
    edit: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # NAME=STEPS, again and again
    directions: str | None = None  # the file that names are of; None: the bundled generator's
    reference: str | None = None  # a drawing, or a folder of them: draw in its colours and manner
    reference_strength: float = 1.0  # 0: in those of the photo, 1: in those of the reference
    seed: int = 0  # which one of several references a photo gets
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"  # of encoder and synthesis

    def __post_init__(self) -> None:
        Models.__post_init__(self)
        FollowConfig.__post_init__(self)
        edits_of(self.edit)
        styles = self.styles_of(self.styles)
        chosen(self.save, ENDINGS)
        check_size(self.size)
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, not {self.batch_size}")
        if self.refine_steps < 0 or not math.isfinite(self.truncation):
            raise ValueError("--refine-steps must be 0 or more, and --truncation a number")
        if not 0 <= self.reference_strength <= 1:
            raise ValueError(f"--reference-strength is 0 to 1, not {self.reference_strength}")
        if self.reference and len(styles) > 1:
            raise ValueError("A --reference goes with one style; give --styles a single one.")
