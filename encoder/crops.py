"""One raw picture to its crops: decode, detect, filter, cut, enlarge, hash.

config = CropConfig(size=256)
rows = examine("me.jpg", Path("me.jpg"), config, config.load_detector())
"""

import io
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from encoder.dedup import dhash
from encoder.detect import Detector, Found, Upscaler, cascade, central_square, people
from encoder.geometry import warp
from generators.images import decode, fit, to_float, to_pil

FEATURES = datasets.Features(
    {"image": datasets.Image()}
    | {"source": datasets.Value("string")}
    | {name: datasets.Value("int32") for name in ("face", "width", "height")}
    | {name: datasets.Value("float32") for name in ("left", "top", "right", "bottom", "side")}
    | {"score": datasets.Value("float32"), "upscaled": datasets.Value("bool")}
)
COLUMNS = FEATURES.arrow_schema.names
SHARD_SCHEMA = pa.schema(
    [*FEATURES.arrow_schema, ("hash", pa.uint64()), ("reason", pa.string()), ("more", pa.int32())]
)


@dataclass(frozen=True)
class CropConfig:
    size: int = 256  # side of the crops in pixels
    detector: Literal["people", "cascade", "none"] = "people"  # none: the central square
    cascade: Path | None = None  # OpenCV 4's .xml file for --detector cascade, LBP or Haar
    faces: Literal["largest", "all"] = "largest"  # of each picture
    min_side: int = 64  # smallest square to cut, in pixels of the source
    min_score: float | None = None  # people: probability, 0.9; cascade: agreeing windows, 5
    min_sharpness: float = 0.0  # variance of the crop's Laplacian in grey levels; 0: any
    upscaler: Path | None = None  # super-resolution .safetensors or .pth; without: Lanczos
    device: str = "cpu"  # of detector and upscaler

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 4096 or self.min_side < 1:
            raise ValueError("--size is 8 to 4096, --min-side is 1 or more.")
        if (self.detector == "cascade") != (self.cascade is not None):
            raise ValueError("--detector cascade and --cascade FILE go together.")

    def load_detector(self) -> Detector:
        """ValueError where it cannot be had."""
        score = {} if self.min_score is None else {"min_score": self.min_score}
        if self.cascade is not None:
            return cascade(self.cascade, **score)
        return central_square() if self.detector == "none" else people(self.device, **score)


@dataclass(frozen=True)
class Row:
    """What became of one face, or of an input without any; the columns of the data set."""

    source: str
    face: int = 0  # the largest of its picture is 0
    width: int = 0  # of the picture in pixels, 0 where it cannot be read
    height: int = 0
    left: float = 0.0  # box of the face in the picture
    top: float = 0.0
    right: float = 0.0
    bottom: float = 0.0
    side: float = 0.0  # of the square that was cut, pixels of the picture
    score: float | None = None
    upscaled: bool = False  # by the upscaler
    hash: int = 0
    reason: str = ""  # why it was rejected, variable parts in brackets
    more: int = 0  # faces of the picture that were not asked for
    image: dict[str, Any] | None = None  # the crop; of a rejected picture a small copy


def examine(
    name: str,
    source: Path | bytes,
    config: CropConfig,
    detector: Detector,
    upscaler: Upscaler | None = None,
) -> list[Row]:
    """The crops of one picture with what was found out about each; never empty."""
    row = Row(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = decode(source, name)
    except ValueError as error:
        return [replace(row, reason=str(error).removeprefix(f"Cannot read {name}: ").rstrip("."))]
    row = replace(row, width=picture.width, height=picture.height)
    try:
        found = detector(picture)
    except ValueError:  # five points in one place, which are no face
        found = []
    if not found:
        return [replace(row, reason="no face found", image=_thumbnail(picture))]
    wanted = found[:1] if config.faces == "largest" else found
    rows = []
    for number, one in enumerate(wanted):
        side = float(min(picture.size) if one.matrix is None else np.hypot(*one.matrix[:, 0]))
        left, top, right, bottom = one.box
        row = replace(row, face=number, left=left, top=top, right=right, bottom=bottom, side=side)
        row = replace(row, score=one.score, upscaled=False, more=len(found) - len(wanted))
        if side < config.min_side:
            reason = f"the square is too small ({round(side)} pixels)"
            rows.append(replace(row, reason=reason, image=_thumbnail(picture)))
            continue
        crop = _cut(picture, one, config.size)
        row = replace(row, upscaled=upscaler is not None and side < config.size)
        if upscaler is not None and row.upscaled:
            crop = upscaler(_cut(picture, one, round(side)))
            crop = crop.resize((config.size, config.size), Image.Resampling.LANCZOS)
        sharpness = _sharpness(crop)
        blurred = f"it is blurred ({sharpness:.1f})" if sharpness < config.min_sharpness else ""
        rows.append(replace(row, image=_encoded(crop), hash=dhash(crop), reason=blurred))
    return rows


def _cut(picture: Image.Image, found: Found, size: int) -> Image.Image:
    if found.matrix is None:
        return to_pil(to_float(fit(picture, size)))
    return warp(picture, found.matrix, size)


def _sharpness(crop: Image.Image) -> float:
    grey = np.asarray(crop.convert("L"), np.float64)
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * grey[1:-1, 1:-1]).var())


def _thumbnail(picture: Image.Image) -> dict[str, Any]:
    small = picture.copy()
    small.thumbnail((96, 96), reducing_gap=2)
    return _encoded(small)


def _encoded(picture: Image.Image) -> dict[str, Any]:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}
