"""The encoder network: three kinds of backbone, any L, D, R; checkpoints; batch independence."""

import pytest
import torch

from encoder.model import Encoder, EncoderConfig
from generators import checkpoint

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
    again = checkpoint.load(tmp_path / "e.safetensors", "encoder")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder(images), again(images))
    with pytest.raises(ValueError, match="kind 'encoder'"):
        checkpoint.load(tmp_path / "e.safetensors", "generator")


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


def test_bad_sizes_end_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        EncoderConfig(width=30)
