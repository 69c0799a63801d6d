"""What to cut out of a picture: people's faces, what a cascade finds, or the central square.

    detect = people("cpu")                              # or cascade(Path("face.xml")), or your own
    for found in detect(picture):                       # largest first
        crop = warp(picture, found.matrix, 256)

And the networks that enlarge what is too small: `load_upscaler`.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from encoder.align import Aligner
from encoder.geometry import UNIT_SQUARE, Array, square_matrix
from generators.images import to_pil, to_tensor

SEARCHED = 1024  # pixels; longest side of the copy that a cascade searches
MARGIN = 1.5  # square cut around a cascade's box, in sides of the box: the whole head


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
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        elif path.suffix == ".pth":
            weights = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise ValueError(f"An upscaler is a .safetensors or .pth file, not {path.name}.")
        loader = spandrel.ModelLoader("cpu")
        model: Any = loader.load_from_state_dict(spandrel.canonicalize_state_dict(weights))
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        spandrel.UnsupportedModelError,
    ) as error:
        raise ValueError(f"{path} holds no super-resolution network that is known.") from error
    if not isinstance(model, spandrel.ImageModelDescriptor) or model.input_channels != 3:
        raise ValueError(f"{path} is no network for RGB pictures.")
    model.eval().to(device)

    @torch.inference_mode()
    def upscale(picture: Image.Image) -> Image.Image:
        pixels = (to_tensor(picture)[None].to(device) + 1) / 2
        return to_pil(model(pixels)[0] * 2 - 1)

    return upscale
