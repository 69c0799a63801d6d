"""The encoder network: three kinds of backbone, any L, D, R; checkpoints; batch independence."""

import dataclasses

import pytest
import torch

from encoder.branches import cosines
from encoder.model import Encoder, EncoderConfig
from generators import checkpoint
from generators.checkpoint import load, save
from generators.stylegan2 import Generator

BACKBONES = ["mobilenetv3_small_050", "resnet10t", "convnextv2_atto"]


def tiny(backbone: str = BACKBONES[0], **sizes: int) -> Encoder:
    torch.manual_seed(0)
    return Encoder(
        EncoderConfig(backbone, **({"resolution": 64, "width": 32, "heads": 2, "depth": 1} | sizes))
    )


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    ("resolution", "num_ws", "w_dim"), [(32, 8, 24), (64, 10, 48), (256, 14, 512)]
)
def test_shapes_and_gradients(backbone: str, resolution: int, num_ws: int, w_dim: int) -> None:
    encoder = tiny(backbone, resolution=resolution, num_ws=num_ws, w_dim=w_dim)
    ws = encoder(torch.randn(2, 3, resolution, resolution))
    assert ws.shape == (2, num_ws, w_dim) and ws.dtype == torch.float32
    ws.square().sum().backward()
    missing = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert missing == []


def test_starts_near_w_avg_and_moves_with_it() -> None:
    encoder = tiny(num_ws=10, w_dim=16).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        before = encoder(images)
        encoder.w_avg += 5
        after = encoder(images)
    assert before.abs().max() < 1
    torch.testing.assert_close(after, before + 5)


def test_a_picture_does_not_depend_on_its_batch_even_in_training() -> None:
    encoder = tiny("resnet10t").train()
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images)[:1], encoder(images[:1]), atol=1e-5, rtol=1e-4)


def test_layers_of_w_plus_differ() -> None:
    with torch.no_grad():
        ws = tiny()(torch.randn(1, 3, 64, 64))
    assert (ws[:, 1:] - ws[:, :-1]).abs().amax(dim=2).min() > 0


def test_checkpoint_round_trip(tmp_path) -> None:
    encoder = tiny().eval()
    encoder.w_avg.normal_()
    checkpoint.save(tmp_path / "e.safetensors", encoder, provenance={"licence": "test"})
    again = checkpoint.load(tmp_path / "e.safetensors", Encoder)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder(images), again(images))
    with pytest.raises(ValueError, match="kind 'encoder'"):
        checkpoint.load(tmp_path / "e.safetensors", Generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype: torch.dtype) -> None:
    encoder = tiny().eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole = encoder(images)
        half = encoder.to(dtype)(images.to(dtype))
    assert half.dtype == torch.float32
    assert (half - whole).abs().max() < 0.05 * whole.abs().max() + 0.01


@pytest.mark.parametrize("backbone", BACKBONES[:2])
@pytest.mark.parametrize("resolution", [8, 16])
def test_bfloat16_gradients_where_the_deepest_map_is_one_pixel(
    backbone: str, resolution: int
) -> None:
    """There a stride would let oneDNN read what earlier tasks left in memory."""
    encoder, strides = tiny(backbone, resolution=resolution, num_ws=6, w_dim=8), []
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda conv, x, y: (
                    strides.append((x[0].shape[-1], conv.stride[1]))
                    if conv.kernel_size[1] > 1
                    else None
                )
            )
    images = torch.randn(8, 3, resolution, resolution)
    left_over = [torch.full((2**n,), torch.nan) for n in range(6, 20) for _ in range(8)]
    del left_over
    with torch.autocast("cpu", torch.bfloat16):
        loss = encoder.to(memory_format=torch.channels_last)(images).square().sum()
    loss.backward()
    assert (1, 1) in strides and all(width >= stride for width, stride in strides)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_a_shared_w_is_the_same_in_all_layers_and_each_adds_its_own(tmp_path) -> None:
    encoder = tiny(shared=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        encoder.to_offsets.zero_()
        ws = encoder(images)
        assert torch.equal(ws, ws[:, :1].expand_as(ws)) and ws.std() > 0
        encoder.to_offsets[3] += 0.1
        apart = (encoder(images) - ws).abs().amax(dim=(0, 2))
    assert apart[3] > 0 and apart.count_nonzero() == 1
    checkpoint.save(tmp_path / "e.safetensors", encoder)
    again = checkpoint.load(tmp_path / "e.safetensors", Encoder)
    with torch.no_grad():
        assert torch.equal(again(images), encoder(images))


def test_the_dense_branch_adds_one_w_that_knows_each_pixel(tmp_path) -> None:
    encoder, plain = tiny(dense=4).eval(), tiny().eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        state = {k: v for k, v in encoder.state_dict().items() if not k.startswith("dense.")}
        plain.load_state_dict(state)
        assert torch.equal(encoder(images), plain(images))  # it begins with nothing to add
        encoder.dense.pixels.weight.normal_()
        added = encoder(images) - plain(images)
        torch.testing.assert_close(added, added[:, :1].expand_as(added), atol=1e-4, rtol=1e-4)
        low = cosines(24, 64)
        a, b = low.T @ torch.randn(3, 24, 24) @ low, low.T @ torch.randn(3, 24, 24) @ low
        of = [encoder.dense.pixels(0.1 * ((low @ x @ low.T) * encoder.dense.scale).flatten())
              for x in (a, b, a + b, 0 * a)]  # fmt: skip
        torch.testing.assert_close(of[2] + of[3], of[0] + of[1], atol=1e-3, rtol=1e-3)
        encoder.dense.places.weight.normal_()
        checkpoint.save(tmp_path / "e.safetensors", encoder)
        again = checkpoint.load(tmp_path / "e.safetensors", Encoder)
        assert torch.equal(again(images), encoder(images))


def test_cosines_are_an_orthonormal_basis() -> None:
    rows = cosines(16, 16)
    torch.testing.assert_close(rows @ rows.T, torch.eye(16), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("resolution", [32, 64, 96])
def test_the_dense_branch_learns_with_any_backbone(backbone: str, resolution: int) -> None:
    encoder = tiny(backbone, resolution=resolution, dense=4, shared=True)
    for layer in (encoder.dense.pixels, encoder.dense.places):
        torch.nn.init.normal_(layer.weight)
    encoder(torch.randn(2, 3, resolution, resolution)).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_an_input_size_is_what_a_larger_encoder_sees(tmp_path) -> None:
    small, large = tiny(resolution=32, input_size=64).eval(), tiny(resolution=64).eval()
    large.load_state_dict(small.state_dict())
    checkpoint.save(tmp_path / "e.safetensors", small)
    images = torch.randn(2, 3, 32, 32)
    enlarged = torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear")
    with torch.no_grad():
        assert torch.equal(small(images), large(enlarged))
        again = checkpoint.load(tmp_path / "e.safetensors", Encoder)
        assert torch.equal(again(images), small(images))


def test_the_detail_branch_looks_at_all_pixels_where_the_others_look_at_fewer(tmp_path) -> None:
    sizes = {"num_ws": 14, "w_dim": 48, "shared": True, "dense": 4, "spatial": 3, "repeated": 2}
    small = tiny(resolution=32, **sizes).eval()
    large = tiny(resolution=64, input_size=32, detail=32, **sizes).eval()
    begun = {k: v for k, v in large.state_dict().items() if k.startswith("detail.")}
    large.load_state_dict(small.state_dict() | begun)
    low = torch.randn(2, 3, 32, 32)
    images = low.repeat_interleave(2, 2).repeat_interleave(2, 3)
    checkered = images + torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(32, 32)  # of mean 0
    with torch.no_grad():
        torch.testing.assert_close(large(images), small(low))  # it begins with nothing to add
        torch.testing.assert_close(large(checkered), small(low), atol=1e-5, rtol=1e-4)
        for layer in (large.detail.offsets, large.detail.code):
            layer.weight.normal_()
        apart = (large(checkered) - large(images)).abs().amax(dim=2)  # (B, L)
        assert apart.min() > 0 and torch.equal(apart[:, 9], apart[:, 8])  # the repeated layers
        checkpoint.save(tmp_path / "e.safetensors", large)
        again = checkpoint.load(tmp_path / "e.safetensors", Encoder)
        assert torch.equal(again(images), large(images))


@pytest.mark.parametrize("resolution", [8, 24, 64, 256])
@pytest.mark.parametrize("spatial", [0, 3])
def test_the_detail_branch_learns_at_any_resolution(resolution: int, spatial: int) -> None:
    encoder = tiny(resolution=resolution, num_ws=14, w_dim=48, detail=32, spatial=spatial)
    for layer in (encoder.detail.offsets, encoder.detail.code):
        if layer is not None:
            torch.nn.init.normal_(layer.weight)
    if spatial:
        torch.nn.init.normal_(encoder.spatial.last.weight)
    ws = encoder(torch.randn(2, 3, resolution, resolution))
    assert ws.shape == (2, 14, 48)
    ws.square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_bad_sizes_end_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        EncoderConfig(width=30)
    for side in (-1, 8192):
        with pytest.raises(ValueError, match="input_size must be from 0 to 4096"):
            EncoderConfig(resolution=64, input_size=side)
    with pytest.raises(ValueError, match="detail must be a whole number from 0 up"):
        EncoderConfig(detail=-1)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 0},
        {"width": 0},
        {"depth": 0},
        {"backbone": "nowhere"},
        {"backbone": "hf-hub:timm/resnet18"},
    ],
)
def test_a_config_that_builds_nothing_is_one_sentence(change):
    with pytest.raises(ValueError):
        EncoderConfig(**change)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("depth", 100_000_000, "depth is 100000000, not a fit int"),
        ("depth", 1_000_000, "depth must be a whole number"),
        ("backbone", 5, "backbone is 5, not a fit str"),
        ("heads", 0, "bad config"),
        ("width", 1_000_000, "width must be a whole number"),
    ],
)
def test_a_checkpoint_is_bounded_by_its_tensors(tmp_path, monkeypatch, field, value, sentence):
    encoder = Encoder(EncoderConfig(resolution=32, num_ws=6, w_dim=8, width=16, depth=1))
    asdict = dataclasses.asdict
    monkeypatch.setattr(dataclasses, "asdict", lambda config: asdict(config) | {field: value})
    save(tmp_path / "e.safetensors", encoder)
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path / "e.safetensors", Encoder)
