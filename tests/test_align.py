"""Faces found, framed as FFHQ and sorted, on the example pictures.   pytest tests/test_align.py"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encoder import geometry
from encoder.align import Aligner, Face
from generators.images import open_image

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def aligner() -> Aligner:
    return Aligner()


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("name", ["astronaut", "grace_hopper", "at_the_border"])
def test_one_face_is_found_and_framed_as_ffhq(aligner, name):
    picture = open_image(EXAMPLES / f"{name}.jpg")
    (face,) = aligner.detect(picture)
    assert face.points.shape == (5, 2) and face.points.dtype == np.float64
    assert face.box.shape == (4,) and face.box.dtype == np.float64
    assert 0.9 <= face.score <= 1

    crop = aligner.crop(picture, face, 128)
    assert crop.size == (128, 128) and crop.mode == "RGB"
    (again,) = aligner.detect(crop)
    left_eye, right_eye, _, left_mouth, right_mouth = again.points / 128
    # FFHQ's mean: eyes at (0.38, 0.47) and (0.63, 0.47), the mouth's middle at (0.50, 0.73)
    np.testing.assert_allclose(left_eye, [0.38, 0.47], atol=0.04)
    np.testing.assert_allclose(right_eye, [0.63, 0.47], atol=0.04)
    np.testing.assert_allclose((left_mouth + right_mouth) / 2, [0.50, 0.73], atol=0.06)


def test_exif_rotated_picture_gives_the_upright_face(aligner):
    with Image.open(EXAMPLES / "grace_hopper_exif.jpg") as raw:
        assert raw.getexif()[0x0112] == 6 and raw.width > raw.height
    upright = open_image(EXAMPLES / "grace_hopper.jpg")
    turned = open_image(EXAMPLES / "grace_hopper_exif.jpg")
    assert turned.size == upright.size
    (face,), (expected,) = aligner.detect(turned), aligner.detect(upright)
    assert face.points[:2, 1].max() < face.points[3:, 1].min()  # eyes above the mouth
    np.testing.assert_allclose(face.points, expected.points, atol=2)


def test_two_faces_largest_first(aligner):
    picture = open_image(EXAMPLES / "two_faces.jpg")
    faces = aligner.detect(picture)
    assert len(faces) == 2
    assert faces[0].area > faces[1].area
    flipped = aligner.detect(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert [face.box[0] < picture.width / 2 for face in faces] == [
        face.box[0] > picture.width / 2 for face in flipped
    ]


@pytest.mark.parametrize("extent", [(1, 1), (10, 10), (2000, 3), (3, 2000), (20, 20), (200, 30)])
def test_no_face_in_noise_or_tiny_pictures(aligner, extent):
    assert aligner.detect(noise(*extent)) == []


def test_no_face_in_flat_pictures(aligner):
    assert aligner.detect(Image.new("RGB", (300, 200), (200, 150, 120))) == []
    assert aligner.detect(Image.new("L", (64, 64), 0)) == []


def test_large_picture_is_searched_small_and_cut_from_the_original(aligner):
    picture = open_image(EXAMPLES / "astronaut.jpg")
    (face,) = aligner.detect(picture)
    large = picture.resize((2560, 2560), Image.Resampling.BICUBIC)
    (found,) = aligner.detect(large)
    np.testing.assert_allclose(found.points / 5, face.points, atol=3)
    scaled = Face(face.points * 5, face.box * 5, face.score)
    one, other = (
        np.asarray(crop, np.float64)
        for crop in (aligner.crop(picture, face, 96), aligner.crop(large, scaled, 96))
    )
    assert np.abs(one - other).mean() < 3


def test_small_face_is_found_by_the_second_pass(aligner):
    picture = Image.new("RGB", (800, 800), (90, 110, 130))
    portrait = open_image(EXAMPLES / "astronaut.jpg").resize((220, 220))
    picture.paste(portrait, (400, 300))  # its face is about 40 pixels wide, below 800 / 12
    (face,) = aligner.detect(picture)
    assert np.ptp(face.box[[0, 2]]) < 800 / 12
    assert 400 < face.points[2, 0] < 620 and 300 < face.points[2, 1] < 520


def test_crop_beyond_the_border_is_mirrored_not_black(aligner):
    picture = open_image(EXAMPLES / "at_the_border.jpg")
    (face,) = aligner.detect(picture)
    corners = geometry.apply(face.matrix, geometry.UNIT_SQUARE)
    assert (corners.min(0) < 0).all() and (corners.max(0) > picture.size).all()
    values = np.asarray(aligner.crop(picture, face, 64))
    for edge in (values[0], values[-1], values[:, 0], values[:, -1]):
        assert edge.std() > 5  # no flat bar


def test_score_threshold_is_the_callers(aligner):
    strict = Aligner(min_score=1.0)
    assert strict.detect(open_image(EXAMPLES / "two_faces.jpg")) == []


@pytest.mark.parametrize(
    "wrong", [{"min_face": 0.0}, {"min_face": 80}, {"min_score": 2.0}, {"longest_side": 5}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Aligner(**wrong)
