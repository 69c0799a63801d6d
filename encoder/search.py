"""Latent optimisation: search the latent whose picture is the target, for each picture of a batch.

    losses = LossSet({"mse": 1.0, "ms_ssim": 0.2})
    found = optimise_latent(generator, targets, losses=losses, start=encoder(targets))
    found.ws, found.image, found.loss           # (B, L, D), (B, 3, R, R), (B,)

    search = Search(space="w", steps=1000, optimiser="adam", learning_rate=0.1)
    found = optimise_latent(generator, targets, losses=losses, search=search, start="mean")

The same function refines what an encoder has found, is the yardstick it is measured by, and
completes masked pictures. Files and the command line: `encoder.invert`.
Shape letters: B batch, L layers of w+, D dimension of w, Z dimension of z, R resolution, P all
numbers that are searched for a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from encoder.losses import LossSet
from encoder.optimisers import Adam, Lbfgs, Optimiser
from generators.curvature import Curvature
from generators.dcgan import DcganGenerator
from generators.runs import seed_of
from generators.stylegan2 import Generator

Space = Literal["z", "w", "w+"]
Callback = Callable[[int, Tensor, Tensor], None]  # step, images (B, 3, R, R), loss (B,)

NOISE_UNTIL = 0.75  # part of the steps after which the latent noise is gone (Karras et al. 2020)
W_SAMPLES = 1024  # of w, for its distance from the mean
ENOUGH = 1e-3  # relative fall of the loss that counts as one, for `patience`
AFFINE_UNIT = 0.1  # of the side, of a radian, of log scale: one unit of the search


@dataclass(frozen=True)
class Search:
    """How to search. The defaults are those that refine an encoder's latent best."""

    steps: int = 100  # evaluations of the losses with their gradient, after the start's
    space: Space = "w+"  # of a DCGAN always z
    optimiser: Literal["lbfgs", "adam"] = "lbfgs"  # lbfgs is faster; adam takes noise
    learning_rate: float = 0.05  # adam's, at its highest
    rampup: float = 0.05  # adam: part of the steps over which the rate grows, 0 to 1
    rampdown: float = 0.25  # adam: part of the steps over which it falls, 0 to 1
    latent_noise: float = 0.0  # adam: 0.05 in the paper, of the rms distance from the mean
    noise_maps: bool = False  # adam: search the synthesis network's noise maps too
    noise_weight: float = 1e5  # of their regulariser, from 0
    affine: bool = False  # search the target's shift, angle, scale too: up to 5 %, 6 degrees, 6 %
    affine_weight: float = 1e-3  # of their squares, in sides, radians, log scale
    patience: int = 0  # steps without a fall of the loss after which a picture is done; 0: never
    candidates: int = 32  # random latents the start "random" takes the best of
    seed: int = 0  # of candidates and noise

    def __post_init__(self) -> None:
        if self.steps < 0 or self.patience < 0:
            raise ValueError("steps and patience must be 0 or more")
        if self.candidates < 1:
            raise ValueError(f"candidates must be 1 or more, not {self.candidates}")
        if (self.latent_noise or self.noise_maps) and self.optimiser != "adam":
            raise ValueError("latent noise and noise maps are for the optimiser adam; choose it")
        for name in ("learning_rate", "latent_noise", "noise_weight", "affine_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a number from 0, not {getattr(self, name)}")
        if not (0 <= self.rampup <= 1 and 0 <= self.rampdown <= 1):
            raise ValueError("rampup and rampdown are parts of the steps, 0 to 1")


@dataclass(frozen=True)
class Inversion:
    """The best of all that was looked at, each picture's own."""

    latent: Tensor  # (B, Z), (B, D) or (B, L, D), of the searched space
    ws: Tensor | None  # (B, L, D); None of a DCGAN
    image: Tensor  # (B, 3, R, R), about [-1, 1]
    loss: Tensor  # (B,)
    step: Tensor  # (B,) at which it was seen; 0: the start
    steps: int  # that were taken
    affine: Tensor | None = None  # (B, 2, 3): unit square -> place in the target's unit square
    noise: dict[str, Tensor] | None = None  # maps (B, 1, r, r) by their name in the synthesis


def optimise_latent(
    generator: Generator | DcganGenerator,
    target: Tensor,  # (B, 3, R, R) in [-1, 1], R the generator's
    *,
    losses: LossSet,
    search: Search = Search(),
    start: Tensor | Literal["mean", "random"] = "mean",  # or (B, …) of the space, or of w+ for w
    mask: Tensor | None = None,  # (B, 1, R, R) 1 valid, 0 corrupted: not looked at
    curvature: Curvature | None = None,  # the generator's; makes L-BFGS in w and w+ faster
    callback: Callback | None = None,  # with all that is looked at, the start first
) -> Inversion:
    """The latents of lowest loss seen on the way; never worse than the start.

    Pictures do not influence each other: each has its own steps, line search, early stop and best,
    and random draws are the same for all. Nothing that is passed in changes. Adam, its schedule,
    latent noise and noise maps: Karras et al. 2020 (arXiv:1912.04958), appendix D.

    ValueError for a start that does not fit.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # 1. What is minimised, over what, and how.
        target = target.detach().clone()  # a plain tensor, should it come from inference mode
        problem = Problem(generator, target, losses, search, mask, curvature)
        origin = problem.origin(start)
        x = origin.new_zeros(len(target), problem.size)
        method: Optimiser
        if search.optimiser == "lbfgs":
            method = Lbfgs(x)
        else:
            rates = (search.rampup, search.rampdown)
            method = Adam(x, search.steps, search.learning_rate, *rates)

        # 2. Each step is one look at all pictures; of each the best that was seen is kept.
        best: tuple[Tensor, ...] | None = None
        waited = torch.zeros(len(target), dtype=torch.long, device=target.device)
        for step in range(search.steps + 1):
            last = step == search.steps  # only looked at
            x = method.ask().requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                latent, image, loss = problem.evaluate(origin, x, step)  # loss (B,)
            if callback is not None:
                callback(step, image.detach(), loss.detach())
            with torch.no_grad():
                known = torch.where(loss.isnan(), math.inf, loss)  # so that NaN never wins
                seen = (known, x, latent, image, torch.full_like(waited, step))
                if best is None:
                    best = tuple(part.detach().clone() for part in seen)
                else:
                    fell = known < best[0] * (1 - ENOUGH)
                    active = waited < (search.patience or search.steps + 1)
                    better = (known < best[0]) & active
                    best = tuple(
                        torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)
                        for new, old in zip(seen, best, strict=True)
                    )
                    waited = torch.where(fell & active, 0, waited + 1)
            # 3. The next point is the optimiser's affair.
            if search.patience and (waited >= search.patience).all():
                break
            if step < search.steps:
                (gradient,) = torch.autograd.grad(loss.sum(), x)
                method.tell(loss.detach(), gradient)
        assert best is not None
    return problem.result(best, step)


@dataclass(frozen=True)
class LatentSpace:
    """All that a search has to know of the space it searches; the rows are in `space_of`."""

    shape: tuple[int, ...]  # of one latent: (Z,), (D,) or (L, D)
    ws_avg: Tensor  # (L, D) that the loss w_norm pulls to
    mean: Tensor | None  # the start "mean"; None: there the space has no picture of its own
    of_z: Callable[[Tensor], Tensor]  # z (B, Z) -> latents (B, …)
    of_given: Callable[[Tensor], Tensor]  # latents of this space, w or w+ -> latents
    ws: Callable[[Tensor], Tensor]  # latents -> what the network draws, (B, L, D)
    spread: Callable[[torch.Generator], Tensor | float]  # rms length of latents from their mean
    metric: Callable[[Curvature], Curvature] | None = None  # of w+ -> of this space; None: unknown


def space_of(generator: Generator | DcganGenerator, name: Space) -> LatentSpace:
    """The row of a space: z, w or w+ of a StyleGAN2; of a DCGAN, whatever the name, its z."""

    def same(latents: Tensor) -> Tensor:
        return latents

    z_shape, root = (generator.z_dim,), math.sqrt(generator.z_dim)
    if not isinstance(generator, Generator):  # its network draws z, which passes for ws (B, 1, Z)
        zeros = generator.torgb.weight.new_zeros(generator.z_dim)
        return LatentSpace(z_shape, zeros, zeros, same, same, lambda z: z[:, None], lambda _: root)

    w_avg, ws_avg = generator.w_avg, generator.ws_avg
    if name == "z":
        return LatentSpace(z_shape, ws_avg, None, same, same, generator.map, lambda _: root)

    def everywhere(w: Tensor) -> Tensor:
        return generator.broadcast(w) if w.ndim == 2 else w

    def one(ws: Tensor) -> Tensor:
        return ws[:, : generator.layers].mean(dim=1) if ws.ndim == 3 else ws

    @torch.no_grad()
    def spread_of_w(rng: torch.Generator) -> Tensor:
        z = torch.randn(W_SAMPLES, generator.z_dim, generator=rng).to(w_avg)
        return (generator.mapping(z) - w_avg).square().sum(dim=1).mean().sqrt()

    of_w = LatentSpace(
        w_avg.shape, ws_avg, w_avg, generator.mapping, one, everywhere, spread_of_w,
        lambda curvature: curvature.of_one_w(generator.layers),
    )  # fmt: skip
    if name == "w":
        return of_w
    return replace(
        of_w,
        shape=ws_avg.shape,
        mean=ws_avg,
        of_z=lambda z: everywhere(generator.mapping(z)),
        of_given=everywhere,
        ws=same,
        metric=lambda curvature: curvature,
    )


class Problem:
    """x (B, P) -> latents, pictures, losses. In x, side by side: offset of the latent from where it
    starts, then, if searched, place of the target (4) and offsets of the noise maps."""

    def __init__(
        self,
        generator: Generator | DcganGenerator,
        target: Tensor,
        losses: LossSet,
        search: Search,
        mask: Tensor | None,
        curvature: Curvature | None,
    ) -> None:
        self.generator, self.target, self.losses = generator, target, losses
        self.search, self.mask = search, mask
        self.space = space_of(generator, search.space)
        self.shape = self.space.shape
        self.objective = losses.against(target, mask)  # without an affine search
        self.metric = None
        if curvature is not None and search.optimiser == "lbfgs" and self.space.metric is not None:
            check_curvature(curvature, generator)
            self.metric = self.space.metric(curvature)
        self.maps: dict[str, Tensor] = {}  # (r, r)
        if search.noise_maps:
            self.maps = {
                name: buffer
                for name, buffer in getattr(generator, "synthesis", generator).named_buffers()
                if name.endswith("noise_const")
            }
            if not self.maps:
                raise ValueError("this generator has no noise maps; search without them")
        self.sizes = [
            math.prod(self.shape) if self.metric is None else self.metric.size,
            4 if search.affine else 0,
            sum(noise.numel() for noise in self.maps.values()),
        ]
        self.size = sum(self.sizes)  # P
        self.noise = self.latent_noise() if search.latent_noise else None

    # ------------------------------------------------------------------------- where it starts

    @torch.no_grad()
    def origin(self, start: Tensor | Literal["mean", "random"]) -> Tensor:
        """(B, …) of the space."""
        if isinstance(start, Tensor):
            return self.given(start)
        if start == "mean":
            if self.space.mean is None:
                raise ValueError("the mean of z is no face; start a search in z from random")
            return self.space.mean.expand(len(self.target), *self.shape).clone()
        return self.best_candidate()

    def best_candidate(self) -> Tensor:
        """(B, …): of the same random latents, each picture's own best."""
        rng = torch.Generator().manual_seed(seed_of(self.search.seed, "start"))
        z = torch.randn(self.search.candidates, self.generator.z_dim, generator=rng)
        candidates = self.space.of_z(z.to(self.space.ws_avg))  # (N, …)
        losses = []  # N of (B,)
        for candidate in candidates.split(1):
            image, ws = self.picture(candidate)
            image, ws = image.expand_as(self.target), ws.expand(len(self.target), -1, -1)
            losses.append(self.objective(image, ws=ws, w_avg=self.space.ws_avg)[0])
        best = torch.stack(losses).nan_to_num(nan=math.inf).argmin(dim=0)  # (B,)
        return candidates[best]

    def given(self, start: Tensor) -> Tensor:
        if len(start) != len(self.target):
            raise ValueError(f"{len(start)} starts for {len(self.target)} targets; give each one")
        start = self.space.of_given(start.detach())
        if start.shape[1:] != self.shape:
            raise ValueError(
                f"a start in {self.search.space} is {tuple(self.shape)}, not "
                f"{tuple(start.shape[1:])}"
            )
        return start.clone()

    # ---------------------------------------------------------------------------- what it costs

    def evaluate(self, origin: Tensor, x: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """latent (B, …), images (B, 3, R, R), loss (B,) with all penalties."""
        offset, place, noise = x.split(self.sizes, dim=1)
        latent = origin + self.offset(offset)
        if self.noise is not None:
            t = step / max(self.search.steps, 1)
            latent = latent + max(0.0, 1 - t / NOISE_UNTIL) ** 2 * self.noise
        maps = self.noise_maps(noise)
        image, ws = self.picture(latent, maps)
        if self.search.affine:
            target, mask = self.placed(place)
            loss, _ = self.losses(image, target, mask, ws=ws, w_avg=self.space.ws_avg)
            loss = loss + self.search.affine_weight * (AFFINE_UNIT * place).square().sum(dim=1)
        else:
            loss, _ = self.objective(image, ws=ws, w_avg=self.space.ws_avg)
        if maps:
            loss = loss + self.search.noise_weight * noise_regulariser(maps)
        return latent, image, loss

    def offset(self, u: Tensor) -> Tensor:
        if self.metric is not None:
            return self.metric.offsets(u).reshape(-1, *self.shape)
        return u.reshape(-1, *self.shape)

    def picture(
        self, latent: Tensor, maps: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images, and ws (B, L, D), of a DCGAN z as (B, 1, Z)."""
        ws = self.space.ws(latent)
        if not isinstance(self.generator, Generator):
            return self.generator(ws[:, 0]), ws
        if maps:
            return functional_call(self.generator.synthesis, maps, (ws,)), ws
        return self.generator.synthesis(ws), ws

    def latent_noise(self) -> Tensor:
        """(1, …) at its strongest, the same for all pictures."""
        rng = torch.Generator().manual_seed(seed_of(self.search.seed, "noise"))
        size = self.space.spread(rng)
        noise = torch.randn(1, *self.shape, generator=rng).to(self.space.ws_avg)
        return self.search.latent_noise * size * noise

    def noise_maps(self, offsets: Tensor) -> dict[str, Tensor]:
        """Maps (B, 1, r, r) of mean 0 and variance 1."""
        parts = offsets.split([noise.numel() for noise in self.maps.values()], dim=1)
        result = {}
        for (name, start), part in zip(self.maps.items(), parts, strict=True):
            noise = start + part.view(-1, 1, *start.shape)
            noise = noise - noise.mean(dim=(2, 3), keepdim=True)
            variance = noise.square().mean(dim=(2, 3), keepdim=True)
            result[name] = noise * (variance + 1e-8).rsqrt()
        return result

    # ------------------------------------------------------------------------------ affine search

    def placed(self, place: Tensor) -> tuple[Tensor, Tensor | None]:
        """Target and mask as seen from place (B, 4); beyond its edges it is mirrored."""
        matrix = affine_matrix(place)
        linear, shift = matrix[..., :2], matrix[..., 2:]
        centre = 2 * (shift + linear.sum(-1, keepdim=True) / 2) - 1  # [0, 1] -> [-1, 1]
        theta = torch.cat([linear, centre], -1).to(self.target)
        grid = F.affine_grid(theta, list(self.target.shape), align_corners=False)
        options = {"mode": "bicubic", "padding_mode": "reflection", "align_corners": False}
        target = F.grid_sample(self.target, grid, **options)  # type: ignore[arg-type]
        if self.mask is None:
            return target, None
        mask = self.mask.to(target).expand(len(target), -1, -1, -1)
        return target, F.grid_sample(mask, grid.detach(), **options)  # type: ignore[arg-type]

    @torch.no_grad()
    def result(self, best: tuple[Tensor, ...], steps: int) -> Inversion:
        loss, x, latent, image, step = best
        _, place, noise = x.split(self.sizes, dim=1)
        ws = self.space.ws(latent) if isinstance(self.generator, Generator) else None
        affine = affine_matrix(place) if self.search.affine else None
        return Inversion(
            latent, ws, image, loss, step, steps, affine, self.noise_maps(noise) or None
        )


def check_curvature(curvature: Curvature, generator: Generator | DcganGenerator) -> None:
    found = (curvature.config.num_ws, curvature.config.w_dim)
    wanted = (generator.num_ws, generator.w_dim) if isinstance(generator, Generator) else None
    if found != wanted:
        raise ValueError(
            f"the curvature is of {found[0]} layers of {found[1]}, which the generator has not; "
            "measure its own with python -m generators.curvature"
        )


def affine_matrix(place: Tensor) -> Tensor:
    """(B, 4) shift x, y, angle, log scale in AFFINE_UNITs -> (B, 2, 3), turning about the middle of
    the unit square."""
    x, y, angle, scale = (AFFINE_UNIT * place).unbind(dim=1)
    cos, sin = scale.exp() * angle.cos(), scale.exp() * angle.sin()
    linear = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    shift = torch.stack([x, y], -1)[..., None]
    middle = torch.full_like(shift, 0.5)
    return torch.cat([linear, shift + middle - linear @ middle], dim=-1)


def noise_regulariser(maps: dict[str, Tensor]) -> Tensor:
    """(B,): squared correlation of each map with itself one pixel along, on all scales down to 8.

    Karras et al. 2020 (arXiv:1912.04958), appendix D, eq. 4.
    """
    terms = []
    for noise in maps.values():
        level = noise
        while True:
            for axis in (2, 3):
                terms.append((level * level.roll(1, axis)).mean(dim=(1, 2, 3)).square())
            if level.shape[-1] <= 8:
                break
            level = F.avg_pool2d(level, 2) * 2
    return torch.stack(terms).sum(dim=0)
