"""Minimise many independent functions at once: row b of x (B, P) belongs to function b alone.

    method = Lbfgs(x)                       # or Adam(x, steps=1000, learning_rate=0.05)
    while looking:
        x = method.ask()                    # (B, P): the points to look at, the start first
        loss, gradient = …                  # (B,), (B, P) there
        method.tell(loss, gradient)

One ask is one evaluation, which is what a step costs; no row ever influences another.
Shape letters: B batch, P parameters.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Protocol

import torch
from torch import Tensor


class Optimiser(Protocol):
    def ask(self) -> Tensor: ...
    def tell(self, loss: Tensor, gradient: Tensor) -> None: ...


def ramp(step: int, steps: int, rampup: float = 0.05, rampdown: float = 0.25) -> float:
    """Share of the learning rate at `step` of `steps`, above 0 and at most 1.

    Up linearly over the first part `rampup` of the steps, down by a cosine over the last part
    `rampdown`: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN",
    appendix D. Looked up in the middle of each step, so that no step of a short run is idle.
    """
    t = (step + 0.5) / steps
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / rampdown)) if rampdown > 0 else 1.0
    return down * (min(1.0, t / rampup) if rampup > 0 else 1.0)


class Adam:
    """torch's Adam, which works element by element, with a learning rate that ramps."""

    def __init__(
        self,
        x: Tensor,  # (B, P)
        steps: int,
        learning_rate: float,  # at its highest
        rampup: float = 0.05,
        rampdown: float = 0.25,
    ) -> None:
        self.x = x.detach().clone()
        self.adam = torch.optim.Adam([self.x], betas=(0.9, 0.999))
        self.steps, self.done = steps, 0
        self.rate = partial(ramp, steps=steps, rampup=rampup, rampdown=rampdown)
        self.learning_rate = learning_rate

    def ask(self) -> Tensor:
        return self.x.clone()

    def tell(self, loss: Tensor, gradient: Tensor) -> None:
        if self.done < self.steps:
            self.adam.param_groups[0]["lr"] = self.learning_rate * self.rate(self.done)
            self.x.grad = gradient
            self.adam.step()
            self.done += 1


class Lbfgs:
    """Limited-memory BFGS with a backtracking line search, each row its own.

    Two-loop recursion: Nocedal and Wright 2006, "Numerical Optimization", algorithm 7.4, from the
    inverse Hessian γ I. Their γ (eq. 7.20) is that of steep directions, and jumps: here it is OVER
    times as large and forgets slowly. The first trial of a direction is its whole step, shortened
    by SHORTEN until the loss falls enough (Armijo, eq. 3.4). A trial that is not finite counts as
    not falling.
    """

    ENOUGH, SHORTEN = 1e-4, 0.4
    OVER, MEMORY = 2.0, 0.8  # chosen by searches after an encoder, see benchmarks/LOG.md

    def __init__(self, x: Tensor, *, first_step: float = 0.3, history: int = 20) -> None:
        self.x = x.detach().clone()  # (B, P) the last accepted points
        self.first_step, self.history = first_step, history
        self.loss: Tensor | None = None  # (B,) there
        self.gradient = self.direction = torch.zeros_like(x)
        self.length = x.new_ones(len(x), 1)
        self.scale = x.new_zeros(len(x), 1)  # γ; 0: not known yet
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # step, change of gradient, 1 / s·y

    def ask(self) -> Tensor:
        return self.x + self.length * self.direction

    def tell(self, loss: Tensor, gradient: Tensor) -> None:
        if self.loss is None:  # the start
            self.loss = loss.nan_to_num(nan=math.inf)
            self.gradient = gradient.nan_to_num(0, 0, 0)
            self._turn()
            return

        # A row takes the point if its loss fell enough for the way it went.
        step = self.length * self.direction
        enough = self.loss + self.ENOUGH * dot(step, self.gradient)[:, 0]
        fell = (loss <= enough) & gradient.isfinite().all(dim=1)  # (B,)
        taken = fell[:, None]

        # What the step taught about the curvature; rows that stay learn a pair of zeros.
        change = torch.where(taken, gradient - self.gradient, 0.0)
        step = torch.where(taken, step, 0.0)
        product, norm = dot(step, change), dot(change, change)
        curved = product > 1e-10 * norm  # else the pair is a zero, which the recursion passes over
        inverse = torch.where(curved, 1 / product.where(curved, 1.0), 0.0)
        scale = self.OVER * product.where(curved, 1.0) / norm.where(curved, 1.0)
        known = torch.where(self.scale > 0, self.scale, scale)
        followed = known**self.MEMORY * scale ** (1 - self.MEMORY)
        self.scale = torch.where(curved, followed, self.scale)
        self.pairs = [*self.pairs, (step, change, inverse)][-self.history :]

        # A row that stays tries a shorter step in the same direction.
        self.x = self.x + step
        self.loss = torch.where(fell, loss, self.loss)
        self.gradient = torch.where(taken, gradient, self.gradient)
        shorter = self.length * self.SHORTEN
        self._turn()
        self.length = torch.where(taken, self.length, shorter)

    def _turn(self) -> None:
        """The direction at x, of length 1 of itself."""
        q, weights = self.gradient, []
        for step, change, inverse in reversed(self.pairs):
            weights.append(inverse * dot(step, q))
            q = q - weights[-1] * change
        first = self.first_step / self.gradient.norm(dim=1, keepdim=True).clamp(min=1e-30)
        q = q * torch.where(self.scale > 0, self.scale, first)
        for (step, change, inverse), weight in zip(self.pairs, reversed(weights), strict=True):
            q = q + (weight - inverse * dot(change, q)) * step
        down = dot(q, self.gradient) > 0
        self.direction = -torch.where(down, q, self.gradient * first)
        self.length = torch.ones_like(self.length)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, P), (B, P) -> (B, 1)"""
    return (a * b).sum(dim=1, keepdim=True)
