"""The judges of drawn faces on pictures with known answers: pytest tests/test_drawn.py."""

from pathlib import Path

import pytest
import torch
from drawn import (
    Chance,
    Config,
    Judge,
    JudgeConfig,
    colours_kept,
    detected,
    eyes_changed,
    features_changed,
    laughs_kept,
    lesson,
    train,
)
from pictures import photo
from torch import Tensor

from encoder.attributes import CHEEKS
from generators.checkpoint import load, save
from generators.images import resize


def blobs(count: int, seed: int = 1) -> Tensor:
    """(N, 3, 64, 64): smooth pictures, every one different."""
    rng = torch.Generator().manual_seed(seed)
    return resize(torch.rand(count, 3, 8, 8, generator=rng) * 2 - 1, 64).clamp(-1, 1)


def flat(colours: Tensor) -> Tensor:
    """(N, 3) -> (N, 3, 64, 64)"""
    return colours[:, :, None, None].expand(-1, -1, 64, 64)


# ------------------------------------------------------------------------------ colours


def test_hair_that_has_the_photos_colours_follows_them_wholly():
    photos = blobs(30)
    found = colours_kept(photos, photos)
    assert found == pytest.approx({"lightness": 1, "lightness_slope": 1, "tint": 1})
    # lighter, and of half the contrast: as faithful, but for the slope
    found = colours_kept(photos, 0.5 * photos + 0.4)
    assert found == pytest.approx({"lightness": 1, "lightness_slope": 0.5, "tint": 1}, abs=1e-4)


def test_hair_of_other_people_or_of_one_colour_does_not_follow():
    photos = flat(torch.rand(400, 3, generator=torch.Generator().manual_seed(1)))
    strangers = colours_kept(photos, photos.roll(7, 0))
    assert max(abs(x) for x in strangers.values()) < 0.2
    assert colours_kept(photos, photos[:1].expand(400, -1, -1, -1)) == pytest.approx(
        {"lightness": 0, "lightness_slope": 0, "tint": 0}, abs=1e-4
    )


def test_lightness_and_tint_are_told_apart():
    colours = torch.rand(50, 3, generator=torch.Generator().manual_seed(1))
    luma = torch.tensor([0.299, 0.587, 0.114])
    grey = (colours @ luma)[:, None].expand(-1, 3)
    found = colours_kept(flat(colours), flat(grey))
    assert found["lightness"] == pytest.approx(1, abs=1e-4) and abs(found["tint"]) < 1e-3
    found = colours_kept(flat(colours), flat(colours - grey))
    assert found["tint"] == pytest.approx(1, abs=1e-4) and abs(found["lightness_slope"]) < 1e-3


def test_only_the_hair_counts():
    photos, other = blobs(10), blobs(10, seed=2)
    other[:, :, 4:14, 20:44] = photos[:, :, 4:14, 20:44]
    assert colours_kept(photos, other)["tint"] == pytest.approx(1)


def test_the_cheeks_are_another_place():
    photos, other = blobs(10), blobs(10, seed=2)
    other[:, :, 36:44, 22:42] = photos[:, :, 36:44, 22:42]
    assert colours_kept(photos, other, CHEEKS)["lightness"] == pytest.approx(1)
    assert colours_kept(photos, other)["lightness"] < 0.9


def test_laughs_are_kept_where_open_mouths_are_drawn_red():
    drawings = flat(torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) * 0.4).clone()
    wide, found = torch.arange(40) % 7 / 7, torch.arange(40) > 1
    drawings[:, 0, 40:43, 29:35] += wide[:, None, None]
    assert laughs_kept((wide, found), drawings) == pytest.approx(1, abs=1e-3)
    assert laughs_kept((wide.where(found, 9.0), found), drawings) == pytest.approx(1, abs=1e-3)
    assert laughs_kept((1 - wide, found), drawings) == pytest.approx(-1, abs=1e-3)
    assert laughs_kept((wide, found), flat(torch.zeros(40, 3))) == pytest.approx(0, abs=1e-6)


# ----------------------------------------------------------------------------- detector


def test_a_cascade_finds_none_in_noise_and_is_named_when_it_is_none(tmp_path):
    import cv2

    cascade = Path(cv2.data.haarcascades) / "haarcascade_frontalface_default.xml"
    assert detected(blobs(3), cascade) == 0
    (tmp_path / "no.xml").write_text("<a/>")
    with pytest.raises(ValueError, match=r"no\.xml as a cascade"):
        detected(blobs(1), tmp_path / "no.xml")


# ------------------------------------------------------------------------------- damage


def test_damage_stays_where_it_belongs():
    images = blobs(40)
    changed = (eyes_changed(images, Chance(40, 64, 1), alike=False) - images).abs().mean(dim=1)
    halves = torch.stack([changed[:, 16:48, :32], changed[:, 16:48, 32:]]).mean(dim=(2, 3))
    assert (halves.amax(dim=0) > 0.005).float().mean() > 0.95  # one eye is another one now
    assert (halves.amin(dim=0) < 0.5 * halves.amax(dim=0)).float().mean() > 0.9  # and one is not
    assert changed[:, :6].max() < 0.02 and changed[:, 54:].max() < 0.02
    bent = (features_changed(images, Chance(40, 64, 2)) - images).abs().mean(dim=1)
    assert (bent[:, 16:56, 8:56].mean(dim=(1, 2)) > 0.005).float().mean() > 0.95


def test_a_symmetrical_face_stays_so_when_both_eyes_change():
    images = blobs(20)
    images = (images + images.flip(-1)) / 2
    chance = Chance(20, 64, 1)
    chance.between = lambda low, high, *shape: Chance.between(  # every draw in the middle
        chance, (low + high) / 2, (low + high) / 2, *shape
    )
    changed = eyes_changed(images, chance, alike=True)
    torch.testing.assert_close(changed, changed.flip(-1), atol=1e-4, rtol=0)


def test_a_lesson_is_the_same_again_and_asks_what_it_knows():
    pictures, wanted, asked = lesson(blobs(4), seed=3)
    again = lesson(blobs(4), seed=3)
    assert all(torch.equal(a, b) for a, b in zip((pictures, wanted, asked), again, strict=True))
    assert not torch.equal(pictures, lesson(blobs(4), seed=4)[0])
    assert pictures.shape == (12, 3, 64, 64) and pictures.abs().max() <= 1
    assert wanted[:4].eq(1).all() and asked[:4].eq(1).all()
    assert wanted[4:].eq(0).all()
    assert asked[4:8].tolist() == [[1, 0]] * 4 and asked[8:].tolist() == [[0, 1]] * 4


# ------------------------------------------------------------------------------ network


def test_a_judge_passes_nine_in_ten_of_what_is_held_back_and_survives_its_file(tmp_path):
    for i in range(60):
        (tmp_path / "drawings").mkdir(exist_ok=True)
        photo(i, 64, 64).save(tmp_path / "drawings" / f"{i}.png")
    config = Config(str(tmp_path / "drawings"), tmp_path / "judge.safetensors", steps=2)
    judge = train(config)
    save(config.output, judge, half=True)
    read = load(config.output, Judge)
    images = blobs(5)
    torch.testing.assert_close(read(images), judge(images), atol=0.02, rtol=0.02)
    assert read.passes(images).shape == (5, 2)


def test_a_judge_judges_by_its_thresholds_whatever_the_size():
    judge = Judge(JudgeConfig(resolution=16, widths=(8, 16))).eval()
    images = blobs(9)
    logits = judge(images).detach()
    judge.thresholds.copy_(logits.median(dim=0).values)
    assert judge.passes(images).sum(dim=0).tolist() == [4, 4]
    assert torch.equal(judge.passes(images), logits > judge.thresholds)
