"""Directions of w+ that change a face in one way: found without labels or with them, and applied.

    samples = mapped(face)                                 # (M, L, D) of random z
    steps = spread(principal_axes_of(samples, 8), samples)     # a step: one standard deviation
    directions = load(resolve("directions128"), Directions)
    ws = ws + directions.offset(edits_of(["smile=1.5", "pc3=-2@4-7"]))

Without labels: principal axes of w (GANSpace, Härkönen et al. 2020, arXiv:2004.02546, section 2.1),
and the directions that a group of layers answers to most (SeFa, Shen & Zhou 2021, arXiv:2007.06600,
eq. 8). With labels: w+ as a linear function of all labels, so that each direction is the change of
w+ with its label while the others stay.

Shape letters: B batch, M samples, N directions, K labels, L layers of w+, D dimension of w.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.options import Edit
from generators import checkpoint
from generators.bundled import companion
from generators.command import printable
from generators.latents import SAMPLES, SPATIAL_LAYER, affines
from generators.runs import seed_of
from generators.stylegan2 import Generator
from generators.tails import trunk_of

TRUNK = 16  # a generator is known by its mapping and by its blocks below this resolution
# layers of 4² and 8², of 16² and 32², and the others: Karras et al. 2019, section 3.1
GROUPS = {"coarse": range(0, 4), "middle": range(4, 8), "fine": range(8, 1000)}


@dataclass(frozen=True)
class DirectionsConfig:
    num_ws: int  # L
    w_dim: int  # D
    names: tuple[str, ...]  # N, as edits call them
    first: tuple[int, ...]  # N, of the layers that each direction moves; the others' are 0
    last: tuple[int, ...]  # N
    trunk: str  # `fingerprint` of the generator whose w+ it is
    unit: str = "one standard deviation of the data along the direction"  # of a step
    layers: int = 0  # of the L rows, before those of a spatial code; 0: all

    def __post_init__(self) -> None:
        count = len(self.names)
        if min(self.num_ws, self.w_dim, count) < 1 or len(set(self.names)) < count:
            raise ValueError("there must be layers, a dimension, and names, each of them once")
        if not 0 <= self.layers <= self.num_ws:
            raise ValueError(f"layers must be 0 to {self.num_ws}, not {self.layers}")
        if len(self.first) != count or len(self.last) != count:
            raise ValueError("each name needs a first and a last layer")
        ranges = zip(self.first, self.last, strict=True)
        if not all(0 <= first <= last < self.num_ws for first, last in ranges):
            raise ValueError(f"layers are 0 to {self.num_ws - 1}, the first before the last")


class Directions(nn.Module):
    """Named steps in w+ (N, L, D), of one generator."""

    kind: ClassVar[str] = "directions"
    config_class: ClassVar[type] = DirectionsConfig

    steps: Tensor

    def __init__(self, config: DirectionsConfig) -> None:
        super().__init__()
        self.config = config
        shape = (len(config.names), config.num_ws, config.w_dim)
        self.register_buffer("steps", torch.zeros(shape))

    @classmethod
    def of(cls, face: Generator, steps: dict[str, Tensor]) -> Directions:
        """Of steps {name: (L, D)} in the w+ of `face`."""
        moved = [
            step[: face.layers].abs().amax(dim=1).nonzero()[:, 0].tolist() or [0]
            for step in steps.values()
        ]
        config = DirectionsConfig(
            num_ws=face.num_ws,
            w_dim=face.w_dim,
            layers=face.layers,
            names=tuple(steps),
            first=tuple(layers[0] for layers in moved),
            last=tuple(layers[-1] for layers in moved),
            trunk=fingerprint(face),
        )
        made = cls(config)
        made.steps.copy_(torch.stack([*steps.values()]))
        return made.eval()

    def check(self, face: Generator) -> None:
        """ValueError unless they are of this generator's w+."""
        if self.config.trunk != fingerprint(face):
            raise ValueError(
                "The directions were found in another face generator: mapping or early blocks "
                "differ; find them anew with python -m encoder.edit directions --face-generator …."
            )

    def offset(self, edits: Iterable[Edit]) -> Tensor:
        """(L, D) to be added to ws: the sum of all edits. ValueError for a direction, or a layer,
        that there is not."""
        config, total = self.config, torch.zeros_like(self.steps[0])
        for edit in edits:
            if edit.name not in config.names:
                raise ValueError(
                    f"There is no direction {printable(edit.name)}; choose from "
                    f"{printable(', '.join(config.names), 1000)}."
                )
            layers = config.layers or config.num_ws
            last = layers - 1 if edit.last is None else edit.last
            if not edit.first <= last < layers:
                raise ValueError(
                    f"The layers of w+ are 0 to {layers - 1} here; "
                    f"{printable(edit.name)} cannot be limited to {edit.first}-{last}."
                )
            step = self.steps[config.names.index(edit.name)]
            total[edit.first : last + 1] += edit.strength * step[edit.first : last + 1]
            if edit.first <= SPATIAL_LAYER <= last:
                total[layers:] += edit.strength * step[layers:]
        return total


def fingerprint(face: Generator) -> str:
    return trunk_of(face, min(TRUNK, face.resolution))


# ------------------------------------------------------------------------------- the data


@torch.no_grad()
def mapped(face: Generator, count: int = SAMPLES, seed: int = 0) -> Tensor:
    """(M, L, D): the w of random z, at every layer; no copies."""
    rng = torch.Generator().manual_seed(seed_of(seed, "directions"))
    z = torch.randn(count, face.z_dim, generator=rng)
    return face.broadcast(face.mapping(z.to(face.w_avg)))


def along(samples: Tensor, axes: Tensor) -> Tensor:
    """Where samples (M, L, D) lie along unit axes (N, L, D), from their mean: (M, N)."""
    layers = zip(samples.unbind(1), axes.unbind(1), strict=True)
    places = torch.stack([w @ axis.T for w, axis in layers]).sum(dim=0)
    return places - places.mean(dim=0)


def spread(axes: Tensor, samples: Tensor) -> Tensor:
    """Axes (N, L, D) of any length -> steps, as long as the standard deviation of the samples
    (M, L, D) along them."""
    unit = axes / axes.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    return unit * along(samples, unit).std(dim=0)[:, None, None]


# ---------------------------------------------------------------------------- the finding


def principal_axes_of(samples: Tensor, count: int, layers: int | None = None) -> Tensor:
    """Of samples (M, L, D) the `count` principal axes (N, L, D), the widest first: of w, where all
    layers have the same, else of all layers side by side; of the L rows the first `layers`, None:
    all. A subspace is found by iteration (Halko et al. 2011, arXiv:0909.4061, algorithm 5.1),
    seeded."""
    rest = 0 if layers is None else samples.shape[1] - layers
    samples = samples[:, : samples.shape[1] - rest]
    shared = torch.equal(samples, samples[:, :1].expand_as(samples)) or bool(
        (samples - samples[:, :1]).abs().max() < 1e-4 * samples.std()
    )
    flat = samples[:, 0] if shared else samples.flatten(1)
    if not 1 <= count <= min(flat.shape):
        raise ValueError(f"there are 1 to {min(flat.shape)} principal axes here, not {count}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("principal axes"))
        _, _, found = torch.pca_lowrank(flat.cpu(), min(count + 10, *flat.shape), niter=6)
    axes = signed(found[:, :count].T)
    if shared:
        axes = axes.repeat(1, samples.shape[1])
    return F.pad(axes.unflatten(1, samples.shape[1:]), (0, 0, 0, rest))


def sefa(face: Generator, layers: range, count: int) -> Tensor:
    """The `count` directions (N, L, D) of w at `layers` that their affine maps A answer to most:
    eigenvectors of AᵀA, the rows of A being those of all the maps, Shen & Zhou 2021, eq. 8."""
    maps = [affine for layer, affine in affines(face) if layer in layers]
    if not maps or not 1 <= count <= face.w_dim:
        raise ValueError(f"there are 1 to {face.w_dim} directions of layers that exist")
    a = torch.cat([affine.weight * affine.weight_gain for affine in maps]).detach().double()
    _, vectors = torch.linalg.eigh(a.T @ a)  # of ascending eigenvalues
    axes = torch.zeros(count, face.num_ws, face.w_dim).to(face.w_avg)
    for layer in range(face.layers):
        if layer in layers:
            axes[:, layer] = signed(vectors.flip(1)[:, :count].T)
    return axes


def labelled(samples: Tensor, labels: Tensor, names: Sequence[str]) -> Tensor:
    """(K, L, D): how w+ (M, L, D) changes with each label (M, K) while the others stay, by least
    squares: ws = mean + labels @ B. ValueError where that cannot be told.

    The regression is of w+ on the labels, not the other way round: a classifier's normal, as of
    Shen et al. 2020 (arXiv:1907.10786), also weighs against what comes with the label by chance,
    and leads away from the data (Haufe et al. 2014, doi:10.1016/j.neuroimage.2013.10.067, eq. 6).
    """
    if len(samples) <= labels.shape[1] + 1:
        raise ValueError(f"{len(samples)} labelled pictures are too few; give more")
    y = labels.double() - labels.double().mean(dim=0)
    deviations = y.std(dim=0)
    if constant := [n for n, s in zip(names, deviations.tolist(), strict=True) if not s > 1e-9]:
        raise ValueError(f"The label {printable(constant[0])} is the same for all pictures.")
    y = y / deviations
    if torch.linalg.eigvalsh(y.T @ y / len(y))[0] < 1e-6:
        raise ValueError(f"Some of the labels {', '.join(names)} follow from the others; omit one.")
    flat = samples.flatten(1)
    w = (flat - flat.mean(dim=0)).double().cpu()
    return torch.linalg.lstsq(y, w).solution.float().unflatten(1, samples.shape[1:])


def signed(axes: Tensor) -> Tensor:
    """Axes (N, D), each with the sign that makes its largest coordinate positive."""
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return (axes * largest.sign()).float()


def agreement(samples: Tensor, steps: Tensor, labels: Tensor) -> list[float]:
    """The correlation of each label (M, K) with where the samples lie along its step (K, L, D)."""
    places = along(samples, steps / steps.flatten(1).norm(dim=1)[:, None, None]).double().cpu()
    y = labels.double() - labels.double().mean(dim=0)
    return ((places * y).sum(0) / (places.norm(dim=0) * y.norm(dim=0))).tolist()


def load_directions(generator: str, given: str | None, edits: Sequence[Any]) -> Directions | None:
    """Those that edits of a face generator name: of the file `given`, or the bundled ones of a
    bundled generator; None where there are no edits."""
    if not edits:
        return None
    given = companion(generator, "directions") if given is None else given
    if given is None:
        raise ValueError(
            "Edits need --directions FILE; python -m encoder.edit directions finds them for a "
            "face generator."
        )
    return checkpoint.load(checkpoint.resolve(given), Directions)
