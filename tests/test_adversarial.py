"""GAN losses, R1 and path lengths against numbers worked out by hand and finite differences.

pytest tests/test_adversarial.py

Shape letters: B batch, N logits of one picture, R resolution, L layers of w+, D w dimension.
"""

from math import exp, log

import pytest
import torch
from torch import Tensor

from generators import ops, stylegan2
from generators.adversarial import (
    discriminator_loss,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    path_length,
    path_length_penalty,
    r1_penalty,
)

REAL = torch.tensor([[2.0, -1.0], [0.5, 3.0]])  # (B, N)
FAKE = torch.tensor([[-2.0, 0.0], [1.0, -0.5]])


def softplus(x: float) -> float:
    return log(1 + exp(x))


# ---------------------------------------------------------------------------- losses


def test_logistic_losses_by_hand():
    expected = [(softplus(2) + softplus(0)) / 2, (softplus(-1) + softplus(0.5)) / 2]
    torch.testing.assert_close(generator_loss(FAKE), torch.tensor(expected))
    expected = [
        (softplus(-2) + softplus(-2) + softplus(1) + softplus(0)) / 2,
        (softplus(-0.5) + softplus(1) + softplus(-3) + softplus(-0.5)) / 2,
    ]
    torch.testing.assert_close(discriminator_loss(REAL, FAKE), torch.tensor(expected))


def test_smoothing_is_cross_entropy_with_a_lower_target_for_real_pictures_only():
    target = torch.full_like(REAL, 0.9)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    real = entropy(REAL, target, reduction="none").mean(1)
    fake = entropy(FAKE, torch.zeros_like(FAKE), reduction="none").mean(1)
    torch.testing.assert_close(discriminator_loss(REAL, FAKE, 0.1), real + fake)


def test_smoothing_moves_the_best_real_logit():
    """D(real) = sigmoid(logit) = 0.9 is where the gradient is zero."""
    real = torch.tensor([[log(0.9 / 0.1)]], requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator_loss(real, FAKE[:1, :1], 0.1).sum(), real)
    torch.testing.assert_close(gradient, torch.zeros(1, 1), rtol=0, atol=1e-7)


def test_hinge_losses_by_hand():
    torch.testing.assert_close(hinge_generator_loss(FAKE), torch.tensor([1.0, -0.25]))
    # real: 0, 2 | 0.5, 0; fake: 0, 1 | 2, 0.5
    torch.testing.assert_close(hinge_discriminator_loss(REAL, FAKE), torch.tensor([1.5, 1.5]))


def test_a_hinge_leaves_good_logits_alone():
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    hinge_discriminator_loss(real, fake).sum().backward()
    assert real.grad is not None and fake.grad is not None
    assert torch.equal(real.grad, torch.tensor([[0, -0.5], [-0.5, 0]]))
    assert torch.equal(fake.grad, torch.tensor([[0, 0.5], [0.5, 0.5]]))


@pytest.mark.parametrize("loss", [generator_loss, hinge_generator_loss])
def test_one_logit_is_its_own_mean(loss):
    several = loss(FAKE[:, :1].expand(-1, 5))
    torch.testing.assert_close(several, loss(FAKE[:, :1]))
    assert several.shape == (2,)


# -------------------------------------------------------------------------------- R1


def test_r1_of_a_linear_discriminator_is_half_its_squared_weight():
    weight, images = torch.randn(3, 4, 4), torch.randn(2, 3, 4, 4, requires_grad=True)
    logits = (images * weight).sum(dim=(1, 2, 3))[:, None]
    expected = weight.square().sum() / 2
    torch.testing.assert_close(r1_penalty(logits, images), expected.expand(2))


def test_r1_of_a_quadratic_discriminator_and_its_gradient():
    """D(x) = a |x|² / 2: the penalty is a² |x|² / 2, its derivative by a is a |x|²."""
    images = torch.randn(2, 3, 4, 4, requires_grad=True)
    a = torch.tensor(1.5, requires_grad=True)
    norm = images.detach().square().sum(dim=(1, 2, 3))
    penalty = r1_penalty(a * images.square().sum(dim=(1, 2, 3))[:, None] / 2, images)
    torch.testing.assert_close(penalty, 1.5**2 * norm / 2)
    (gradient,) = torch.autograd.grad(penalty.sum(), a)
    torch.testing.assert_close(gradient, 1.5 * norm.sum())


def test_r1_of_several_logits_is_that_of_their_mean():
    weights, images = torch.randn(5, 3, 4, 4), torch.randn(2, 3, 4, 4, requires_grad=True)
    logits = torch.einsum("bchw, nchw -> bn", images, weights)
    expected = weights.mean(dim=0).square().sum() / 2
    torch.testing.assert_close(r1_penalty(logits, images), expected.expand(2))


# ----------------------------------------------------------------------- path length


def test_path_length_of_a_linear_generator():
    """image = sum over layers of A_l w_l: the lengths are |A_l^T y|, of which the RMS over l."""
    batch, layers, dim, side = 2, 3, 5, 4
    matrix = torch.randn(layers, 3 * side * side, dim, requires_grad=True)
    ws = torch.randn(batch, layers, dim, requires_grad=True)
    noise = torch.randn(batch, 3, side, side)
    images = torch.einsum("lpd, bld -> bp", matrix, ws).view(batch, 3, side, side)
    lengths = path_length(images, ws, noise)

    back = torch.einsum("lpd, bp -> bld", matrix, noise.flatten(1) / side)
    expected = back.norm(dim=2).square().mean(dim=1).sqrt()
    torch.testing.assert_close(lengths, expected)
    ours, theirs = (torch.autograd.grad(x.sum(), matrix)[0] for x in (lengths, expected))
    torch.testing.assert_close(ours, theirs)


def test_path_length_does_not_depend_on_the_resolution():
    """Each pixel follows one number of w, so |J^T y| = |y| = sqrt(3) but for the noise."""
    lengths = []
    for side in (8, 64):
        ws = torch.randn(1, 1, 3 * side * side, requires_grad=True)
        lengths.append(path_length(ws.view(1, 3, side, side), ws, torch.randn(1, 3, side, side)))
    torch.testing.assert_close(torch.cat(lengths), torch.full((2,), 3**0.5), rtol=0.1, atol=0)


def test_path_length_of_stylegan2_by_finite_differences(face):
    """(<G(w + εe), y> - <G(w - εe), y>) / 2ε along each of the L D axes e."""
    ws, noise, step = torch.randn(1, 6, 8), torch.randn(1, 3, 16, 16), 1e-2
    needed = ws.clone().requires_grad_()
    length = path_length(face.synthesis(needed), needed, noise)
    axes = step * torch.eye(48).view(48, 6, 8)
    with torch.no_grad():
        dots = [(face.synthesis(ws + s * axes) * noise / 16).sum(dim=(1, 2, 3)) for s in (1, -1)]
    slopes = ((dots[0] - dots[1]) / (2 * step)).view(6, 8)
    torch.testing.assert_close(
        length, slopes.norm(dim=1).square().mean().sqrt()[None], rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("slope, moved", [(1.0, ""), (0.2, "torgb")])
def test_gradients_of_path_length_by_finite_differences(
    generator_from_seed, monkeypatch, slope, moved
):
    """Along a random direction of the weights. Lengths jump where an activation changes its sign,
    so all weights move where the activation is linear, only those behind it where it is not."""
    monkeypatch.setattr(ops, "LRELU_SLOPE", slope)
    monkeypatch.setattr(stylegan2, "LRELU_SLOPE", slope)
    generator = generator_from_seed(1).requires_grad_(True)
    z, noise, step = torch.randn(2, 8), torch.randn(2, 3, 16, 16), 1e-2

    def loss() -> Tensor:
        ws = generator.mapping(z)[:, None].expand(-1, generator.num_ws, -1)
        lengths = path_length(generator.synthesis(ws), ws, noise)
        return path_length_penalty(lengths, torch.zeros(())).mean()

    loss().backward()
    weights = [p for n, p in generator.named_parameters() if moved in n and p.grad is not None]
    directions = [torch.randn_like(p) * p.detach().abs().mean() for p in weights]
    expected = sum(float((p.grad * d).sum()) for p, d in zip(weights, directions, strict=True))

    values = []
    for sign in (1, -2):  # to + step, then to - step
        with torch.no_grad():
            torch._foreach_add_(weights, directions, alpha=sign * step)
        values.append(loss().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=2e-2)


def test_path_length_penalty_by_hand():
    lengths = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(
        path_length_penalty(lengths, torch.tensor(2.5)), torch.tensor([2.25, 0.25])
    )
