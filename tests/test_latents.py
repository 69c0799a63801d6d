"""Latent spaces: pytest tests/test_latents.py."""

import pytest
import torch

from generators import latents
from generators.dcgan import DcganConfig, DcganGenerator
from generators.stylegan2 import broadcast


def test_broadcast_repeats_w_at_each_layer():
    w = torch.randn(2, 3)
    ws = broadcast(w, 4)
    assert ws.shape == (2, 4, 3)
    assert all(torch.equal(ws[:, layer], w) for layer in range(4))


def test_offsets_go_there_and_back():
    ws, w_avg = torch.randn(2, 4, 3).double(), torch.randn(3).double()
    offsets = latents.to_offsets(ws, w_avg)
    torch.testing.assert_close(offsets[0, 0], ws[0, 0] - w_avg)
    torch.testing.assert_close(latents.from_offsets(offsets, w_avg), ws)
    per_layer = torch.randn(4, 3).double()
    torch.testing.assert_close(
        latents.from_offsets(torch.zeros(2, 4, 3).double(), per_layer), per_layer.expand(2, 4, 3)
    )


def test_truncation_at_its_ends_and_in_the_middle():
    ws, w_avg = torch.randn(2, 4, 3), torch.randn(3)
    torch.testing.assert_close(latents.truncate(ws, w_avg, 1.0), ws)
    torch.testing.assert_close(latents.truncate(ws, w_avg, 0.0), w_avg.expand(2, 4, 3))
    torch.testing.assert_close(latents.truncate(ws, w_avg, 0.5), (ws + w_avg) / 2)


def test_truncation_stops_at_the_cutoff():
    ws, w_avg = torch.randn(2, 4, 3), torch.randn(3)
    cut = latents.truncate(ws, w_avg, 0.0, cutoff=1)
    torch.testing.assert_close(cut[:, 0], w_avg.expand(2, 3))
    assert torch.equal(cut[:, 1:], ws[:, 1:])
    assert torch.equal(latents.truncate(ws, w_avg, 0.0, cutoff=0), ws)


def test_mix_takes_coarse_layers_from_the_first():
    a, b = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    mixed = latents.mix(a, b, 3)
    assert mixed[:, :3].eq(0).all() and mixed[:, 3:].eq(1).all()


def test_gradients_reach_every_input():
    ws, w_avg = torch.randn(2, 4, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    latents.truncate(ws, w_avg, 0.5, cutoff=2).sum().backward()
    assert ws.grad is not None and w_avg.grad is not None
    torch.testing.assert_close(ws.grad[:, :2], torch.full((2, 2, 3), 0.5))
    torch.testing.assert_close(ws.grad[:, 2:], torch.ones(2, 2, 3))
    torch.testing.assert_close(w_avg.grad, torch.full((3,), 2.0))


def test_slerp_follows_the_great_circle_at_an_even_pace():
    a, b = torch.randn(2, 5, 8, dtype=torch.float64)
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    whole = (a * b).sum(dim=-1).acos()
    for t in (0.25, 0.5, 0.9):
        c = latents.slerp(a, b, t)
        torch.testing.assert_close(c.norm(dim=-1), torch.ones_like(whole))
        torch.testing.assert_close((a * c).sum(dim=-1).acos(), t * whole)
        torch.testing.assert_close((b * c).sum(dim=-1).acos(), (1 - t) * whole)


def test_slerp_is_exact_at_its_ends_and_its_length_is_between():
    a, b = torch.randn(4, 8), 3 * torch.randn(4, 8)
    assert torch.equal(latents.slerp(a, b, 0.0), a) and torch.equal(latents.slerp(a, b, 1.0), b)
    middle = latents.slerp(a, b, torch.full((4, 1), 0.5)).norm(dim=-1)
    torch.testing.assert_close(middle, (a.norm(dim=-1) + b.norm(dim=-1)) / 2)


def test_slerp_of_parallel_and_opposite_vectors_stays_finite():
    a = torch.randn(4, 8)
    for tiny in (0.0, 1e-7, 1e-4):
        b = a + tiny * torch.randn(4, 8)
        torch.testing.assert_close(latents.slerp(a, b, 0.3), torch.lerp(a, b, 0.3))
    t = torch.linspace(0, 1, 7)[:, None]
    assert latents.slerp(a[:1], -a[:1], t).norm(dim=-1).max() <= 1.001 * a[0].norm()
    assert latents.slerp(torch.zeros(1, 8), a[:1], t).isfinite().all()


# ------------------------------------------------------------------------------- files


def test_latents_are_read_as_they_were_written(tmp_path, face, ws):
    latents.write_latents(tmp_path / "new" / "a.safetensors", {"ws": ws})
    latents.write_latents(tmp_path / "new" / "b.safetensors", {"ws": ws[0], "affine": ws[0, 0]})
    latents.write_latents(tmp_path / "z.safetensors", {"z": torch.ones(8), "other": torch.ones(1)})
    folder = tmp_path / "new"
    assert torch.equal(latents.read_ws(folder, face), torch.cat([ws, ws[:1]]))
    assert torch.equal(latents.read_latents(folder, face), latents.read_ws(folder, face))
    assert torch.equal(latents.read_latents(folder / "a.safetensors", face), ws)
    assert torch.equal(latents.read_latents(tmp_path / "z.safetensors", face), torch.ones(1, 8))


def test_latents_of_a_dcgan_are_z(tmp_path, ws):
    generator = DcganGenerator(DcganConfig(resolution=8, z_dim=4, width=2))
    latents.write_latents(tmp_path / "ws.safetensors", {"ws": ws})
    latents.write_latents(tmp_path / "z.safetensors", {"z": torch.ones(2, 4)})
    assert latents.read_latents(tmp_path / "z.safetensors", generator).shape == (2, 4)
    with pytest.raises(ValueError, match=r"needs a tensor `z` of shape \(N, 4\), and has none"):
        latents.read_latents(tmp_path / "ws.safetensors", generator)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_latents_that_are_not_finite_are_refused(tmp_path, face, ws, value):
    ws[0, 0, 0] = value
    latents.write_latents(tmp_path / "a.safetensors", {"ws": ws})
    with pytest.raises(ValueError, match="ws has values that are not finite"):
        latents.read_latents(tmp_path / "a.safetensors", face)
