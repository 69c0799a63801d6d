"""Latent spaces: pytest tests/test_latents.py."""

import torch

from encoder import latents


def test_broadcast_repeats_w_at_each_layer():
    w = torch.randn(2, 3)
    ws = latents.broadcast(w, 4)
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
