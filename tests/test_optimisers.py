"""Optimisers of many functions at once, on those whose minimum is known.

pytest tests/test_optimisers.py
"""

import pytest
import torch

from encoder.optimisers import Adam, Lbfgs, ramp


def run(method, function, steps):
    """The losses seen and the last point asked for."""
    losses = []
    for _ in range(steps):
        x = method.ask().requires_grad_()
        loss = function(x)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        method.tell(loss.detach(), gradient)
        losses.append(loss.detach())
    return torch.stack(losses), method.ask()


def quadratic(x):
    """Rows of condition number 1, 100, 10,000; minimum 0 at 1, 2, 3, …"""
    powers = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)
    weights = torch.stack([100.0 ** (i * powers) for i in range(len(x))])
    centre = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
    return (weights * (x - centre).square()).sum(dim=1)


def rosenbrock(x):
    return 100 * (x[:, 1] - x[:, 0] ** 2).square() + (1 - x[:, 0]).square()


def test_lbfgs_solves_badly_conditioned_quadratics():
    losses, x = run(Lbfgs(torch.zeros(3, 8, dtype=torch.float64)), quadratic, 60)
    assert (losses[-1] < 1e-9 * losses[0]).all()
    torch.testing.assert_close(
        x[:2], torch.arange(1.0, 9).double().expand(2, -1), atol=1e-4, rtol=0
    )


def test_lbfgs_walks_a_curved_valley():
    start = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [2.0, -1.0]], dtype=torch.float64)
    _, x = run(Lbfgs(start), rosenbrock, 120)
    torch.testing.assert_close(x, torch.ones_like(x), atol=1e-5, rtol=0)


def test_rows_are_independent():
    start = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [2.0, -1.0]], dtype=torch.float64)
    for make in (Lbfgs, lambda x: Adam(x, 30, 0.1)):
        together = run(make(start), rosenbrock, 30)[1]
        for i in range(3):
            alone = run(make(start[i : i + 1]), rosenbrock, 30)[1]
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-9, rtol=0)


def test_lbfgs_accepts_no_point_that_is_higher_or_not_a_number():
    def cliff(x):  # not a number beyond 1
        return torch.where(x[:, 0] > 1, torch.nan, (x[:, 0] - 0.99).square())

    method = Lbfgs(torch.tensor([[-3.0]]), first_step=10.0)
    losses, _ = run(method, cliff, 25)
    assert losses.isnan().any()  # it was tried
    accepted = method.loss
    assert accepted is not None and accepted.item() < 1e-3
    assert method.x.item() <= 1


def test_lbfgs_scales_its_first_guess_up_and_follows_slowly():
    """The γ of curvature k is OVER / k; a change of k moves it by 1 - MEMORY of the way in logs."""
    method = Lbfgs(torch.full((1, 1), 10.0, dtype=torch.float64), first_step=1e-3)
    gammas = []
    for k in (1.0, 1.0, 4.0):
        method.pairs.clear()  # the direction is then γ times the gradient
        x = method.x if method.loss is None else method.ask()
        method.gradient = k * method.x
        method.tell(torch.tensor([-float(len(gammas))]).double(), k * x)
        gammas.append(method.scale.item())
    assert gammas == pytest.approx([0, Lbfgs.OVER, Lbfgs.OVER * 0.25 ** (1 - Lbfgs.MEMORY)])


def test_lbfgs_stays_where_the_gradient_is_zero():
    method = Lbfgs(torch.full((1, 2), 3.0))
    _, x = run(method, lambda x: 0 * x.sum(dim=1), 3)
    assert torch.equal(x, torch.full((1, 2), 3.0))


def test_adam_is_torchs_with_a_ramp():
    start = torch.tensor([[0.5, -2.0]])
    _, x = run(Adam(start, 5, 0.1), lambda x: x.square().sum(dim=1), 5)
    expected = start.clone().requires_grad_()
    adam = torch.optim.Adam([expected])
    for step in range(5):
        adam.param_groups[0]["lr"] = 0.1 * ramp(step, 5)
        expected.grad = 2 * expected.detach()
        adam.step()
    torch.testing.assert_close(x, expected.detach())


def test_the_learning_rate_ramps_up_and_down():
    shares = [ramp(step, 100) for step in range(100)]
    assert shares[:5] == sorted(shares[:5]) and shares[5:75] == [1.0] * 70
    assert shares[75:] == sorted(shares[75:], reverse=True) and 0 < shares[-1] < 0.01
    assert ramp(0, 1) > 0
    assert [ramp(step, 10, 0, 0) for step in range(10)] == pytest.approx([1.0] * 10)
