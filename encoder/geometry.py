"""Similarity and affine maps between a picture and its square crop: estimate, warp, paste back.

    quad = ffhq_square(points)                      # where the crop lies in the picture
    matrix = square_matrix(quad)                    # (2, 3): unit square -> picture pixels
    crop = warp(picture, matrix, 256)
    result = paste(picture, crop, matrix)

Coordinates are continuous: pixel (column i, row j) covers [i, i+1] x [j, j+1], its centre lies at
(i + 0.5, j + 0.5). A crop's matrix starts from the unit square, (0, 0) its top left corner and
(1, 1) its bottom right one, so that one matrix serves crops of every size.

Shapes: B batch, C channels, H height, W width, N points.
"""

from __future__ import annotations

import math
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Array = npt.NDArray[np.float64]

UNIT_SQUARE: Array = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])  # clockwise


def similarity(source: npt.ArrayLike, target: npt.ArrayLike) -> Array:
    """The rotation, uniform scale and shift that take `source` nearest to `target`.

    Least squares in closed form, never a mirror image: Umeyama 1991, "Least-squares estimation of
    transformation parameters between two point patterns", eq. 40-42.

    Args:
        source, target: (N, 2) points, N >= 2, not all in one place.

    Returns:
        (2, 3) matrix for `apply`.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 2 or len(source) < 2:
        raise ValueError(
            f"two equal lists of at least two (x, y) points are needed, "
            f"not shapes {source.shape} and {target.shape}"
        )
    source_mean, target_mean = source.mean(0), target.mean(0)
    source_centred, target_centred = source - source_mean, target - target_mean
    variance = np.square(source_centred).sum()
    if not variance > 0:
        raise ValueError("the source points all lie in one place; give points that are apart")
    u, singular, vt = np.linalg.svd(target_centred.T @ source_centred)
    sign = np.array([1.0, 1.0 if np.linalg.det(u) * np.linalg.det(vt) >= 0 else -1.0])
    linear = (u * sign) @ vt * (singular @ sign / variance)
    return np.column_stack([linear, target_mean - linear @ source_mean])


def apply(matrix: npt.ArrayLike, points: npt.ArrayLike) -> Array:
    """Points (N, 2) through a (2, 3) matrix."""
    matrix = np.asarray(matrix, np.float64)
    return np.asarray(points, np.float64) @ matrix[:, :2].T + matrix[:, 2]


def invert(matrix: npt.ArrayLike) -> Array:
    """The (2, 3) matrix that undoes `matrix`."""
    matrix = np.asarray(matrix, np.float64)
    inverse = np.linalg.inv(matrix[:, :2])
    return np.column_stack([inverse, -inverse @ matrix[:, 2]])


def compose(outer: npt.ArrayLike, inner: npt.ArrayLike) -> Array:
    """The (2, 3) matrix that does `inner` first, then `outer`."""
    outer, inner = np.asarray(outer, np.float64), np.asarray(inner, np.float64)
    return np.column_stack([outer[:, :2] @ inner[:, :2], apply(outer, inner[None, :, 2])[0]])


def ffhq_square(points: npt.ArrayLike) -> Array:
    """The square that FFHQ cuts around a face (Karras et al. 2019, appendix A and `recreate_tool`).

    Its centre lies a tenth of the way from the eyes' middle to the mouth's. Its x axis is the mean
    of the eye-to-eye direction and the eye-to-mouth direction turned by 90 degrees, so that a head
    turned aside does not tilt it. Half its side is the larger of 2.0 x eye-to-eye and 1.8 x
    eye-to-mouth.

    Args:
        points: (5, 2) left eye, right eye, nose, left and right mouth corner; left in the picture.

    Returns:
        (4, 2) corners: top left, top right, bottom right, bottom left of the upright face.
    """
    points = np.asarray(points, np.float64)
    if points.shape != (5, 2):
        raise ValueError(f"five (x, y) points are needed, not an array of shape {points.shape}")
    left_eye, right_eye, _, left_mouth, right_mouth = points
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    across, down = right_eye - left_eye, mouth - eyes

    direction = across + np.array([down[1], -down[0]])  # `down` turned to point right
    length = np.hypot(*direction)
    if not length > 0:
        raise ValueError("eyes and mouth lie in one place; give the five points of a face")
    half = max(2.0 * np.hypot(*across), 1.8 * np.hypot(*down))
    x = direction / length * half
    y = np.array([-x[1], x[0]])
    centre = eyes + 0.1 * down
    return np.stack([centre - x - y, centre + x - y, centre + x + y, centre - x + y])


def square_matrix(quad: npt.ArrayLike) -> Array:
    """(4, 2) corners as `ffhq_square` orders them -> (2, 3) matrix, unit square to picture."""
    top_left, top_right, _, bottom_left = np.asarray(quad, np.float64)
    return np.column_stack([top_right - top_left, bottom_left - top_left, top_left])


@overload
def warp(image: Image.Image, matrix: npt.ArrayLike, size: int) -> Image.Image: ...
@overload
def warp(image: Tensor, matrix: npt.ArrayLike | Tensor, size: int) -> Tensor: ...
def warp(image, matrix, size):
    """The size x size crop that `matrix` cuts out of `image`; what lies outside is mirrored in.

    Args:
        image: a PIL picture (any extent; only what the crop shows is read), or a (B, C, H, W)
            tensor, then differentiable in both arguments.
        matrix: (2, 3) unit square to picture pixels; for a tensor also (B, 2, 3).
        size: side of the crop in pixels.

    Returns:
        An RGB picture or a (B, C, size, size) tensor. Shrinking is antialiased: the picture is
        resized to the crop's scale first, and then turned and shifted with bicubic interpolation
        (which may leave a tensor's range a little at hard edges).
    """
    if size < 1:
        raise ValueError(f"a crop's side must be at least 1 pixel, not {size}")
    if isinstance(image, Image.Image):
        return _warp_picture(image, np.asarray(matrix, np.float64), size)
    return _warp_tensor(image, torch.as_tensor(matrix), size)


def _warp_picture(picture: Image.Image, matrix: Array, size: int) -> Image.Image:
    picture = picture if picture.mode == "RGB" else picture.convert("RGB")
    extent = np.array(picture.size)
    scale = _side(matrix) / size  # picture pixels per crop pixel

    # 1. The part of the picture that the crop shows, directly or in the mirror at a border.
    corners, margin = apply(matrix, UNIT_SQUARE), 3 * max(1.0, scale)  # kernels look 3 around
    low = np.floor(corners.min(0) - margin).astype(int)
    high = np.ceil(corners.max(0) + margin).astype(int)
    start = np.maximum(0, np.minimum(low, 2 * extent - high))
    stop = np.minimum(extent, np.maximum(high, -low))

    # 2. Bring it to the crop's scale, antialiased.
    width, height = np.maximum(1, np.round((stop - start) / scale)).astype(int).tolist()
    box = (*start.tolist(), *stop.tolist())
    part = picture.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3)
    ratio = (stop - start) / np.array(part.size)

    # 3. Mirror what the crop shows beyond the picture's borders.
    before = np.ceil(np.maximum(0, start - low) / ratio).astype(int)
    after = np.ceil(np.maximum(0, high - stop) / ratio).astype(int)
    if before.any() or after.any():
        (left, top), (right, bottom) = before, after
        pads = ((top, bottom), (left, right), (0, 0))
        part = Image.fromarray(np.pad(np.asarray(part), pads, mode="symmetric"))

    # 4. Turn and shift: crop pixels -> unit square -> picture -> part.
    to_part = np.column_stack([np.diag(1 / ratio), before - start / ratio])
    from_crop = np.column_stack([np.eye(2) / size, np.zeros(2)])
    return _transform(part, compose(compose(to_part, matrix), from_crop), (size, size))


def _warp_tensor(images: Tensor, matrix: Tensor, size: int) -> Tensor:
    batch, channels, height, width = images.shape
    matrix = matrix.to(images)
    extent = images.new_tensor([[width], [height]])  # (2, 1)
    matrix = (matrix / extent).expand(batch, 2, 3)  # unit square -> picture as a unit square

    scales = (extent * matrix[..., :2].detach()).norm(dim=1) / size  # (B, 2) along the crop's axes
    scale = scales.min().item() if batch else 1.0
    if scale > 1:
        smaller = (max(1, round(height / scale)), max(1, round(width / scale)))
        images = F.interpolate(images, smaller, mode="bilinear", antialias=True)

    linear, shift = matrix[..., :2], matrix[..., 2:]
    centre = 2 * (shift + linear.sum(-1, keepdim=True) / 2) - 1  # [0, 1] -> [-1, 1] on both sides
    theta = torch.cat([linear, centre], dim=-1)
    grid = F.affine_grid(theta, [batch, channels, size, size], align_corners=False)
    return F.grid_sample(
        images, grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )


def paste(
    picture: Image.Image, crop: Image.Image, matrix: npt.ArrayLike, feather: float = 0.1
) -> Image.Image:
    """A copy of `picture` with `crop` put back where `warp` had cut it out.

    Args:
        crop: a square picture of any size.
        matrix: the (2, 3) matrix `warp` was given.
        feather: width of the soft seam inside the crop, as a part of its side, 0 to 0.5.
    """
    if not 0 <= feather <= 0.5:
        raise ValueError(f"feather is a part of the crop's side, 0 to 0.5, not {feather}")
    matrix = np.asarray(matrix, np.float64)
    size = max(1, min(round(_side(matrix)), 2 * max(picture.size)))  # the picture's scale
    crop = crop.convert("RGB").resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3)
    result = picture.convert("RGB")  # a copy, whatever the mode

    corners = apply(matrix, UNIT_SQUARE)
    start = np.maximum(0, np.floor(corners.min(0))).astype(int)
    stop = np.minimum(picture.size, np.ceil(corners.max(0))).astype(int)
    if (start >= stop).any():
        return result

    edge = (np.arange(size) + 0.5) / size
    edge = np.minimum(edge, 1 - edge)  # distance to the nearer border
    ramp = np.clip(edge / feather, 0, 1) if feather > 0 else np.ones(size)
    ramp = ramp * ramp * (3 - 2 * ramp)  # smoothstep
    mask = Image.fromarray(np.round(255 * np.outer(ramp, ramp)).astype(np.uint8))

    to_crop = size * invert(matrix)
    to_crop[:, 2] += to_crop[:, :2] @ start
    width, height = (stop - start).tolist()
    patch = _transform(crop, to_crop, (width, height))
    result.paste(patch, tuple(start.tolist()), _transform(mask, to_crop, (width, height)))
    return result


def _side(matrix: Array) -> float:
    """Side in picture pixels of a square as large as the crop."""
    return math.sqrt(abs(np.linalg.det(matrix[:, :2])))


def _transform(picture: Image.Image, matrix: Array, extent: tuple[int, int]) -> Image.Image:
    """Each output pixel looked up at `matrix` times its centre."""
    return picture.transform(
        extent, Image.Transform.AFFINE, matrix.ravel().tolist(), Image.Resampling.BICUBIC
    )
