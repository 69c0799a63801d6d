"""How strongly a generator's picture answers to each direction of w+, measured once for all faces.

    python -m generators.curvature face.safetensors face_curvature.safetensors
    python -m generators.curvature … --latents latents/  # at photos, where a search will be
    curvature = load(resolve("curvature64"), Curvature)
    ws = start + curvature.offsets(u)                   # u (B, U): all directions alike steep

This curvature, the pullback metric of the synthesis network, is nearly the same everywhere and very
uneven: a few hundred directions carry it (Wang and Ponce 2021, arXiv:2101.06006, sections 3 and 4,
who use its eigenvectors to speed up inversion). Here it is Jᵀ J of the picture in w+, averaged over
faces, of random z or of photos, whose w+ lies elsewhere; found with random cotangents v of unit
variance, E[(Jᵀ v)(Jᵀ v)ᵀ] = Jᵀ J, of which one costs one backward pass. Kept: the largest
eigenvalues and the mean of the others.

Shape letters: B batch, L layers of w+, D dimension of w, K rank, U numbers that a search moves,
N probes, R resolution.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import tyro
from torch import Tensor, nn

from generators import checkpoint
from generators.bundled import companion
from generators.command import command, console, printable
from generators.disk import may_write
from generators.latents import read_ws
from generators.runs import frozen, seed_of
from generators.stylegan2 import Generator

DAMPING = 1e-3  # less serves where thousands of eigenvectors are kept (benchmarks/LOG.md)
NEGLIGIBLE = 0.01  # of the damping: with a mean below it the directions not kept are not searched
DAMPING_OF_ONE_W = 1e-2  # its eigenvalues are less spread (benchmarks/LOG.md)


@dataclass(frozen=True)
class CurvatureConfig:
    num_ws: int  # L
    w_dim: int  # D
    rank: int = 256  # K, eigenvectors kept; fewer where w+ has fewer dimensions
    damping: float = DAMPING  # added to eigenvalues, the largest being 1: flat directions stay slow
    still: tuple[int, ...] = ()  # rows of w+ that were not measured, and that no search moves

    def __post_init__(self) -> None:
        if min(self.num_ws, self.w_dim, self.rank) < 1:
            raise ValueError("num_ws, w_dim and rank must be 1 or more")
        if not self.damping > 0:
            raise ValueError(f"damping must be a number above 0, not {self.damping}")
        object.__setattr__(self, "still", tuple(self.still))  # a list when read from JSON
        if not set(self.still) < set(range(self.num_ws)):
            raise ValueError(f"still are some of the {self.num_ws} rows, not {self.still}")
        object.__setattr__(self, "rank", min(self.rank, len(self.rows) * self.w_dim))

    @property
    def rows(self) -> list[int]:
        """Of w+, that were measured."""
        return [row for row in range(self.num_ws) if row not in self.still]


class Curvature(nn.Module):
    """Eigenvectors and eigenvalues of the mean curvature of w+, the largest eigenvalue being 1."""

    kind: ClassVar[str] = "curvature"
    config_class: ClassVar[type] = CurvatureConfig

    basis: Tensor
    values: Tensor
    rest: Tensor

    def __init__(self, config: CurvatureConfig) -> None:
        super().__init__()
        self.config = config
        size = len(config.rows) * config.w_dim
        self.register_buffer("basis", torch.zeros(config.rank, size))  # orthonormal rows
        self.register_buffer("values", torch.zeros(config.rank))
        self.register_buffer("rest", torch.zeros([]))  # the mean of the other eigenvalues

    @property
    def size(self) -> int:
        """U, of `offsets`: K, and L * D more where what is not kept matters."""
        negligible = float(self.rest) < NEGLIGIBLE * self.config.damping
        return len(self.basis) + (0 if negligible else self.basis.shape[1])

    def offsets(self, u: Tensor) -> Tensor:
        """u (B, U) -> offsets in w+ (B, L, D), as far along each direction as the inverse square
        root of its eigenvalue allows.

        In u the mean curvature is close to the identity, so that descent goes everywhere equally
        fast; the steepest direction is as in w+.
        """
        damping, rank = self.config.damping, len(self.basis)
        w = (u[:, :rank] * (self.values + damping).rsqrt()) @ self.basis
        if u.shape[1] > rank:
            others = u[:, rank:]
            others = others - (others @ self.basis.T) @ self.basis
            w = w + (self.rest + damping).rsqrt() * others
        w = w.unflatten(1, (-1, self.config.w_dim))  # (B, rows, D)
        return w if not self.config.still else self._with_still(w)

    def _with_still(self, w: Tensor) -> Tensor:
        """(B, rows, D) -> (B, L, D), 0 where nothing was measured."""
        whole = w.new_zeros(len(w), self.config.num_ws, self.config.w_dim)
        return whole.index_copy(1, torch.tensor(self.config.rows, device=w.device), w)

    def of_one_w(self, layers: int | None = None) -> Curvature:
        """That of w (L = 1), the same w going to each of the first `layers` rows, None: to all."""
        layers, size = layers or self.config.num_ws, self.config.w_dim
        searched = [i for i, row in enumerate(self.config.rows) if row < layers]
        rows = self.basis.unflatten(1, (-1, size))[:, searched].sum(dim=1)  # (K, D)
        # the other eigenvalues' part is not known by direction: `rest` times what the kept leave
        whole = (rows.T * (self.values - self.rest)) @ rows
        whole = whole + len(searched) * self.rest * torch.eye(size).to(whole)
        values, vectors = torch.linalg.eigh(whole)
        result = Curvature(CurvatureConfig(1, size, size, DAMPING_OF_ONE_W)).to(rows)
        result.basis.copy_(vectors.T)
        result.values.copy_((values / values[-1]).clamp(min=0))
        return result


@torch.no_grad()
def measure(
    generator: Generator,
    probes: int = 2000,  # N, one backward pass each
    rank: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    latents: Tensor | None = None,  # ws (M, L, D) of faces to measure at; None: of random z
    damping: float = DAMPING,  # see CurvatureConfig
) -> Curvature:
    """The mean curvature of a generator's pictures in w+."""
    if probes < 1:
        raise ValueError("give at least one probe")
    rng = torch.Generator().manual_seed(seed_of(seed, "curvature"))
    device, rows = generator.w_avg.device, []
    for first in range(0, probes, batch_size):
        count = min(batch_size, probes - first)
        if latents is None:
            z = torch.randn(count, generator.z_dim, generator=rng)
            ws = generator.map(z.to(device)).requires_grad_()
        else:
            chosen = torch.randint(len(latents), (count,), generator=rng)
            ws = latents[chosen].to(device).requires_grad_()
        with torch.enable_grad():
            images = generator.synthesis(ws)
            cotangent = torch.randn(images.shape, generator=rng).to(images)
            rows.append(torch.autograd.grad(images, ws, cotangent)[0].flatten(1))
    samples = torch.cat(rows)  # (N, L * D)
    rank = min(rank, *samples.shape)
    config = CurvatureConfig(generator.num_ws, generator.w_dim, rank, damping)
    curvature = Curvature(config).to(device)
    _, singular, basis = torch.linalg.svd(samples, full_matrices=False)
    values = singular.square()
    others = max(samples.shape[1] - rank, 1)
    curvature.basis.copy_(basis[:rank])
    curvature.values.copy_(values[:rank] / values[0])
    curvature.rest.copy_(values[rank:].sum() / values[0] / others)
    return curvature


def curvature_of(generator: str | Path, given: str | Path | None = None) -> Curvature | None:
    """The curvature `given`, a bundled name or a file, or the bundled one of a bundled generator;
    None where there is neither."""
    given = companion(generator, "curvature") if given is None else given
    return None if given is None else checkpoint.load(checkpoint.resolve(given), Curvature)


@dataclass(frozen=True)
class MeasureConfig:
    source: Annotated[str, tyro.conf.Positional]  # a generator: a bundled name or a file
    target: Annotated[Path, tyro.conf.Positional]  # the .safetensors to write, in half precision
    latents: Path | None = None  # file or folder of ws, as of photos, to measure at; None: random z
    probes: int = 2000  # N, backward passes
    rank: int = 256  # K, eigenvectors kept
    damping: float = DAMPING  # added to eigenvalues, the largest being 1
    seed: int = 0  # of the draws
    overwrite: bool = False  # replace TARGET if it exists

    def __post_init__(self) -> None:
        if min(self.probes, self.rank) < 1:
            raise ValueError("--probes and --rank must be at least 1.")
        if not self.damping > 0:
            raise ValueError("--damping must be above 0.")


def run(config: MeasureConfig) -> None:
    path = checkpoint.resolve(config.source)
    may_write(config.target, config.overwrite, [path, *filter(None, [config.latents])])
    generator = frozen(checkpoint.load(path, Generator))
    ws = None if config.latents is None else read_ws(config.latents, generator)
    curvature = measure(
        generator, config.probes, config.rank, seed=config.seed, latents=ws, damping=config.damping
    )
    where = "random z" if ws is None else f"{len(ws)} latents of photos"
    provenance = checkpoint.read_metadata(path)["provenance"] | {
        "measured_on": path.stem,
        "at": where,
        "probes": str(config.probes),
        "seed": str(config.seed),
    }
    checkpoint.save(config.target, curvature, provenance=provenance, half=True)
    console.print(f"written: {printable(config.target)}")


def main(argv: Sequence[str] | None = None) -> int:
    return command(MeasureConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
