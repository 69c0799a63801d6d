"""Geometry: exact maps, sub-pixel warps, mirrored borders.   pytest tests/test_geometry.py"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encoder import geometry

FACE = np.array([[40.0, 50.0], [80.0, 50.0], [60.0, 70.0], [45.0, 90.0], [75.0, 90.0]])


def matrix_of(scale: float, angle: float, x: float, y: float) -> np.ndarray:
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[cos, -sin, x], [sin, cos, y]])


def wave(width: int, height: int, period: float = 24.0) -> np.ndarray:
    """(H, W, 3) smooth pattern whose value is known at any point."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    return wave_at(x, y, period)


def wave_at(x: np.ndarray, y: np.ndarray, period: float = 24.0) -> np.ndarray:
    turns = [2 * np.pi * x / period, 2 * np.pi * y / period, 2 * np.pi * (x + y) / period]
    return np.stack([127.5 + 100 * np.sin(turn) for turn in turns], axis=-1)


def crop_points(matrix: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture coordinates of every pixel centre of the crop, each (size, size)."""
    v, u = (np.mgrid[0:size, 0:size] + 0.5) / size
    points = geometry.apply(matrix, np.stack([u.ravel(), v.ravel()], -1))
    return points[:, 0].reshape(size, size), points[:, 1].reshape(size, size)


def to_picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(values).astype(np.uint8))


@settings(deadline=None)
@given(
    scale=st.floats(0.05, 50),
    angle=st.floats(-np.pi, np.pi),
    x=st.floats(-1e3, 1e3),
    y=st.floats(-1e3, 1e3),
)
def test_similarity_recovers_any_similarity(scale, angle, x, y):
    matrix = matrix_of(scale, angle, x, y)
    found = geometry.similarity(FACE, geometry.apply(matrix, FACE))
    np.testing.assert_allclose(found, matrix, rtol=1e-9, atol=1e-8)
    there_and_back = geometry.compose(geometry.invert(matrix), matrix)
    np.testing.assert_allclose(there_and_back, np.eye(2, 3), atol=1e-9)


def test_similarity_is_least_squares_and_never_a_mirror_image():
    mirrored = FACE * [-1, 1]
    found = geometry.similarity(FACE, mirrored)
    assert np.linalg.det(found[:, :2]) > 0

    def error(matrix: np.ndarray) -> float:
        return float(np.square(geometry.apply(matrix, FACE) - mirrored).sum())

    rng = np.random.default_rng(0)
    for _ in range(50):
        nudge = matrix_of(1 + 0.02 * rng.normal(), 0.02 * rng.normal(), *rng.normal(size=2))
        assert error(geometry.compose(nudge, found)) >= error(found)


def test_similarity_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="all lie in one place"):
        geometry.similarity(np.ones((5, 2)), FACE)
    with pytest.raises(ValueError, match="two equal lists"):
        geometry.similarity(FACE[:3], FACE)
    with pytest.raises(ValueError, match="five"):
        geometry.ffhq_square(FACE[:4])
    with pytest.raises(ValueError, match="one place"):
        geometry.ffhq_square(np.ones((5, 2)))


def test_ffhq_square_of_a_frontal_face():
    # across = 40, down = 40: half side = max(2.0 * 40, 1.8 * 40) = 80, centre = (60, 50 + 4)
    quad = geometry.ffhq_square(FACE)
    np.testing.assert_allclose(quad, [[-20, -26], [140, -26], [140, 134], [-20, 134]])
    long = FACE.copy()
    long[3:, 1] += 20  # down = 60: half side = 1.8 * 60 = 108
    assert np.ptp(geometry.ffhq_square(long)[:, 0]) == pytest.approx(216)


@settings(deadline=None)
@given(scale=st.floats(0.1, 20), angle=st.floats(-np.pi, np.pi), x=st.floats(-500, 500))
def test_ffhq_square_moves_with_the_face(scale, angle, x):
    matrix = matrix_of(scale, angle, x, -x)
    moved = geometry.ffhq_square(geometry.apply(matrix, FACE))
    expected = geometry.apply(matrix, geometry.ffhq_square(FACE))
    np.testing.assert_allclose(moved, expected, rtol=1e-9, atol=1e-7)
    corners = geometry.apply(geometry.square_matrix(moved), geometry.UNIT_SQUARE)
    np.testing.assert_allclose(corners, moved, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("side", [40.0, 64.0, 100.0])
@pytest.mark.parametrize("angle", [0.0, 0.4, -2.0])
def test_warp_is_right_to_a_small_part_of_a_pixel(side, angle):
    matrix = matrix_of(side, angle, 0, 0)
    matrix[:, 2] = np.array([90.3, 85.7]) - matrix[:, :2] @ [0.5, 0.5]
    x, y = crop_points(matrix, 64)
    expected = wave_at(x, y)
    slopes = [wave_at(x + 0.5, y) - wave_at(x - 0.5, y), wave_at(x, y + 0.5) - wave_at(x, y - 0.5)]

    # Picture pixels. Unturned, all pixels share one phase t of the bicubic kernel, whose own bias
    # is (2a + 1) t (1 - t) (1 - 2t), up to 0.1 pixel at Pillow's a = -1; turned, it averages out.
    bound = 0.01 if angle else 0.1 * max(1, side / 64)

    values = wave(180, 170)
    images = torch.from_numpy(values).permute(2, 0, 1)[None]  # (1, 3, H, W)
    picture_crop = np.asarray(geometry.warp(to_picture(values), matrix, 64), np.float64)
    tensor_crop = geometry.warp(images, matrix, 64)[0].permute(1, 2, 0).numpy()
    for found in (picture_crop, tensor_crop):
        difference = found - expected
        assert np.sqrt(np.square(difference).mean()) < 3  # of an amplitude of 100
        columns = np.stack([slope.ravel() for slope in slopes], -1)
        shift = np.linalg.lstsq(columns, difference.ravel(), rcond=None)[0]
        assert np.abs(shift).max() < bound


def test_warp_of_the_whole_picture_is_the_picture():
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.float64)
    matrix = matrix_of(32, 0, 0, 0)
    np.testing.assert_array_equal(geometry.warp(to_picture(values), matrix, 32), values)
    images = torch.from_numpy(values).permute(2, 0, 1)[None]
    torch.testing.assert_close(geometry.warp(images, matrix, 32), images)


def test_warp_mirrors_at_the_borders():
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.float64)
    padded = np.pad(values, ((12, 32), (12, 22), (0, 0)), mode="symmetric")
    matrix = matrix_of(64, 0, -12, -12)
    np.testing.assert_array_equal(geometry.warp(to_picture(values), matrix, 64), padded)
    images = torch.from_numpy(values).permute(2, 0, 1)[None]
    warped = geometry.warp(images, matrix, 64)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(warped, padded, atol=1e-6)


def test_warp_reads_mirrored_content_that_only_the_mirror_shows():
    values = np.random.default_rng(0).integers(0, 256, (16, 100, 3)).astype(np.float64)
    outside = geometry.warp(to_picture(values), matrix_of(16, 0, -40, 0), 16)
    np.testing.assert_array_equal(outside, values[:, 24:40][:, ::-1])


def test_warp_shrinks_without_aliasing():
    checker = (np.indices((512, 512)).sum(0) % 2 * 255.0)[..., None].repeat(3, -1)
    small = np.asarray(geometry.warp(to_picture(checker), matrix_of(480, 0, 16, 16), 32), float)
    np.testing.assert_allclose(small, 127.5, atol=3)
    images = torch.from_numpy(checker).permute(2, 0, 1)[None]
    warped = geometry.warp(images, matrix_of(480, 0, 16, 16), 32)
    torch.testing.assert_close(warped, torch.full_like(warped, 127.5), atol=3, rtol=0)


@pytest.mark.parametrize("extent", [(1, 1), (1, 50), (300, 2)])
def test_warp_of_tiny_pictures(extent):
    picture = Image.new("L", extent, 77)
    crop = geometry.warp(picture, matrix_of(90, 0.3, -30, -20), 24)
    assert crop.size == (24, 24)
    assert crop.mode == "RGB"
    assert np.ptp(np.asarray(crop)) == 0
    with pytest.raises(ValueError, match="at least 1"):
        geometry.warp(picture, matrix_of(9, 0, 0, 0), 0)


def test_warp_of_a_batch_is_differentiable_in_both():
    images = torch.rand(2, 3, 20, 24, dtype=torch.float64, requires_grad=True)
    matrices = torch.tensor(
        np.stack([matrix_of(9, 0.2, 6, 5), matrix_of(8, -0.3, 7, 8)]), requires_grad=True
    )
    both = geometry.warp(images, matrices, 10)
    assert both.shape == (2, 3, 10, 10)
    one = geometry.warp(images[1:], matrices[1], 10)
    torch.testing.assert_close(both[1:], one)
    assert torch.autograd.gradcheck(lambda m: geometry.warp(images.detach(), m, 3), matrices)
    both.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [64, 200])
def test_paste_undoes_warp(size):
    picture = to_picture(wave(180, 170, period=40))
    matrix = matrix_of(80, 0.3, 60, 30)
    pasted = geometry.paste(picture, geometry.warp(picture, matrix, size), matrix)
    difference = np.abs(np.asarray(pasted, float) - np.asarray(picture, float))
    assert difference.max() < 10
    assert difference.mean() < 0.3  # half a pixel of shift would make it 1


def test_paste_changes_the_square_only_and_fades_out():
    picture = Image.new("RGB", (100, 100), (0, 0, 0))
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    matrix = matrix_of(40, 0, 30, 70)  # leaves the picture at the bottom
    soft = np.asarray(geometry.paste(picture, white, matrix))[..., 0]
    assert soft[85, 50] == 255
    assert soft[:70].max() == 0 and soft[:, :30].max() == 0 and soft[:, 70:].max() == 0
    assert (np.diff(soft[85, 30:50].astype(int)) >= 0).all() and 0 < soft[85, 32] < 255
    hard = np.asarray(geometry.paste(picture, white, matrix, feather=0))[..., 0]
    assert (hard[72:, 32:68] == 255).all()
    away = geometry.paste(picture, white, matrix_of(40, 0, 300, 0))
    np.testing.assert_array_equal(away, picture)
    assert np.asarray(picture).max() == 0  # the original is left alone
    with pytest.raises(ValueError, match="feather"):
        geometry.paste(picture, white, matrix, feather=0.7)
