"""Latent optimisation on tiny generators: pictures are independent, results never worse.

pytest tests/test_invert.py
"""

import pytest
import torch

from encoder.invert import optimize_latent, ramp
from encoder.losses import LossSet

LOSSES = LossSet({"mse": 1.0})


@pytest.fixture
def problem(face, ws):
    """A double-precision generator, three targets it can draw, and starts away from them."""
    face = face.double()
    ws = ws.double()
    return face, face.synthesis(ws), ws + 0.3 * torch.randn_like(ws)


def error(generator, ws, target):
    return LOSSES(generator.synthesis(ws), target)[0]


def test_each_picture_comes_nearer_and_nothing_else_changes(problem):
    face, target, start = problem
    before = {name: tensor.clone() for name, tensor in face.state_dict().items()}
    copies = start.clone(), target.clone()
    ws = optimize_latent(face, target, start=start, steps=40, losses=LOSSES)
    assert (error(face, ws, target) < 0.5 * error(face, start, target)).all()
    assert not ws.requires_grad
    assert torch.equal(start, copies[0]) and torch.equal(target, copies[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in face.state_dict().items())
    assert all(parameter.grad is None for parameter in face.parameters())


def test_pictures_of_a_batch_do_not_influence_each_other(problem):
    face, target, start = problem
    together = optimize_latent(face, target, start=start, steps=12, losses=LOSSES)
    for i in range(len(start)):
        one = slice(i, i + 1)
        alone = optimize_latent(face, target[one], start=start[one], steps=12, losses=LOSSES)
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("learning_rate", [0.05, 50.0])
def test_never_worse_than_the_start(problem, learning_rate):
    face, target, start = problem
    seen = []
    ws = optimize_latent(
        face,
        target,
        start=start,
        steps=5,
        losses=LOSSES,
        learning_rate=learning_rate,
        callback=lambda step, ws, loss: seen.append(loss.clone()),
    )
    assert len(seen) == 6  # the start, and each step's result
    torch.testing.assert_close(seen[0], error(face, start, target))
    torch.testing.assert_close(error(face, ws, target), torch.stack(seen).amin(dim=0))


def test_a_loss_that_is_not_a_number_never_wins(problem):
    face, target, start = problem

    calls = []

    def nan_after_the_start(image, target):
        calls.append(1)
        loss, parts = LOSSES(image, target)
        return loss if len(calls) == 1 else loss * float("nan"), parts

    ws = optimize_latent(face, target, start=start, steps=3, losses=nan_after_the_start)
    assert torch.equal(ws, start)


def test_no_steps_return_the_start(problem):
    face, target, start = problem
    assert torch.equal(optimize_latent(face, target, start=start, steps=0, losses=LOSSES), start)


def test_works_inside_inference_mode(face, ws):
    with torch.inference_mode():
        target = face.synthesis(ws)
        start = ws + 0.3
        result = optimize_latent(face, target, start=start, steps=3, losses=LOSSES)
        assert (error(face, result, target) < error(face, start, target)).all()


def test_wrong_arguments_are_refused(problem):
    face, target, start = problem
    with pytest.raises(ValueError, match="steps"):
        optimize_latent(face, target, start=start, steps=-1, losses=LOSSES)
    with pytest.raises(ValueError, match="one for each"):
        optimize_latent(face, target, start=start[:2], steps=1, losses=LOSSES)


def test_the_learning_rate_ramps_up_and_down():
    shares = [ramp(step, 100) for step in range(100)]
    assert shares[:5] == sorted(shares[:5]) and shares[5:75] == [1.0] * 70
    assert shares[75:] == sorted(shares[75:], reverse=True) and 0 < shares[-1] < 0.01
    assert ramp(0, 1) > 0
