"""The limit of styles along the principal axes of w: pytest tests/test_style_limit.py."""

import math

import pytest
import torch

from generators.latents import StyleLimit


def along(limit, ws):
    """Coordinates of ws (…, D) on the axes, in multiples of the bound."""
    return (ws - limit.mean) @ limit.axes / limit.bound


@pytest.mark.parametrize(("resolution", "first"), [(4, 0), (8, 1), (16, 3)])
def test_what_tuned_blocks_read_is_limited(face, resolution, first):
    limit = StyleLimit(face, resolution, deviations=1.5)
    ws = 20 * torch.randn(5, 6, 8)
    limited = limit(ws)
    assert torch.equal(limited[:, :first], ws[:, :first])
    assert along(limit, limited[:, first:]).abs().max() < 1.001
    assert along(limit, ws[:, first:]).abs().amax(dim=-1).min() > 1.5  # it had something to do
    # two thirds of a layer's own w, clipped, and a third of the mean of all layers', clipped
    scaled = along(limit, ws).clamp(-1, 1)
    expected = (2 * scaled[:, first:] + scaled.mean(dim=1, keepdim=True)) / 3
    torch.testing.assert_close(along(limit, limited[:, first:]), expected, rtol=1e-3, atol=1e-3)


def test_one_w_for_all_layers_is_clipped_and_no_more(face):
    limit = StyleLimit(face, 8, deviations=1.0)
    ws = face.map(torch.randn(50, face.z_dim))  # (B, L, D), the layers alike
    limited = limit(ws)
    torch.testing.assert_close(limited[:, 1:], limited[:, 1:2].expand(-1, 5, -1))
    torch.testing.assert_close(
        along(limit, limited[:, 1:]), along(limit, ws[:, 1:]).clamp(-1, 1), rtol=1e-3, atol=1e-3
    )
    whole = limited[:, 1:2].expand(-1, 6, -1)
    torch.testing.assert_close(limit(whole), whole)  # once is enough


def test_axes_and_deviations_are_those_of_w(face):
    limit = StyleLimit(face, 8, deviations=1.0)
    w = face.mapping(torch.randn(20_000, face.z_dim))
    scaled = along(limit, w)
    torch.testing.assert_close(scaled.mean(dim=0), torch.zeros(8), rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(scaled.T), torch.eye(8), rtol=0, atol=0.08)
    torch.testing.assert_close(limit.axes @ limit.axes.T, torch.eye(8), rtol=0, atol=1e-5)


def test_a_wide_limit_changes_no_w(face):
    ws = face.map(torch.randn(50, face.z_dim))
    torch.testing.assert_close(StyleLimit(face, 8, 20.0)(ws), ws, rtol=1e-4, atol=1e-4)


def test_two_of_one_generator_are_equal_and_the_global_seed_is_left_alone(face):
    torch.manual_seed(3)
    first = StyleLimit(face, 8)
    drawn = torch.randn(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.randn(3))
    assert torch.equal(first.bound, StyleLimit(face, 8).bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(face, dtype):
    limit, ws = StyleLimit(face, 8), 3 * torch.randn(5, 6, 8)
    made = limit.to(dtype)(ws.to(dtype))
    assert made.dtype == dtype
    torch.testing.assert_close(made.float(), StyleLimit(face, 8)(ws), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("deviations", [0.0, -1.0, math.nan])
def test_a_limit_that_leaves_nothing_is_refused(face, deviations):
    with pytest.raises(ValueError, match="above 0"):
        StyleLimit(face, 8, deviations)


@pytest.mark.parametrize("colours", [0.0, 0.5, 1.0])
def test_an_infinite_limit_leaves_all_but_the_colours(face, colours):
    ws = 3 * torch.randn(5, 6, 8)
    made = StyleLimit(face, 8, math.inf)(ws, colours)
    first = 1
    assert torch.equal(made[:, :first], ws[:, :first])
    expected = ws[:, first:].lerp(face.w_avg.expand(5, 5, 8), colours)
    torch.testing.assert_close(made[:, first:], expected)
