"""Find faces (MTCNN, five points each) and cut the FFHQ crop around them.

    aligner = Aligner()
    for face in aligner.detect(picture):            # largest first; an empty list where none is
        crop = aligner.crop(picture, face, 256)

The picture is an upright PIL picture, as `generators.images.open_image` returns it. MTCNN: Zhang et
al. 2016, "Joint Face Detection and Alignment using Multitask Cascaded Convolutional Networks", with
the weights that come inside the facenet-pytorch package: nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from encoder.engines import Backend, use_in
from encoder.geometry import Array, ffhq_square, square_matrix, warp

SMALLEST_FACE = 20  # pixels; MTCNN was trained on faces from 12 up, and errs much below 20


@dataclass(frozen=True)
class Face:
    """One face, in pixels of the picture it was found in."""

    points: Array
    """(5, 2) left eye, right eye, nose, left and right mouth corner; left in the picture"""
    box: Array
    """(4,) left, top, right, bottom"""
    score: float
    """probability of a face, 0 to 1"""

    @property
    def matrix(self) -> Array:
        """(2, 3) unit square of the FFHQ crop -> picture, for `geometry.warp` and `paste`."""
        return square_matrix(ffhq_square(self.points))

    @property
    def area(self) -> float:
        left, top, right, bottom = self.box
        return float((right - left) * (bottom - top))


class Aligner:
    """MTCNN on a reduced copy of the picture; the crop is cut from the picture itself."""

    def __init__(
        self,
        device: str | torch.device = "cpu",
        min_face: float = 1 / 12,
        min_score: float = 0.9,
        longest_side: int = 1024,
        backend: Backend = "torch",
        threads: int = 1,
    ) -> None:
        """
        Args:
            min_face: smallest face to look for at first, as a part of the picture's shorter side;
                where none is found, down to 20 pixels of the copy.
            min_score: detections below this probability are dropped, 0 to 1.
            longest_side: longest side in pixels of the copy that is searched.
            backend, threads: what runs the networks on a CPU, see `encoder.engines`.
        """
        if not 0 < min_face <= 1:
            raise ValueError(f"min_face is a part of the shorter side, 0 to 1, not {min_face}")
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score is a probability, 0 to 1, not {min_score}")
        if longest_side < SMALLEST_FACE:
            raise ValueError(f"longest_side must be at least {SMALLEST_FACE}, not {longest_side}")
        self.min_face = min_face
        self.min_score = min_score
        self.longest_side = longest_side
        from facenet_pytorch import (
            MTCNN,
        )  # brings torchvision, seconds that --help need not wait for

        device = torch.device(device)
        device = torch.device("cpu") if device.type == "mps" else device  # which lacks its poolings
        self.mtcnn = MTCNN(device=device).eval().requires_grad_(False)
        use_in(self.mtcnn, backend, threads)

    def detect(self, picture: Image.Image) -> list[Face]:
        """Faces in an upright picture, largest first; empty where there is none."""
        shrink = max(1.0, max(picture.size) / self.longest_side)
        width, height = (max(1, round(side / shrink)) for side in picture.size)
        shorter = min(width, height)
        if shorter < SMALLEST_FACE:
            return []
        copy = picture
        if shrink > 1:
            copy = picture.resize((width, height), Image.Resampling.BOX, reducing_gap=2)
        copy = copy.convert("RGB")
        ratio = np.array(picture.size) / np.array(copy.size)

        smallest = max(SMALLEST_FACE, int(self.min_face * shorter))
        faces = self._search(copy, smallest, ratio)
        if not faces and smallest > SMALLEST_FACE:
            faces = self._search(copy, SMALLEST_FACE, ratio)
        return sorted(faces, key=lambda face: face.area, reverse=True)

    def crop(self, picture: Image.Image, face: Face, size: int) -> Image.Image:
        """The FFHQ crop of `face`, size x size; mirrored at the picture's borders."""
        return warp(picture, face.matrix, size)

    def _search(self, copy: Image.Image, smallest: int, ratio: Array) -> list[Face]:
        """One pass over the copy; `ratio` (2,) takes its pixels to the picture's."""
        self.mtcnn.min_face_size = smallest
        boxes, scores, points = self.mtcnn.detect(copy, landmarks=True)
        if boxes is None:  # MTCNN's way of saying "no face"
            return []
        return [
            Face(np.float64(point) * ratio, np.float64(box) * np.tile(ratio, 2), float(score))
            for box, score, point in zip(boxes, scores, points, strict=True)
            if score >= self.min_score
        ]
