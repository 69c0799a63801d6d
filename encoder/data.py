"""What the encoder learns from: real faces, and synthetic pairs of the frozen generator.

    batch = draw(dataset, generator, global_batch=32, synthetic_fraction=0.25, rng=rng)

Shape letters: B batch, L layers of w+, D dimension of w, R resolution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from generators.data import Pictures, random_batch
from generators.latents import mix
from generators.runs import rows_of_rank
from generators.stylegan2 import Generator


@dataclass(frozen=True)
class Batch:
    images: Tensor  # (B, 3, R, R) in [-1, 1]: real pictures, then synthetic ones
    ws: Tensor  # (B, L, D): the truth of the synthetic rows, w_avg elsewhere
    known: Tensor  # (B,): 1 where ws is the truth


def draw(
    dataset: Pictures,
    generator: Generator,
    *,
    global_batch: int,  # pictures over all processes and accumulation steps
    synthetic_fraction: float,  # of each process's rows, rounded
    rng: torch.Generator,  # of this step, in the same state in every process
    rank: int = 0,
    world: int = 1,
) -> Batch:
    """This rank's rows of the step's global batch, on the generator's device.

    n processes with batch B see together the pictures that one process with batch n * B sees,
    if synthetic_fraction splits B without rounding.
    """
    synthetic = round(global_batch // world * synthetic_fraction) * world
    device, real = generator.w_avg.device, global_batch - synthetic
    images = (
        random_batch(dataset, real, rng, rank, world).to(device, non_blocking=True)
        if real
        else None
    )
    ws = generator.ws_avg.expand(real // world, -1, -1)
    known = torch.zeros(real // world, device=device)
    if synthetic:
        made, made_ws = synthetic_pairs(generator, synthetic, rng, rank, world)
        images = made if images is None else torch.cat([images, made])
        ws, known = (
            torch.cat([ws, made_ws]),
            torch.cat([known, torch.ones(len(made), device=device)]),
        )
    assert images is not None
    return Batch(images, ws, known)


@torch.no_grad()
def synthetic_pairs(
    generator: Generator, count: int, rng: torch.Generator, rank: int = 0, world: int = 1
) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, R, R) in [-1, 1] and their ws (B, L, D).

    Each has one style-mixing crossover (Karras et al. 2019, section 3.1), so that the layers of
    w+ differ.
    """
    z = torch.randn(2, count, generator.z_dim, generator=rng)
    crossover = torch.randint(1, generator.layers + 1, (count,), generator=rng)
    mine = rows_of_rank(crossover, rank, world).tolist()
    coarse, fine = (
        generator.map(rows_of_rank(part, rank, world).to(generator.w_avg.device)) for part in z
    )
    ws = torch.cat([mix(a[None], b[None], k) for a, b, k in zip(coarse, fine, mine, strict=True)])
    return generator.synthesis(ws).clamp(-1, 1), ws
