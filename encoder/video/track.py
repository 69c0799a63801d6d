"""Faces followed from frame to frame, at a fraction of what finding them anew costs.

    tracker = Tracker(Aligner())                                # one for each film or camera
    for time, picture in frames:                                # seconds, an RGB picture
        for track in tracker(picture, time):                    # largest first
            crop = aligner.crop(picture, track.face, 256)
            ws = tracker.smooth_ws(track, encode(crop), time)

MTCNN's three networks find faces in a small copy of a frame, every `every` frames and when a face
is lost. Between, its last network alone looks where the face was: it refines the box and the five
points, and says whether that is a face still. What moves the least is smoothed the most: the
One-Euro filter, Casiez et al. 2012, "1 € Filter: A Simple Speed-based Low-pass Filter for Noisy
Input in Interactive Systems".

Shape letters: N faces, L layers of w+, D dimension of w.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoder.align import Aligner, Face
from encoder.geometry import Array, ffhq_square

LOOKED_AT = 48  # side of what MTCNN's last network sees, in pixels
LEAST = 0.7  # probability of a face below which it is lost: MTCNN's own for this network
SURE = 0.95  # the same where full searches do not find it: then the network is alone in seeing it
LONGEST = 480  # longest side in pixels of the copy that is searched
SAME = 0.3  # boxes that overlap by so much of their union show one face
JUMP = 0.25  # of the crop's side between two frames: it is another scene, and nothing is smoothed
AGAIN = 3  # frames from one search to the next where a face is missing
LARGER = 2.0  # times the area: then the largest face is another one

# Chosen by benchmarks/film.py, whose table docs show: flicker beside the lag in frames.
POINTS_CUTOFF, POINTS_BETA = 1.0, 40.0  # Hz; Hz per side of the crop and second
WS_CUTOFF, WS_BETA = 1.0, 10.0  # Hz; Hz per root mean square of w and second

V = TypeVar("V", Array, Tensor)


class OneEuro(Generic[V]):
    """A low-pass filter whose cutoff rises with speed: slow jitter goes, motion stays in time.

    All values of an array share one cutoff, from the root mean square of their speeds, so that the
    shape of the five points, or the direction of w, is kept. Casiez et al. 2012, algorithm 1.
    """

    def __init__(self, cutoff: float, beta: float, speed_cutoff: float = 1.0) -> None:
        """
        Args:
            cutoff: of what stands still, in Hz; lower: calmer.
            beta: Hz more per unit of speed; higher: less behind what moves.
            speed_cutoff: of the speed itself, in Hz.
        """
        self.cutoff, self.beta, self.speed_cutoff = cutoff, beta, speed_cutoff
        self.last: tuple[float, V, V, V] | None = None  # time, value, smoothed value, speed

    def __call__(self, value: V, time: float, unit: float = 1.0) -> V:
        """The smoothed value at `time` seconds; speeds are counted in `unit`s a second."""
        if self.last is None:
            self.last = time, value, value, 0 * value
            return value
        before, raw, smooth, speed = self.last
        passed = time - before
        if passed > 0:
            step = (value - raw) / (passed * unit)
            speed = speed + _share(self.speed_cutoff, passed) * (step - speed)
            fast = math.sqrt(float((speed**2).mean()))
            smooth = smooth + _share(self.cutoff + self.beta * fast, passed) * (value - smooth)
            self.last = time, value, smooth, speed
        return smooth


def _share(cutoff: float, passed: float) -> float:
    """Of the new value, after `passed` seconds: Casiez et al. 2012, eq. 2 and 3."""
    turn = 2 * math.pi * cutoff * passed
    return turn / (1 + turn)


@dataclass
class Track:
    """One face for as long as it is followed."""

    number: int  # 1, 2, …: the same face keeps it, no other gets it
    face: Face  # in pixels of the newest frame it was seen in; its points are smoothed
    seen: float  # seconds: when that was
    lost: bool = False  # not in the newest frame
    unfound: int = 0  # searches in a row that did not find it
    begun: bool = False
    points: OneEuro[Array] | None = field(default=None, repr=False)
    ws: OneEuro[Tensor] | None = field(default=None, repr=False)

    def begin(self, smoothing: float) -> None:
        """New filters, which know nothing of what was; none for a smoothing of 0."""
        self.begun = True
        if smoothing:
            self.points = OneEuro(POINTS_CUTOFF / smoothing, POINTS_BETA / smoothing)
            self.ws = OneEuro(WS_CUTOFF / smoothing, WS_BETA / smoothing)


class Tracker:
    """The faces of one film or camera, each with a number of its own."""

    def __init__(
        self,
        aligner: Aligner,
        *,
        most: int | None = 1,  # faces that are followed, the largest; None: all
        every: int = 30,  # frames from one full search to the next
        smoothing: float = 1.0,  # 0: none; 2: half the cutoffs
        patience: float = 0.5,  # seconds that a lost face's number is kept for its return
    ) -> None:
        if (most is not None and most < 1) or every < 1:
            raise ValueError("a tracker follows 1 face or more, and searches every frame or less")
        if not (0 <= smoothing < math.inf and 0 <= patience < math.inf):
            raise ValueError("smoothing and patience are numbers of 0 or more")
        self.aligner, self.most, self.every = aligner, most, every
        self.smoothing, self.patience = smoothing, patience
        self.tracks: list[Track] = []
        self.numbers = 0  # given so far
        self.since = every  # frames since the last full search

    def __call__(self, picture: Image.Image, time: float) -> list[Track]:
        """The faces of the next frame, an upright RGB picture, largest first; then those that are
        lost and may return, where they were. `time` in seconds must not go back."""
        self.tracks = [t for t in self.tracks if not t.lost or time - t.seen <= self.patience]
        self.look(picture, self.tracks, time)
        self.since += 1
        found = bool(self.tracks) and not any(track.lost for track in self.tracks)
        if self.since >= (self.every if found else min(self.every, AGAIN)):
            self.search(picture, time)
        self.tracks.sort(key=lambda track: (track.lost, -track.face.area))
        return list(self.tracks)

    @staticmethod
    def smooth_ws(track: Track, ws: Tensor, time: float) -> Tensor:
        """ws (L, D) or (1, L, D) of the track's crop at `time` -> the same, smoothed."""
        if track.ws is None:
            return ws
        unit = math.sqrt(float((ws**2).mean())) or 1.0  # so that no generator's scale matters
        return track.ws(ws, time, unit)

    # ------------------------------------------------------------------------- what it does

    def look(self, picture: Image.Image, tracks: list[Track], time: float) -> None:
        """Moves each track to where its face is now, or finds it lost."""
        for track, face in zip(tracks, self.refined(picture, tracks), strict=True):
            track.lost = face.score < (SURE if track.unfound > 1 else LEAST)
            if not track.lost:
                self.move(track, face, time)
        found: list[Track] = []
        for track in [t for t in tracks if not t.lost]:  # the older of two on one face stays
            if any(overlap(track.face.box, other.face.box) > SAME for other in found):
                self.tracks.remove(track)
            else:
                found.append(track)

    def refined(self, picture: Image.Image, tracks: list[Track]) -> list[Face]:
        """What MTCNN's last network says of the squares around the tracks' boxes."""
        if not tracks:
            return []
        squares = [square_around(track.face.box) for track in tracks]
        looks = [cut(picture, square).resize((LOOKED_AT,) * 2, Image.Resampling.BOX)
                 for square in squares]  # fmt: skip
        pixels = torch.from_numpy(np.stack([np.asarray(look) for look in looks]))
        images = (pixels.permute(0, 3, 1, 2).float() - 127.5) / 128  # (N, 3, 48, 48), as trained
        mtcnn = self.aligner.mtcnn
        with torch.inference_mode():
            outputs = mtcnn.onet(images.to(mtcnn.device))
        edges, points, scores = (output.double().cpu().numpy() for output in outputs)
        faces = []
        for i, (left, top, right, _) in enumerate(squares):
            side, corner = right - left, np.array([left, top])
            five = points[i].reshape(2, 5).T * side + corner
            box = edges[i] * side + np.array(squares[i])
            faces.append(Face(five, box, float(scores[i, 1])))
        return faces

    def search(self, picture: Image.Image, time: float) -> None:
        """Finds faces anew: new ones become tracks, lost ones may be found."""
        self.since = 0
        shrink = max(1.0, max(picture.size) / LONGEST)
        width, height = (max(1, round(side / shrink)) for side in picture.size)
        copy = picture.resize((width, height), Image.Resampling.BOX) if shrink > 1 else picture
        ratio = np.array(picture.size) / np.array(copy.size)
        free, new = list(self.tracks), []
        for small in self.aligner.detect(copy):
            face = Face(small.points * ratio, small.box * np.tile(ratio, 2), small.score)
            near = max(free, key=lambda track: overlap(track.face.box, face.box), default=None)
            if near is None or overlap(near.face.box, face.box) <= SAME:
                new.append(face)
                continue
            free.remove(near)
            near.unfound = 0
            if near.lost:
                near.face = replace(face, points=near.face.points)
                self.look(picture, [near], time)
        for track in free:
            track.unfound += 1
        self.add(picture, new, time)

    def add(self, picture: Image.Image, faces: list[Face], time: float) -> None:
        """New tracks for the largest of the faces, as many as may be followed."""
        kept = [track for track in self.tracks if not track.lost]
        tracks = [Track(0, face, time) for face in faces]
        for track, face in zip(tracks, self.refined(picture, tracks), strict=True):
            if face.score < LEAST:  # the two must agree, or it is lost in the next frame
                continue
            if self.most is not None and len(kept) >= self.most:
                smallest = min(kept, key=lambda track: track.face.area)
                if face.area < LARGER * smallest.face.area:
                    break
                kept.remove(smallest)
                self.tracks.remove(smallest)
            self.numbers += 1
            track.number = self.numbers
            self.move(track, face, time)
            kept.append(track)
            self.tracks.append(track)

    def move(self, track: Track, face: Face, time: float) -> None:
        """Puts a track to where its face was found; points smoothed, but for a jump."""
        side = float(np.hypot(*(np.diff(ffhq_square(face.points)[:2], axis=0)[0])))
        points = face.points
        far = float(np.hypot(*(points - track.face.points).mean(axis=0)))
        if not track.begun or far > JUMP * side:
            track.begin(self.smoothing)
        if track.points is not None:
            points = track.points(points, time, side)
        track.face, track.seen = Face(points, face.box, face.score), time


def overlap(a: Array, b: Array) -> float:
    """Of two boxes (4,): what they share, as a part of what they cover together, 0 to 1."""
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = max(0.0, float(width)) * max(0.0, float(height))
    both = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - shared
    return shared / both if both > 0 else 0.0


def cut(picture: Image.Image, square: tuple[int, int, int, int]) -> Image.Image:
    """The square of the picture; grey, which the network reads as 0, where that ends. So a face
    is followed until half of it has left the frame."""
    left, top, right, bottom = square
    if left >= 0 and top >= 0 and right <= picture.width and bottom <= picture.height:
        return picture.crop(square)
    result = Image.new("RGB", (right - left, bottom - top), (127, 127, 127))
    result.paste(picture, (-left, -top))
    return result


def square_around(box: Array) -> tuple[int, int, int, int]:
    """The box made a square of its longer side, in whole pixels."""
    side = max(1, round(float((box[2:] - box[:2]).max())))
    left, top = (round(float(x)) for x in (box[:2] + box[2:] - side) / 2)
    return left, top, left + side, top + side
