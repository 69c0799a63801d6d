"""The distance between two batches' patches, as distributions.

pytest tests/test_patches.py
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from generators.patches import WINDOWS, cut, patch_distance, random_filters


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def drawings() -> torch.Tensor:
    """(16, 3, 32, 32): flat skin of one tone in the middle, noisy hair around it."""
    draw = torch.Generator().manual_seed(1)
    pictures = 0.3 * torch.randn(16, 3, 32, 32, generator=draw) - 0.4
    pictures[:, :, 12:28, 8:24] = torch.tensor([0.8, 0.5, 0.3])[:, None, None]
    return pictures.clamp(-1, 1)


def test_the_order_of_pictures_does_not_matter(drawings):
    assert patch_distance(drawings.flip(0), drawings, rng()) == 0


def test_burnt_out_skin_is_seen_and_more_of_it_more(drawings):
    again = drawings.clone()
    again[:, :, 12:28, 8:24] = 0.9
    white = drawings.clone()
    white[:, :, 12:28, 8:24] = 1
    noise = drawings + 0.02 * torch.randn(drawings.shape, generator=rng())
    none, some, most = (
        patch_distance(pictures, drawings, rng()) for pictures in (noise, again, white)
    )
    assert 0 < none < 0.3 * some and some < most


def test_softness_is_seen_at_the_finest_size(drawings):
    soft = torch.nn.functional.avg_pool2d(drawings, 3, 1, 1, count_include_pad=False)
    assert patch_distance(soft, drawings, rng()) > 0.05


def test_the_same_colours_in_other_places_are_seen():
    upright = torch.full((4, 3, 32, 32), -0.8)
    upright[:, :, 11:] = 0.8  # hair above 11 / 32
    turned = upright.flip(2)
    assert patch_distance(turned, upright, rng()) > 0.1


def test_large_pictures_have_no_more_patches(drawings):
    large, small = (torch.rand(2, 3, side, side) for side in (256, 64))
    with FlopCounterMode(display=False) as of_large:
        patch_distance(large, large.flip(2), rng())
    with FlopCounterMode(display=False) as of_small:
        patch_distance(small, small.flip(2), rng())
    assert of_large.get_total_flops() < 1.5 * of_small.get_total_flops()


def test_it_leads_pale_pictures_to_the_colours_of_others(drawings):
    pale = (0.3 * drawings + 0.6).requires_grad_(True)
    optimiser = torch.optim.Adam([pale], 0.05)
    draw = rng()
    first = patch_distance(pale.detach(), drawings, rng())
    for _ in range(60):
        optimiser.zero_grad()
        patch_distance(pale, drawings, draw).backward()
        optimiser.step()
    assert patch_distance(pale.detach(), drawings, rng()) < 0.3 * first
    got, wanted = (p.detach()[:, :, 14:26, 10:22].mean((0, 2, 3)) for p in (pale, drawings))
    assert (got - wanted).abs().max() < 0.1


def test_the_seed_decides(drawings):
    other = drawings.roll(3, -1) * 0.9
    assert patch_distance(other, drawings, rng()) == patch_distance(other, drawings, rng())
    elsewhere = torch.Generator().manual_seed(5)
    assert patch_distance(other, drawings, rng()) != patch_distance(other, drawings, elsewhere)


def test_half_precision_is_compared_in_full(drawings):
    with torch.autocast("cpu", torch.bfloat16):
        found = patch_distance(drawings.bfloat16(), drawings.bfloat16().flip(0), rng())
    assert found == 0 and found.dtype == torch.float32


def test_filters_have_unit_norm_and_some_are_flat():
    filters = random_filters(5, rng())
    assert torch.allclose(filters.flatten(1).norm(dim=1), torch.ones(len(filters)))
    flat = (filters.amax((2, 3)) == filters.amin((2, 3))).all(1)
    assert flat.tolist() == [True] * 6 + [False] * (len(filters) - 6)


@pytest.mark.parametrize("side", [2, 4, 64, 100])
def test_windows_are_within_pictures_of_any_side(side):
    pictures = torch.zeros(1, 3, side, side)
    for window in WINDOWS:
        seen = cut(pictures, window)
        assert 1 <= min(seen.shape[-2:]) and max(seen.shape[-2:]) <= side
    assert cut(pictures, WINDOWS[0]).shape == pictures.shape


def test_batches_of_two_sizes_are_refused(drawings):
    with pytest.raises(ValueError, match="not as many"):
        patch_distance(drawings[:3], drawings, rng())
