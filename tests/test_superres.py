"""Super-resolution: one x2 step, repeated steps, what it is trained on, that training helps.

pytest tests/test_superres.py
"""

import pytest
import torch

from generators.checkpoint import load, save
from generators.images import resize
from generators.superres import (
    SuperResolution,
    SuperResolutionConfig,
    degrade,
    patches,
    superres_terms,
    upscale,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images() -> torch.Tensor:
    """(4, 3, 32, 32) smooth pictures in [-1, 1], all different."""
    small = torch.rand(4, 3, 6, 6, generator=rng(1)) * 2 - 1
    return resize(small, 32).clamp(-1, 1)


@pytest.fixture
def network() -> SuperResolution:
    """Random weights in every tensor, also in the tail, which starts at zero."""
    network = SuperResolution(SuperResolutionConfig(width=8, blocks=2))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng(2)))
    return network.eval().requires_grad_(False)


# ------------------------------------------------------------------------------ the network


def test_an_untrained_network_is_bicubic(images):
    network = SuperResolution(SuperResolutionConfig(width=8, blocks=1))
    torch.testing.assert_close(network(images), resize(images, 64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 7), (16, 16), (9, 12)])
def test_a_step_doubles_any_picture(network, height, width):
    images = torch.randn(2, 3, height, width, generator=rng())
    assert network(images).shape == (2, 3, 2 * height, 2 * width)


def test_the_detail_is_in_its_place(network):
    """What is added around a pixel depends on that pixel's surroundings, and on no others."""
    images = torch.zeros(1, 3, 32, 32)
    other = images.clone()
    other[..., 20, 8] = 1
    changed = (network(other) - network(images)).abs().amax(dim=(0, 1)) > 1e-7  # (64, 64)
    rows, columns = changed.nonzero().unbind(dim=1)
    reach = 2 * (2 * network.config.blocks + 2)  # of the convolutions; bicubic reaches less far
    assert 40 - reach <= rows.min() <= 40 and 41 <= rows.max() <= 41 + reach
    assert 16 - reach <= columns.min() <= 16 and 17 <= columns.max() <= 17 + reach


def test_pictures_do_not_depend_on_their_batch(network, images):
    torch.testing.assert_close(network(images)[2:3], network(images[2:3]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_fp32(network, images, dtype):
    exact = network(images)
    result = network.to(dtype)(images.to(dtype))
    assert result.dtype == torch.float32
    assert 0 < (result - exact).abs().mean() < 0.01


def test_autocast_changes_little(network, images):
    with torch.autocast("cpu", torch.bfloat16):
        result = network(images)
    assert result.dtype == torch.float32
    assert 0 < (result - network(images)).abs().mean() < 0.01


@pytest.mark.parametrize("config", [{"width": 0}, {"blocks": -1}])
def test_a_config_without_layers_is_refused(config):
    with pytest.raises(ValueError, match="width >= 1"):
        SuperResolutionConfig(**config)


def test_a_checkpoint_gives_the_same_network(network, images, tmp_path):
    save(tmp_path / "s.safetensors", network)
    loaded = load(tmp_path / "s.safetensors", SuperResolution)
    assert loaded.config == network.config
    assert torch.equal(loaded(images), network(images))


# -------------------------------------------------------------------------------- upscaling


def test_upscaling_is_repeated_doubling(network, images):
    assert torch.equal(upscale(network, images, 64), network(images))
    assert torch.equal(upscale(network, images, 128), network(network(images)))


def test_other_sizes_are_shrunk_from_the_next_doubling(network, images):
    assert torch.equal(upscale(network, images, 33), resize(network(images), 33))
    assert torch.equal(upscale(network, images, 100), resize(network(network(images)), 100))


@pytest.mark.parametrize("size", [1, 17, 32])
def test_a_size_not_above_the_picture_needs_no_network(network, images, size):
    assert torch.equal(upscale(network, images, size), resize(images, size))


def test_large_pictures_are_only_resized(network, images, monkeypatch):
    monkeypatch.setattr("generators.superres.LARGEST", 32)
    assert torch.equal(upscale(network, images, 128), resize(network(images), 128))


@pytest.mark.parametrize("size", [0, -4])
def test_no_size_is_refused(network, images, size):
    with pytest.raises(ValueError, match=f"at least 1 pixel, not {size}"):
        upscale(network, images, size)


# --------------------------------------------------------------------------------- training


def test_patches_are_squares_of_their_own_picture():
    """Each picture has one colour, and its patch the same one."""
    colours = torch.linspace(-1, 1, 5).view(5, 1, 1, 1)
    result = patches(colours.expand(5, 3, 40, 40), 16, rng())
    torch.testing.assert_close(result, colours.expand(5, 3, 16, 16))


def test_patches_have_all_scales_and_places():
    """Column numbers as grey values: a patch's range is its width in the picture."""
    ramp = torch.arange(64.0).expand(4, 3, 64, 64)
    cut = [patches(ramp, 16, rng(seed)) for seed in range(40)]
    widths = torch.stack([(p[..., -1] - p[..., 0]).mean() for p in cut])
    assert widths.min() < 20 and widths.max() > 55 and widths.std() > 5
    lefts = torch.cat([p[:, 0, 0, 0] for p in cut])
    assert lefts.min() < 5 and lefts.max() > 30
    assert torch.equal(patches(ramp, 64, rng()), ramp)


def test_patches_follow_their_seed_and_refuse_small_pictures(images):
    assert torch.equal(patches(images, 16, rng(3)), patches(images, 16, rng(3)))
    assert not torch.equal(patches(images, 16, rng(3)), patches(images, 16, rng(4)))
    with pytest.raises(ValueError, match="patches of 33 pixels cannot be cut"):
        patches(images, 33, rng())


def test_degraded_pictures_are_half_as_large_and_some_untouched():
    high = torch.randn(60, 3, 16, 16, generator=rng()).clamp(-1, 1)
    low, clean = degrade(high, rng(1)), resize(high, 8)
    assert low.shape == (60, 3, 8, 8)
    untouched = (low - clean).abs().amax(dim=(1, 2, 3)) < 1e-6
    assert 0.25 < untouched.float().mean() < 0.65  # 4 / 9 expected
    soft = low.std(dim=(1, 2, 3)) / clean.std(dim=(1, 2, 3))
    assert soft.min() < 0.7 and soft.max() < 1.05
    assert torch.equal(low, degrade(high, rng(1)))
    assert not torch.equal(low, degrade(high, rng(2)))


def test_degrading_keeps_a_flat_picture_up_to_the_noise():
    flat = torch.full((60, 3, 16, 16), 0.5)
    error = degrade(flat, rng()) - 0.5
    assert error.abs().mean() < 0.01 and error.mean().abs() < 1e-3


class Halves(torch.nn.Module):
    """A feature pyramid of one level that remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.seen.append(images)
        return [torch.nn.functional.avg_pool2d(images, 2)]


def test_the_terms_add_up(network, images):
    network.requires_grad_(True)
    features = Halves()
    terms = superres_terms(network, images, rng(), features, perceptual_weight=0.5)
    assert terms.keys() == {"charbonnier", "perceptual", "superres"}
    expected = terms["charbonnier"] + 0.5 * terms["perceptual"]
    torch.testing.assert_close(terms["superres"], expected)
    draws = rng()
    low = degrade(images, draws)
    low[1::2] = network(degrade(resize(images[1::2], 16), draws))  # every second one: twice
    result = network(low)
    torch.testing.assert_close(
        terms["charbonnier"], (result - images).abs().mean(), atol=1e-3, rtol=0
    )
    wanted, given = features.seen
    assert torch.equal(wanted, images[::3]) and torch.equal(given, result[::3])
    terms["superres"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    alone = superres_terms(network, images, rng())
    assert alone.keys() == {"charbonnier", "superres"}
    assert torch.equal(alone["superres"], terms["charbonnier"])


def test_training_beats_bicubic_on_pictures_never_seen():
    """Fine waves, which bicubic flattens and a few steps teach to restore."""

    def waves(seed: int) -> torch.Tensor:
        return resize(torch.randn(8, 3, 10, 10, generator=rng(seed)) / 2, 32)

    network = SuperResolution(SuperResolutionConfig(width=8, blocks=1))
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for step in range(60):
        terms = superres_terms(network, waves(step), rng(step))
        optimiser.zero_grad()
        terms["superres"].backward()
        optimiser.step()
    high = waves(1000)
    low = resize(high, 16)
    with torch.no_grad():
        error = (network(low) - high).square().mean()
    assert error < 0.5 * (resize(low, 32) - high).square().mean()
