"""One raw picture to its crops: decode, find what to cut out, filter, cut, enlarge, hash.

    config = CropConfig(size=256)
    rows = examine("me.jpg", Path("me.jpg"), config, config.load_detector())

A detector is any function of a picture: people's faces, what a cascade finds, the central square.
"""

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from encoder.align import Aligner
from encoder.geometry import UNIT_SQUARE, Array, square_matrix, warp
from generators.command import parse_device, printable
from generators.images import decode, fit, to_float, to_pil, to_tensor
from generators.tensors import read_weights

SEARCHED = 1024  # pixels; longest side of the copy that a cascade searches
MARGIN = 1.5  # square cut around a cascade's box, in sides of the box: the whole head
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

# ----------------------------------------------------------------------- what to cut out


@dataclass(frozen=True)
class Found:
    """A face, or another thing to cut out, in pixels of the picture."""

    box: tuple[float, float, float, float]  # left, top, right, bottom
    matrix: Array | None = None  # (2, 3) for `warp`, unit square -> picture; None: central square
    score: float | None = None


Detector = Callable[[Image.Image], list[Found]]  # largest first
Upscaler = Callable[[Image.Image], Image.Image]


def people(device: str, min_score: float = 0.9) -> Detector:
    """Faces of people by MTCNN, framed as FFHQ; the score is a probability."""
    aligner = Aligner(device, min_score=min_score)

    def detect(picture: Image.Image) -> list[Found]:
        return [
            Found(tuple(face.box.tolist()), face.matrix, face.score)
            for face in aligner.detect(picture)
        ]

    return detect


def cascade(file: Path, min_score: float = 5) -> Detector:
    """Any OpenCV 4 cascade (Viola and Jones 2001); the square is MARGIN times its box and lies a
    tenth of the box higher, for the hair. The score is the number of windows that agree.

    Raises ValueError without OpenCV 4, or when the file is no cascade.
    """
    try:
        import cv2
    except ImportError as error:
        raise ValueError("Cascades need OpenCV 4: pip install '.[prepare]'.") from error
    if not hasattr(cv2, "CascadeClassifier"):
        raise ValueError(
            f"OpenCV {cv2.__version__} has no cascades: pip install 'opencv-python-headless<5'."
        )
    if not file.is_file():  # a pipe would never end
        raise ValueError(f"There is no file {file}; give OpenCV's .xml file as --cascade.")
    cv2.setNumThreads(1)
    try:
        classifier = cv2.CascadeClassifier(str(file))
    except (cv2.error, SystemError):
        classifier = cv2.CascadeClassifier()
    if classifier.empty():
        raise ValueError(f"Cannot read {file} as a cascade; give OpenCV's .xml file.")
    agreeing = max(1, round(min_score))

    def detect(picture: Image.Image) -> list[Found]:
        grey = picture.convert("L")
        grey.thumbnail((SEARCHED, SEARCHED), Image.Resampling.BOX)
        ratio = picture.width / grey.width
        boxes, scores = classifier.detectMultiScale2(
            cv2.equalizeHist(np.asarray(grey)), minNeighbors=agreeing
        )
        found = []
        for (x, y, width, height), score in zip(boxes, scores, strict=True):
            side = max(width, height)
            centre = np.array([x + width / 2, y + height / 2 - side / 10])
            quad = (centre + MARGIN * side * (UNIT_SQUARE - 0.5)) * ratio
            box = (x * ratio, y * ratio, (x + width) * ratio, (y + height) * ratio)
            found.append(Found(box, square_matrix(quad), float(score)))
        return sorted(found, key=lambda one: (one.box[0] - one.box[2], *one.box))

    return detect


def central_square() -> Detector:
    """No detection: for pictures that are crops already."""

    def detect(picture: Image.Image) -> list[Found]:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        return [Found((left, top, left + side, top + side))]

    return detect


def load_upscaler(path: Path, device: str) -> Upscaler:
    """A super-resolution network of any kind that spandrel knows; nothing is unpickled.

    Raises ValueError when spandrel is missing or the file is not such a network.
    """
    try:
        import spandrel
    except ImportError as error:
        raise ValueError("Upscalers need spandrel: pip install '.[prepare]'.") from error
    weights = read_weights(path)
    try:
        loader = spandrel.ModelLoader("cpu")
        model: Any = loader.load_from_state_dict(spandrel.canonicalize_state_dict(weights))
    except Exception as error:  # its many networks raise nearly every type on foreign tensors
        raise ValueError(
            f"{path} holds no super-resolution network that spandrel knows; give another."
        ) from error
    if not isinstance(model, spandrel.ImageModelDescriptor) or model.input_channels != 3:
        raise ValueError(f"{path} is no network for RGB pictures; give another.")
    model.eval().to(device)

    @torch.inference_mode()
    def upscale(picture: Image.Image) -> Image.Image:
        pixels = (to_tensor(picture)[None].to(device) + 1) / 2
        return to_pil(model(pixels)[0] * 2 - 1)

    return upscale


# --------------------------------------------------------------------------- one picture


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
        if not all(map(math.isfinite, (self.min_score or 0, self.min_sharpness))):
            raise ValueError("--min-score and --min-sharpness are finite numbers.")
        parse_device(self.device)
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
        reason = str(error).removeprefix(f"Cannot read {printable(name)}: ").rstrip(".")
        return [replace(row, reason=reason)]
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


def dhash(image: Image.Image) -> int:
    """64 bits, row by row: whether each of 9 x 8 grey cells is brighter than its left neighbour."""
    small = image.convert("L").resize((9, 8), Image.Resampling.LANCZOS)
    cells = np.asarray(small, np.int16)  # (8, 9)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")
