"""A clip as a webcam might see it, made from pictures of examples/: zoom, turn, pan, light, noise.

    clip = Clip([open_image("examples/astronaut.jpg")], (640, 480), seconds=10, fps=30)
    for time, frame in clip.frames(): …                  # seconds, an RGB picture
    clip.motion(2.5)                                     # (2, 3): first picture -> frame at 2.5 s

The motion is known, so that what a tracker finds can be held against the truth. The head does not
turn in depth: a picture has none; it is squeezed a little, as it would be.

    0 to 3 s    nearly still, slowly nearer
    3 to 6 s    tilts to both sides, is squeezed
    6 to 8 s    moves across, about half a crop a second at most
    8 to 10 s   the light goes down by half and turns warm, and comes back

Longer clips begin again. The pictures stand side by side, each scaled so that its face fills the
same part of the frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from encoder.align import Aligner, Face
from encoder.geometry import Array, apply, compose, invert

PERIOD = 10.0  # seconds
STILL = 3.0  # seconds of it in which the face hardly moves
NOISE = 2.0  # standard deviation of each pixel, of 255
FACE = 0.55  # of a frame's height that the crop's side takes where there is one face
BORDER = 1.0  # of a picture's side that is mirrored beyond its borders


class Clip:
    def __init__(
        self,
        pictures: Sequence[Image.Image],
        size: tuple[int, int] = (640, 480),
        seconds: float = PERIOD,
        fps: float = 30.0,
        aligner: Aligner | None = None,  # finds the faces in the pictures themselves
    ) -> None:
        aligner = aligner or Aligner()
        self.size, self.seconds, self.fps = size, seconds, fps
        self.faces: list[Face] = [aligner.detect(picture)[0] for picture in pictures]
        self.rests: list[Array] = []  # (2, 3) of each picture: its pixels -> the frame at rest
        self.padded: list[tuple[Image.Image, Array]] = []  # and its pixels there -> its own
        column = size[0] / len(pictures)
        for i, (picture, face) in enumerate(zip(pictures, self.faces, strict=True)):
            scale = min(FACE * size[1], 0.8 * column) / _side(face)
            centre = apply(face.matrix, [[0.5, 0.5]])[0]
            target = np.array([(i + 0.5) * column, 0.5 * size[1]])
            rest = np.column_stack([scale * np.eye(2), target - scale * centre])
            self.rests.append(rest)
            pad = round(BORDER * max(picture.size))
            pixels = np.pad(np.asarray(picture), ((pad, pad), (pad, pad), (0, 0)), "symmetric")
            own = np.array([[1.0, 0, -pad], [0, 1.0, -pad]])
            self.padded.append((Image.fromarray(pixels), own))

    def motion(self, time: float, picture: int = 0) -> Array:
        """(2, 3) from a picture's pixels to the frame's."""
        return compose(self._move(time, picture), self.rests[picture])

    def points(self, time: float, picture: int = 0) -> Array:
        """(5, 2): where MTCNN's points of the picture are in the frame."""
        return apply(self.motion(time, picture), self.faces[picture].points)

    def times(self) -> list[float]:
        return [i / self.fps for i in range(round(self.seconds * self.fps))]

    def frames(self) -> Iterator[tuple[float, Image.Image]]:
        rng = np.random.default_rng(0)
        for time in self.times():
            pixels = np.asarray(self._still(time), np.float32) * _light(time)
            pixels += NOISE * rng.standard_normal(pixels.shape, np.float32)
            yield time, Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))

    def _still(self, time: float) -> Image.Image:
        width, height = self.size
        frame = Image.new("RGB", self.size)
        for i, (padded, own) in enumerate(self.padded):
            back = compose(invert(own), invert(self.motion(time, i)))
            left = round(i * width / len(self.padded))
            back = compose(back, np.array([[1.0, 0, left], [0, 1.0, 0]]))
            extent = (round((i + 1) * width / len(self.padded)) - left, height)
            part = padded.transform(
                extent, Image.Transform.AFFINE, back.ravel().tolist(), Image.Resampling.BICUBIC
            )
            frame.paste(part, (left, 0))
        return frame

    def _move(self, time: float, picture: int) -> Array:
        """(2, 3) of the frame at rest, about the middle of the picture's column."""
        t = time % PERIOD
        zoom = 1 + 0.15 * math.sin(math.pi * min(t, 3) / 6) - 0.15 * _ramp(t, 8, 10)
        tilt = math.radians(14) * math.sin(2 * math.pi * (t - 3) / 3) if 3 < t < 6 else 0.0
        squeeze = 1 - 0.12 * math.sin(math.pi * (t - 3) / 3) ** 2 if 3 < t < 6 else 1.0
        sway = 0.004 * math.sin(2 * math.pi * t / 4)
        across = 0.12 * math.sin(math.pi * (t - 6)) if 6 < t < 8 else 0.0
        centre = apply(self.rests[picture], apply(self.faces[picture].matrix, [[0.5, 0.5]]))[0]
        shift = np.array([(across + sway) * self.size[1], 0.3 * sway * self.size[1]])
        cos, sin = math.cos(tilt), math.sin(tilt)
        linear = zoom * np.array([[cos, -sin], [sin, cos]]) @ np.diag([squeeze, 1.0])
        return np.column_stack([linear, centre + shift - linear @ centre])


def _ramp(t: float, start: float, stop: float) -> float:
    x = min(max((t - start) / (stop - start), 0.0), 1.0)
    return x * x * (3 - 2 * x)


def _light(time: float) -> np.ndarray:
    """What red, green and blue are multiplied by."""
    t = time % PERIOD
    down = math.sin(math.pi * (t - 8) / 2) ** 2 if t > 8 else 0.0
    return np.float32([1 - 0.35 * down, 1 - 0.5 * down, 1 - 0.6 * down])


def _side(face: Face) -> float:
    return float(np.hypot(*face.matrix[:, 0]))
