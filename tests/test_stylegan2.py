"""StyleGAN2's networks: shapes, modes, precisions, and the two paths through a convolution.

pytest tests/test_stylegan2.py

Shape letters: B batch, L layers of w+, D w dimension, R resolution.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from generators import ops
from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.latents import mix_styles
from generators.ops import LRELU_GAIN, blur, downsample2x, modulated_conv, upsample2x
from generators.stylegan2 import Generator, GeneratorConfig, MappingNetwork


def relative_error(image: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected image."""
    return float(
        (image.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    )


# ----------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("resolution, num_ws", [(4, 2), (8, 4), (64, 10), (256, 14), (1024, 18)])
def test_num_ws_is_two_per_resolution(resolution, num_ws):
    config = GeneratorConfig(resolution)
    assert config.num_ws == num_ws
    assert config.block_resolutions[0] == 4 and config.block_resolutions[-1] == resolution


@pytest.mark.parametrize("resolution", [4, 8, 32])
@pytest.mark.parametrize("batch", [1, 3])
def test_shapes(resolution, batch):
    config = GeneratorConfig(resolution, 6, 5, 1, channel_base=64, channel_max=8)
    generator = Generator(config)
    ws = generator.map(torch.randn(batch, 6))
    assert ws.shape == (batch, config.num_ws, 5)
    assert generator.synthesis(ws).shape == (batch, 3, resolution, resolution)


def test_channels_by_rule_and_by_widths():
    by_rule = GeneratorConfig(1024, channel_base=16384, channel_max=512)
    assert list(by_rule.channels.values()) == [512, 512, 512, 512, 256, 128, 64, 32, 16]
    by_hand = GeneratorConfig(16, widths=(7, 5, 3))
    assert by_hand.channels == {4: 7, 8: 5, 16: 3}
    synthesis = Generator(by_hand).synthesis
    assert synthesis.get_submodule("b16.conv0").weight.shape == (3, 5, 3, 3)
    assert GeneratorConfig(16, widths=[7, 5, 3]) == by_hand


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"resolution": 48}, "power of two"),
        ({"resolution": 2}, "power of two"),
        ({"resolution": 16, "widths": (8, 8)}, "3 widths are needed"),
        ({"mapping_layers": 0}, "mapping_layers and the channels"),
        ({"resolution": 64, "channel_base": 32}, "mapping_layers and the channels"),
    ],
)
def test_wrong_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GeneratorConfig(**wrong)


@pytest.mark.parametrize("shape", [(1, 8), (1, 5, 8), (1, 7, 8)])
def test_wrong_ws_are_refused(face, shape):
    with pytest.raises(ValueError, match=r"ws must be \(B, 6, D\)"):
        face.synthesis(torch.zeros(shape))


# --------------------------------------------------------------------------- mapping


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_mapping_depth(layers):
    mapping = MappingNetwork(6, 5, layers)
    assert [name for name, _ in mapping.named_children()] == [f"fc{i}" for i in range(layers)]
    assert mapping.get_submodule("fc0").weight.shape == (5, 6)
    assert mapping(torch.randn(2, 6)).shape == (2, 5)


def test_mapping_normalises_z(face):
    z = torch.randn(2, 8)
    torch.testing.assert_close(face.map(z), face.map(100 * z), rtol=1e-4, atol=1e-5)


def test_truncation(face):
    z = torch.randn(2, 8)
    ws = face.map(z)  # (B, L, D)
    torch.testing.assert_close(face.map(z, 0.0), face.w_avg.expand_as(ws))
    torch.testing.assert_close(face.map(z, 0.5), (face.w_avg + ws) / 2)
    cut = face.map(z, 0.5, truncation_cutoff=4)
    torch.testing.assert_close(cut[:, :4], face.map(z, 0.5)[:, :4])
    assert torch.equal(cut[:, 4:], ws[:, 4:])
    assert torch.equal(face.map(z, 0.5, truncation_cutoff=0), ws)


# ----------------------------------------------------------------------------- noise


def test_random_noise_comes_from_the_given_generator(face, ws):
    def image(seed: int) -> Tensor:
        return face.synthesis(ws, "random", torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(image(1), image(1))
    assert not torch.equal(image(1), image(2))
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        torch.testing.assert_close(image(1), image(1), rtol=1e-4, atol=1e-4)


def test_random_noise_differs_within_a_batch_and_follows_the_global_seed(face, ws):
    same = ws[:1].expand(2, -1, -1)
    torch.manual_seed(0)
    images = face.synthesis(same, "random")
    assert not torch.equal(images[0], images[1])
    torch.manual_seed(0)
    assert torch.equal(images, face.synthesis(same, "random"))


def test_const_and_none(face, ws):
    quiet = copy.deepcopy(face)
    for name, parameter in quiet.named_parameters():
        if name.endswith("noise_strength"):
            parameter.zero_()
    none = face.synthesis(ws, "none")
    torch.testing.assert_close(quiet.synthesis(ws, "const"), none)
    torch.testing.assert_close(quiet.synthesis(ws, "random"), none)
    assert not torch.allclose(face.synthesis(ws, "const"), none)


# ----------------------------------------------------------------------- style mixing


def mixed_layers(batch: int, probability: float, seed: int = 0) -> Tensor:
    """Which layers come from b, (B, L): a is zeros, b is ones."""
    a, b = torch.zeros(batch, 6, 8), torch.ones(batch, 6, 8)
    ws = mix_styles(a, b, probability, torch.Generator().manual_seed(seed))
    assert torch.equal(ws, ws[:, :, :1].expand(-1, -1, 8))
    return ws[:, :, 0]


def test_style_mixing_takes_all_layers_from_a_crossover_on():
    from_b = mixed_layers(2000, 1.0)
    assert (from_b.diff(dim=1) >= 0).all()
    shares = from_b.sum(dim=1).long().bincount(minlength=7) / 2000  # by the number of b's layers
    assert shares[0] == shares[6] == 0
    torch.testing.assert_close(shares[1:6], torch.full((5,), 0.2), rtol=0, atol=0.04)


def test_style_mixing_has_its_probability_and_its_generator():
    assert not mixed_layers(100, 0.0).any()
    share = mixed_layers(2000, 0.9).any(dim=1).float().mean()
    assert float(share) == pytest.approx(0.9, abs=0.03)
    state = torch.get_rng_state()
    assert torch.equal(mixed_layers(50, 0.5, 1), mixed_layers(50, 0.5, 1))
    assert not torch.equal(mixed_layers(50, 0.5, 1), mixed_layers(50, 0.5, 2))
    assert torch.equal(state, torch.get_rng_state())


# --------------------------------------------------------- the paths of a convolution


def reference_conv(x: Tensor, weight: Tensor, styles: Tensor, bias: Tensor, up: bool) -> Tensor:
    """Equations 1-3 as they are written: one modulated, demodulated weight per image."""
    modulated = weight * styles[:, None, :, None, None]  # (B, O, I, 3, 3)
    modulated = modulated / (modulated.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    images = []
    for image, w in zip(x.split(1), modulated, strict=True):
        if up:
            wide = torch.nn.functional.conv_transpose2d(image, w.transpose(0, 1), stride=2)
            images.append(blur(wide, padding=1, gain=4))
        else:
            images.append(torch.nn.functional.conv2d(image, w, padding=1))
    return torch.cat(images) * LRELU_GAIN + bias[:, None, None]


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_both_paths_are_the_paper(monkeypatch, up, folded, batch):
    monkeypatch.setattr(ops, "_folding_pays", lambda x, weight: folded)
    x, weight = torch.randn(batch, 5, 8, 8), torch.randn(4, 5, 3, 3)
    styles, bias = torch.randn(batch, 5), torch.randn(4)
    y = modulated_conv(x, weight, styles, bias, up=up, gain=LRELU_GAIN)
    assert y.shape == (batch, 4, 16 if up else 8, 16 if up else 8)
    torch.testing.assert_close(y, reference_conv(x, weight, styles, bias, up), rtol=1e-4, atol=1e-5)


def test_folding_only_without_gradients_and_for_small_weights():
    small, large = torch.zeros(4, 4, 3, 3), torch.zeros(64, 4, 3, 3)
    x = torch.zeros(2, 4, 16, 16)
    assert not ops._folding_pays(x, small)
    with torch.no_grad():
        assert ops._folding_pays(x, small) and not ops._folding_pays(x, large)


@pytest.mark.parametrize("noise_mode", ["const", "none"])
@pytest.mark.parametrize("batch", [1, 3])
def test_with_and_without_gradients(face, ws, batch, noise_mode):
    with_gradients = face.synthesis(ws[:batch], noise_mode)
    with torch.no_grad():
        without = face.synthesis(ws[:batch], noise_mode)
    with torch.inference_mode():
        inference = face.synthesis(ws[:batch], noise_mode)
    scale = float(with_gradients.abs().max())
    assert (with_gradients - without).abs().max() <= 1e-4 * scale
    assert torch.equal(without, inference)


def test_a_batch_is_its_images(face, ws):
    with torch.no_grad():
        one_by_one = torch.cat([face.synthesis(w[None]) for w in ws])
        torch.testing.assert_close(face.synthesis(ws), one_by_one, rtol=1e-4, atol=1e-5)


def test_activations_stay_channels_last(face, ws):
    seen = []
    for r in (4, 8, 16):
        block = face.synthesis.get_submodule(f"b{r}")
        block.register_forward_hook(lambda _, inputs, outputs: seen.append(outputs[0]))
    face.synthesis(ws)
    with torch.no_grad():
        face.synthesis(ws)
    assert len(seen) == 6
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_clamp(generator_from_seed, tiny_config, ws):
    clamped = generator_from_seed(1, replace(tiny_config, conv_clamp=0.05))
    largest = []
    for r in (4, 8, 16):
        block = clamped.synthesis.get_submodule(f"b{r}")
        block.register_forward_hook(
            lambda _, inputs, outputs: largest.append(outputs[0].abs().max())
        )
    image = clamped.synthesis(ws)
    assert max(largest) <= 0.05
    assert image.abs().max() <= 3 * 0.05 + 1e-6  # one clamped toRGB per resolution
    loose = generator_from_seed(1, replace(tiny_config, conv_clamp=1e4))
    plain = generator_from_seed(1, tiny_config)
    assert torch.equal(loose.synthesis(ws), plain.synthesis(ws))


def test_gradients_reach_every_parameter(generator_from_seed):
    generator = generator_from_seed(1).train().requires_grad_(True)
    generator(torch.randn(2, 8), noise_mode="random").square().mean().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_of_a_modulated_convolution():
    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, weight, bias = double(2, 2, 3, 3), double(3, 2, 3, 3), double(3)
    styles = torch.randn(2, 2)  # demodulation is in fp32: its gradient is compared in the next test
    for up in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, bias, up=up: modulated_conv(x, weight.detach(), styles, bias, up=up),
            (x, bias),
        )


@pytest.mark.parametrize("up", [False, True])
def test_gradients_are_those_of_the_paper(up):
    x, weight = torch.randn(2, 5, 6, 6), torch.randn(4, 5, 3, 3)
    inputs = [t.requires_grad_() for t in (x, weight, torch.randn(2, 5), torch.randn(4))]
    cotangent = torch.randn(2, 4, 12 if up else 6, 12 if up else 6)
    ours = torch.autograd.grad(modulated_conv(*inputs, up=up, gain=LRELU_GAIN), inputs, cotangent)
    papers = torch.autograd.grad(reference_conv(*inputs, up), inputs, cotangent)
    for left, right in zip(ours, papers, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("gradients", [False, True])
def test_reduced_precision(face, ws, dtype, tolerance, gradients):
    expected = face.synthesis(ws)
    half = copy.deepcopy(face).to(dtype)
    with torch.set_grad_enabled(gradients):
        image = half.synthesis(ws.to(dtype))
        assert half(torch.randn(2, 8, dtype=dtype), truncation=0.7).isfinite().all()
    assert image.dtype == torch.float32 and image.isfinite().all()
    assert relative_error(image, expected) < tolerance


def test_large_styles_do_not_overflow_in_half_precision(face, ws):
    half = copy.deepcopy(face)
    for r in (4, 8, 16):
        for name in ("conv0", "conv1") if r > 4 else ("conv1",):
            half.synthesis.get_submodule(f"b{r}.{name}.affine").bias.fill_(3e4)
    expected = half.synthesis(ws)
    image = half.half().synthesis(ws.half())
    assert image.isfinite().all() and relative_error(image, expected) < 0.01


@pytest.mark.parametrize("gradients", [False, True])
def test_autocast(face, ws, gradients):
    expected = face.synthesis(ws)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        image = face.synthesis(ws)
    assert image.dtype == torch.float32 and image.isfinite().all()
    assert relative_error(image, expected) < 0.05


def test_backward_under_autocast(generator_from_seed):
    generator = generator_from_seed(1).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        image = generator(torch.randn(2, 8))
    image.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())


# ------------------------------------------------------------------------ resampling


def test_upsampling_is_the_fir_filter():
    """Zeros between the pixels, then [1, 3, 3, 1] with gain 4."""
    x = torch.randn(2, 3, 5, 5)
    spread = torch.zeros(2, 3, 10, 10)
    spread[:, :, ::2, ::2] = x
    padded = torch.nn.functional.pad(spread, (2, 1, 2, 1))
    torch.testing.assert_close(upsample2x(x), blur(padded, padding=0, gain=4))


def test_resampling_keeps_the_mean_of_the_inside():
    x = torch.ones(1, 2, 8, 8)
    torch.testing.assert_close(upsample2x(x)[:, :, 2:-2, 2:-2], torch.ones(1, 2, 12, 12))
    torch.testing.assert_close(downsample2x(x)[:, :, 1:-1, 1:-1], torch.ones(1, 2, 2, 2))
    shifted = blur(x, padding=1, bias=torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(shifted[0, :, 3, 3], torch.tensor([2.0, 0.0]))


# --------------------------------------------------------------------- discriminator


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6, 8])
def test_discriminator_takes_any_batch(discriminator, batch):
    assert discriminator(torch.randn(batch, 3, 16, 16)).shape == (batch, 1)


def test_features_are_one_map_per_block(discriminator):
    maps = discriminator.features(torch.randn(2, 3, 16, 16))
    assert [tuple(m.shape) for m in maps] == [(2, 6, 8, 8), (2, 8, 4, 4)]


def test_minibatch_std_compares_pictures(discriminator):
    image = torch.randn(1, 3, 16, 16)
    same = discriminator(image.expand(4, -1, -1, -1))
    torch.testing.assert_close(same, discriminator(image).expand(4, 1), rtol=1e-4, atol=1e-5)
    mixed = discriminator(torch.cat([image, torch.randn(3, 3, 16, 16)]))
    assert not torch.allclose(mixed[0], same[0])


def test_discriminator_without_minibatch_std_judges_each_picture_alone():
    network = Discriminator(DiscriminatorConfig(8, widths=(4, 4), mbstd_channels=0))
    images = torch.randn(3, 3, 8, 8)
    one_by_one = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), one_by_one, rtol=1e-4, atol=1e-5)


def test_discriminator_needs_8_pixels():
    with pytest.raises(ValueError, match="8 or more"):
        DiscriminatorConfig(resolution=4)
