"""The frames of a film with their faces: followed, placed, cut out.

    follow = follower(translator, config)                       # one for each film
    for shot in shots_of(film.frames(), follow, Places(1), translator):
        for seen in shot.faces: …                               # its track, place and crop

Shape letters: L layers of w+, D dimension of w.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoder.align import Face
from encoder.films import read_film
from encoder.geometry import Array
from encoder.options import FollowConfig
from encoder.pipeline import Translator
from encoder.video.trace import read_trace
from encoder.video.track import Track, Tracker
from generators.latents import truncate

ENOUGH = 5  # frames that a face is there before it counts for the length of the row


@dataclass
class Seen:
    """One face of one frame: its track as it was then, and what is to be drawn of it."""

    track: Track
    place: int  # in the row of drawings, from 0
    matrix: Array | None = None  # (2, 3) of its crop in the frame
    crop: Image.Image | None = None  # None: lost, or known by its latent
    ws: Tensor | None = None  # (L, D)
    shown: dict[str, Image.Image] = field(default_factory=dict)  # its pictures, once drawn


@dataclass
class Shot:
    """One frame."""

    time: float  # seconds
    picture: Image.Image | None  # None: only its latents are known
    faces: list[Seen] = field(default_factory=list)


class Places:
    """Who stands where in the row of drawings: a face keeps its place while it is there."""

    def __init__(self, count: int | None) -> None:
        self.count = count  # None: as many as there are faces
        self.of: dict[int, int] = {}  # {number of a track: its place}

    def __call__(self, tracks: list[Track]) -> list[tuple[int, Track]]:
        there = {track.number for track in tracks}
        self.of = {number: place for number, place in self.of.items() if number in there}
        lost = [t.number for t in tracks if t.lost and t.number in self.of]
        new = [t for t in tracks if t.number not in self.of and not t.lost]
        for track in sorted(new, key=lambda track: track.face.box[0]):  # left to right
            free = set(range(self.count or len(self.of) + 1)) - set(self.of.values())
            if not free and lost:
                free = {self.of.pop(lost.pop())}
            if free:
                self.of[track.number] = min(free)
        return [(self.of[t.number], t) for t in tracks if t.number in self.of]


def follower(translator: Translator, config: FollowConfig) -> Callable[..., list[Track]]:
    """A tracker for one film; without alignment the whole frame is its one face."""
    if translator.aligner is not None:
        most = 1 if config.faces == "largest" else None
        every, smoothing = config.detect_every, config.smoothing
        return Tracker(translator.aligner, most=most, every=every, smoothing=smoothing)
    track = Track(1, Face(np.zeros((5, 2)), np.zeros(4), 1.0), 0.0)
    track.begin(config.smoothing)
    return lambda picture, time: [track]


def most_at_once(path: Path, translator: Translator, config: FollowConfig) -> int:
    """How many faces a film shows at a time, but for those that are there for a moment."""
    follow, most = follower(translator, config), 1
    ages: dict[int, int] = {}
    with read_film(path) as film:
        for count, (time, picture) in enumerate(film.frames(), 1):
            tracks = follow(picture, time)
            ages = {track.number: ages.get(track.number, 0) + 1 for track in tracks}
            most = max(most, sum(age >= min(ENOUGH, count) for age in ages.values()))
    return most


def shots_of(
    frames: Iterable[tuple[float, Image.Image]],
    follow: Callable[..., list[Track]],
    places: Places,
    translator: Translator,
) -> Iterator[Shot]:
    """Frames with their faces cut out."""
    for time, picture in frames:
        shot = Shot(time, picture)
        for place, track in places(follow(picture, time)):
            seen = Seen(copy.copy(track), place)  # the track itself goes on
            if translator.aligner is None:
                seen.matrix, seen.crop = central_square(picture), translator.crop(picture)
            else:
                seen.matrix = track.face.matrix
                seen.crop = None if track.lost else translator.crop(picture, track.face)
            shot.faces.append(seen)
        yield shot


def central_square(picture: Image.Image) -> Array:
    """(2, 3) of what `Translator.crop` takes of a picture without a face."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return np.array([[side, 0, left], [0, side, top]], np.float64)


def shots_of_latents(path: Path, translator: Translator) -> list[Shot]:
    """The frames of a film of which only the latents are known."""
    times, numbers, points, ws = read_trace(path, translator.face)
    ws = translator.edited(truncate(ws, translator.face.ws_avg.cpu(), translator.truncation))
    places, shots = Places(None), []
    for time, rows in groupby(range(len(times)), lambda i: float(times[i])):
        of = {int(numbers[i]): i for i in rows}
        boxes = {n: torch.cat([points[i].amin(0), points[i].amax(0)]) for n, i in of.items()}
        tracks = [
            Track(n, Face(points[i].numpy(), boxes[n].numpy(), 1.0), time) for n, i in of.items()
        ]
        placed = places(tracks)
        shots.append(Shot(time, None, [Seen(t, p, ws=ws[of[t.number]]) for p, t in placed]))
    return shots
