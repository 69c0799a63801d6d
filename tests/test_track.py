"""The tracker: on pictures of faces that move, vanish and come back; the filter on plain signals.

pytest tests/test_track.py
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from encoder.align import Aligner
from encoder.video.track import OneEuro, Tracker, cut, overlap, square_around
from generators.images import open_image

EXAMPLES = Path(__file__).parent.parent / "examples"
EMPTY = Image.new("RGB", (320, 240), (90, 90, 90))


@pytest.fixture(scope="module")
def aligner() -> Aligner:
    return Aligner()


@pytest.fixture(scope="module")
def pair() -> Image.Image:
    """Two faces, the larger on the right."""
    return open_image(EXAMPLES / "two_faces.jpg").resize((404, 240))


@pytest.fixture(scope="module")
def one() -> Image.Image:
    return open_image(EXAMPLES / "astronaut.jpg").resize((256, 256))


def moved(picture: Image.Image, x: float, y: float = 0.0, zoom: float = 1.0) -> Image.Image:
    """The picture shifted by (x, y) and then enlarged; grey where there is none."""
    matrix = (1 / zoom, 0, -x, 0, 1 / zoom, -y)
    how = Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    return picture.transform(picture.size, *how, fillcolor=(90, 90, 90))


class Counting:
    """An aligner that counts its full searches."""

    def __init__(self, aligner: Aligner) -> None:
        self.mtcnn, self.aligner, self.searches = aligner.mtcnn, aligner, 0

    def detect(self, picture):
        self.searches += 1
        return self.aligner.detect(picture)


# ------------------------------------------------------------------------------ following


def test_follows_a_face_without_searching(aligner, one):
    counting = Counting(aligner)
    tracker = Tracker(counting, every=10, smoothing=0)
    for i in range(20):
        [track] = tracker(moved(one, 2 * i, i), i / 30)
        truth = aligner.detect(one)[0]
        side = np.hypot(*truth.matrix[:, 0])
        off = np.abs(track.face.points - truth.points - [2 * i, i]).max() / side
        assert track.number == 1 and not track.lost and off < 0.03, i
        assert overlap(track.face.box, truth.box + np.tile([2 * i, i], 2)) > 0.75
    assert counting.searches == 2


def test_numbers_stay_while_faces_move(aligner, pair):
    tracker = Tracker(aligner, most=None, every=5)
    first = {track.number: track.face.box[0] for track in tracker(pair, 0)}
    assert set(first) == {1, 2}
    for i in range(1, 12):
        tracks = tracker(moved(pair, -i), i / 30)
        assert {t.number for t in tracks} == {1, 2}
        assert all(abs(t.face.box[0] + i - first[t.number]) < 15 for t in tracks)
        assert tracks[0].face.area >= tracks[1].face.area


def test_of_several_faces_the_largest_is_followed(aligner, pair):
    [largest, _] = sorted(aligner.detect(pair), key=lambda face: -face.area)
    tracker = Tracker(aligner)
    for i in range(4):
        [track] = tracker(pair, i / 30)
        assert overlap(track.face.box, largest.box) > 0.6


def test_a_face_that_is_much_larger_takes_over(aligner, pair, one):
    tracker = Tracker(aligner, every=3)
    frame = Image.new("RGB", (600, 400), (90, 90, 90))
    frame.paste(one.resize((130, 130)), (20, 20))
    assert [t.number for t in tracker(frame, 0)] == [1]
    frame.paste(one.resize((390, 390)), (200, 5))
    numbers = [[t.number for t in tracker(frame, i / 30)] for i in range(1, 5)]
    assert numbers[-1] == [2]


def test_a_lost_face_keeps_its_number_for_a_while(aligner, one):
    tracker = Tracker(aligner, patience=0.3)
    tracker(one, 0)
    [gone] = tracker(EMPTY, 0.1)
    assert gone.lost and gone.number == 1
    [back] = tracker(one, 0.2)
    assert not back.lost and back.number == 1
    assert tracker(EMPTY, 0.3)[0].lost
    assert tracker(EMPTY, 0.9) == []
    times = iter(np.arange(1, 2, 0.03))
    found = next(tracks for t in times if (tracks := tracker(one, t)))  # every third is searched
    assert found[0].number == 2 and next(times) < 1.2


def test_no_face_is_no_track(aligner):
    tracker = Tracker(aligner, most=None)
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    for i, picture in enumerate([EMPTY, Image.fromarray(noise), Image.new("RGB", (7, 3))]):
        assert tracker(picture, i / 30) == []


def test_a_face_is_followed_half_out_of_the_frame(aligner, one):
    tracker = Tracker(aligner, smoothing=0)
    truth = aligner.detect(one)[0]
    gone = truth.box[0] + 0.35 * (truth.box[2] - truth.box[0])  # a third of it is cut
    shifts = np.arange(0, gone, 4)
    for i, x in enumerate(shifts):
        [track] = tracker(moved(one, -x).crop((0, 0, 256, 256)), i / 30)
        assert not track.lost
    [track] = tracker(one.crop((int(shifts[-1]), 0, 256, 256)), 9.0)
    assert not track.lost


def test_two_tracks_on_one_face_become_the_older(aligner, one):
    tracker = Tracker(aligner, most=None)
    tracker(one, 0)
    twin = type(tracker.tracks[0])(7, tracker.tracks[0].face, 0.0)
    tracker.tracks.append(twin)
    assert [track.number for track in tracker(one, 0.03)] == [1]


def test_wrong_options_are_refused(aligner):
    for wrong in ({"most": 0}, {"every": 0}, {"smoothing": -1}, {"smoothing": float("nan")}):
        with pytest.raises(ValueError):
            Tracker(aligner, **wrong)


# ------------------------------------------------------------------------------ smoothing


def test_noise_goes_and_motion_stays(aligner, one):
    """Noisy frames of a face that stands still: the smoothed points move much less."""
    rng = np.random.default_rng(0)
    trackers = [Tracker(aligner, smoothing=s) for s in (0, 1)]
    walks = [[], []]
    for i in range(25):
        pixels = np.asarray(one) + rng.normal(0, 8, (256, 256, 3))
        frame = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        for tracker, walk in zip(trackers, walks, strict=True):
            walk.append(tracker(frame, i / 30)[0].face.points)
    steps = [np.abs(np.diff(walk, axis=0)).mean() for walk in walks]
    assert 0 < steps[1] < steps[0] / 2


def test_another_scene_is_not_smoothed(aligner, one):
    tracker = Tracker(aligner, every=1)
    for i in range(5):
        [track] = tracker(one, i / 30)
        tracker.smooth_ws(track, torch.zeros(4, 3), i / 30)
    wide = Image.new("RGB", (700, 300))
    wide.paste(one, (400, 0))
    tracks = [t for t in tracker(wide, 5 / 30) if not t.lost]
    plain = Tracker(aligner, smoothing=0)(wide, 0)[0]
    np.testing.assert_allclose(tracks[0].face.points, plain.face.points)
    ws = torch.ones(4, 3)
    assert torch.equal(tracker.smooth_ws(tracks[0], ws, 5 / 30), ws)


def test_ws_is_smoothed_and_keeps_its_shape(aligner, one):
    tracker = Tracker(aligner)
    [track] = tracker(one, 0)
    rng = torch.Generator().manual_seed(0)
    raw = [torch.ones(1, 6, 8) + 0.01 * torch.randn(1, 6, 8, generator=rng) for _ in range(30)]
    smooth = [tracker.smooth_ws(track, ws, i / 30) for i, ws in enumerate(raw)]
    assert smooth[0].shape == (1, 6, 8)
    step = [torch.stack(x).diff(dim=0).abs().mean() for x in (raw, smooth)]
    assert step[1] < step[0] / 2
    plain = Tracker(aligner, smoothing=0)
    [track] = plain(one, 0)
    assert all(torch.equal(plain.smooth_ws(track, ws, i / 30), ws) for i, ws in enumerate(raw))


def test_one_euro_is_the_papers():
    """By hand, for one value: Casiez et al. 2012, algorithm 1, at 10 Hz."""
    cutoff, beta, rate = 1.0, 0.5, 10.0
    values = [0.0, 1.0, 0.5, 3.0]

    def share(fc):
        tau = 1 / (2 * np.pi * fc)
        return 1 / (1 + tau * rate)

    smooth, speed, expected = values[0], 0.0, [values[0]]
    for before, value in pairwise(values):
        speed += share(1.0) * ((value - before) * rate - speed)
        smooth += share(cutoff + beta * abs(speed)) * (value - smooth)
        expected.append(smooth)
    euro = OneEuro(cutoff, beta)
    got = [float(euro(np.array([x]), i / rate)[0]) for i, x in enumerate(values)]
    np.testing.assert_allclose(got, expected)


def test_one_euro_lags_less_where_it_moves():
    slow, fast = (OneEuro(1.0, beta) for beta in (0.0, 20.0))
    ramp = [np.array([i / 30]) for i in range(60)]  # one unit a second
    lags = [ramp[-1] - [f(x, i / 30) for i, x in enumerate(ramp)][-1] for f in (slow, fast)]
    assert 0 < lags[1] < lags[0] / 5


def test_one_euro_at_the_same_time_changes_nothing():
    euro = OneEuro(1.0, 1.0)
    euro(np.zeros(2), 0.0)
    first = euro(np.ones(2), 0.1)
    assert np.array_equal(euro(np.full(2, 9.0), 0.1), first)


def test_squares():
    square = square_around(np.array([10.0, 20.0, 30.0, 60.0]))
    assert square == (0, 20, 40, 60)
    patch = cut(Image.new("RGB", (20, 20), "white"), (-10, -10, 10, 10))
    assert patch.size == (20, 20)
    assert patch.getpixel((0, 0)) == (127,) * 3 and patch.getpixel((15, 15)) == (255,) * 3
    assert overlap(np.array([0, 0, 2, 2.0]), np.array([1, 0, 3, 2.0])) == pytest.approx(1 / 3)
    assert overlap(np.zeros(4), np.zeros(4)) == 0
