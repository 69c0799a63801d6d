"""The clip whose motion is known, and the figures of flicker and lag that are taken from it.

pytest tests/test_film.py
"""

import io
import itertools
from pathlib import Path

import film
import live
import numpy as np
import pytest
import torch
from clip import PERIOD, Clip
from PIL import Image

from encoder.geometry import compose
from generators.images import open_image

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def clip() -> Clip:
    picture = open_image(EXAMPLES / "astronaut.jpg").resize((256, 256))
    return Clip([picture], (320, 240), seconds=PERIOD, fps=5)


@pytest.fixture(scope="module")
def frames(clip) -> list[Image.Image]:
    return [frame for _, frame in clip.frames()]


def test_the_face_is_where_the_clip_says(clip, frames):
    from encoder.align import Aligner

    aligner = Aligner()
    for i in (0, 18, 22, 32, 45):  # still, tilted both ways, moved, dark
        truth = clip.points(clip.times()[i])
        found = aligner.detect(frames[i])[0]
        side = np.hypot(*found.matrix[:, 0])
        assert np.abs(found.points - truth).max() / side < 0.04, i


def test_it_moves_smoothly_and_begins_anew(clip):
    steps = [np.abs(clip.points(b / 30) - clip.points(a / 30)).max()
             for a, b in itertools.pairwise(range(301))]  # fmt: skip
    assert max(steps) < 8 and sum(step > 0.01 for step in steps) > 250
    np.testing.assert_allclose(clip.points(0), clip.points(PERIOD))


def drawn(clip, shift=0.0, noise=0.0) -> film.Drawn:
    """Drawings that stick to the face, but for a jump to and fro or noise."""
    count, rng = len(clip.times()), torch.Generator().manual_seed(0)
    still = torch.rand(3, 32, 32, generator=rng).mul(2).sub(1)
    still = torch.nn.functional.avg_pool2d(still[None], 5, 1, 2)[0]
    drawings = still + noise * torch.randn(count, 3, 32, 32, generator=rng)
    rest = clip.faces[0].matrix
    matrices = []
    for i, time in enumerate(clip.times()):
        moved = rest.copy()
        moved[:, 2] += shift * (-1) ** i * np.hypot(*rest[:, 0])
        matrices.append(compose(clip.motion(time), moved))
    points = np.stack([clip.points(time) for time in clip.times()])
    return film.Drawn(points, np.stack(matrices), torch.zeros(count, 6, 8), drawings)


def test_flicker_is_what_the_crops_motion_does_not_explain(clip):
    calm = film.flicker(drawn(clip), clip)
    assert calm.shape == (len(clip.times()) - 1,)
    assert calm.max() < 1e-2  # though the face moves, and its crop with it
    assert film.flicker(drawn(clip, noise=0.1), clip).mean() > 5
    assert film.flicker(drawn(clip, shift=0.05), clip).mean() > 2


@pytest.mark.parametrize("lag", [0, 1, 2.5])
def test_lag_in_frames(lag):
    t = np.arange(100.0)
    truth = np.stack([np.sin(t / 15), np.cos(t / 22)], axis=1)
    come = np.stack([np.sin((t - lag) / 15), np.cos((t - lag) / 22)], axis=1)
    assert film.late(come, truth) == pytest.approx(lag, abs=0.15)


def test_the_gif_stays_below_its_limit(clip, frames, monkeypatch):
    before, after = drawn(clip, noise=0.3), drawn(clip)
    data, how = film.gif(clip, frames, before, after)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.n_frames == len(frames) and picture.width == 128 + 2 * 96
    monkeypatch.setattr(film, "LARGEST", len(data) - 1)
    smaller, _ = film.gif(clip, frames, before, after)
    assert len(smaller) < len(data) and how
    monkeypatch.setattr(film, "LARGEST", 10)
    with pytest.raises(ValueError, match="above"):
        film.gif(clip, frames, before, after)


def test_live_draws_each_face_of_a_frame(face, anime, tmp_path):
    from encoder.align import Aligner
    from encoder.model import Encoder, EncoderConfig
    from encoder.pipeline import Translator
    from encoder.video.track import Tracker

    shape = EncoderConfig(resolution=16, num_ws=6, w_dim=8, width=16, depth=1)
    translator = Translator(face, anime, Encoder(shape), swap_resolution=8, aligner=Aligner())
    live.write_clip(2, 0.1, tmp_path / "clip.npy")
    pixels = np.load(tmp_path / "clip.npy")
    assert pixels.shape == (3, 480, 640, 3)
    tracker = Tracker(translator.aligner, most=None)
    for i, one in enumerate(pixels):
        assert len(live.draw(translator, tracker, one, i / 30, both=True)) == 4
    assert len(live.draw(translator, tracker, np.zeros_like(pixels[0]), 9.0, both=False)) == 0


def test_memory_that_grows_is_seen(monkeypatch):
    sizes = itertools.count(100)
    clock = itertools.count(0, 6)
    monkeypatch.setattr(live, "resident_mb", lambda: float(next(sizes)))
    monkeypatch.setattr(live.time, "perf_counter", lambda: float(next(clock)))
    figures = live.memory(lambda: None, 2.0)
    assert figures["memory_grows"] > 0.08
    monkeypatch.setattr(live, "resident_mb", lambda: 100.0)
    assert live.memory(lambda: None, 2.0)["memory_grows"] == 0
