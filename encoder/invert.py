"""Latent optimisation: pull a w+ start towards the latent whose picture is the target.

    losses = LossSet({"mse": 1.0, "ms_ssim": 0.2})
    ws = optimize_latent(generator, targets, start=encoder(targets), steps=50, losses=losses)

Shape letters: B batch, L layers of w+, D dimension of w, R resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from generators.stylegan2 import Generator

Losses = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]  # a LossSet
Callback = Callable[[int, Tensor, Tensor], None]  # step, ws (B, L, D), loss (B,)


def ramp(step: int, steps: int, rampup: float = 0.05, rampdown: float = 0.25) -> float:
    """Share of the learning rate at `step` of `steps`, above 0 and at most 1.

    Up linearly over the first part `rampup` of the steps, down by a cosine over the last part
    `rampdown`: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN",
    appendix D. Looked up in the middle of each step, so that no step of a short run is idle.
    """
    t = (step + 0.5) / steps
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / rampdown))
    return down * min(1.0, t / rampup)


def optimize_latent(
    generator: Generator,
    target: Tensor,  # (B, 3, R, R) in [-1, 1], R the generator's
    *,
    start: Tensor,  # (B, L, D) of w+
    steps: int,
    losses: Losses,  # (image, target) -> (total (B,), parts)
    learning_rate: float = 0.05,  # Adam's, at its highest
    callback: Callback | None = None,  # called with each w+ that was looked at, the start first
) -> Tensor:
    """ws (B, L, D): of all w+ seen on the way, for each picture the one with the lowest loss.

    Adam in w+, after Karras et al. 2020, appendix D (there: one w, noise on it, and the noise maps
    optimised too). The pictures of a batch do not influence each other: the sum of their losses
    is descended, and each keeps its own best. The result is therefore never worse than `start`,
    and is `start` where steps is 0. Nothing that is passed in changes.
    """
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, not {steps}")
    if len(start) != len(target):
        raise ValueError(f"{len(start)} starts for {len(target)} targets; give one for each")
    with torch.inference_mode(False), torch.enable_grad():
        target = target.detach().clone()  # a plain tensor, should it come from inference mode
        ws = start.detach().clone().requires_grad_()
        best, lowest = ws.detach().clone(), torch.full((len(ws),), math.inf, device=ws.device)
        if steps == 0 or len(ws) == 0:
            return best
        adam = torch.optim.Adam([ws], lr=learning_rate, betas=(0.9, 0.999))
        for step in range(steps + 1):
            last = step == steps  # only looked at
            with torch.set_grad_enabled(not last):
                loss, _ = losses(generator.synthesis(ws), target)  # (B,)
            with torch.no_grad():
                better = loss.detach() < lowest  # never where the loss is NaN
                best = torch.where(better[:, None, None], ws, best)
                lowest = torch.where(better, loss, lowest)
            if callback is not None:
                callback(step, ws.detach(), loss.detach())
            if not last:
                adam.param_groups[0]["lr"] = learning_rate * ramp(step, steps)
                (ws.grad,) = torch.autograd.grad(loss.sum(), ws)
                adam.step()
    return best


__all__ = ["optimize_latent", "ramp"]
