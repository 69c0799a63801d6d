"""Held-out quality of reconstructions: per-picture metrics, and distances between sets of pictures.

    metrics = image_metrics(lpips_weights=Path("alex.safetensors"))
    evaluate(images, lambda x: generator.synthesis(encoder(x)), metrics)   # {"mse": ..., ...}
    real, made = (pooled_features(pyramid, x) for x in (real_images, made_images))
    frechet_distance(real, made), kernel_distance(real, made)

Shape letters: B batch, N M pictures, R resolution, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from encoder.losses import Lpips, LpipsNet, ms_ssim, mse

Metric = Callable[[Tensor, Tensor], Tensor]  # (prediction, target) in [-1, 1] -> (B,)


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,) in dB: peak signal-to-noise ratio with peak 2, the range of [-1, 1]; at most 106."""
    return 10 * torch.log10(4 / mse(prediction, target).clamp(min=1e-10))


def image_metrics(
    lpips_net: LpipsNet = "alex",  # the network LPIPS figures are usually reported with
    lpips_weights: Path | None = None,  # its backbone; None: a download, said aloud
    with_lpips: bool = True,
    device: torch.device | str = "cpu",  # of LPIPS's network
) -> dict[str, Metric]:
    """mse on [-1, 1] (0 to 4), psnr in dB (peak 2), ms_ssim (1 is best), lpips (0 is best)."""
    metrics: dict[str, Metric] = {"mse": mse, "psnr": psnr, "ms_ssim": ms_ssim}
    if with_lpips:
        metrics["lpips"] = Lpips(lpips_net, lpips_weights).to(device)
    return metrics


@torch.no_grad()
def evaluate(
    images: Tensor | Iterable[Tensor],  # (N, 3, R, R) in [-1, 1], or batches (B, 3, R, R)
    reconstruct: Callable[[Tensor], Tensor],  # (B, 3, R, R) -> (B, 3, R, R), both in [-1, 1]
    metrics: Mapping[str, Metric],
    batch_size: int = 16,  # where `images` is one tensor
    device: torch.device | str | None = None,  # batches are moved there; None: left where they are
) -> dict[str, float]:
    """The mean over all pictures of each metric; every picture counts once, also in short batches.

    Predictions are clamped to [-1, 1], as a written picture is.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in batches(images, batch_size):
        targets = batch if device is None else batch.to(device)
        predictions = reconstruct(targets).float().clamp(-1, 1)
        for name, metric in metrics.items():
            value = metric(predictions, targets.float()).double().sum()
            sums[name] = sums[name] + value if name in sums else value
        count += targets.shape[0]
    if count == 0:
        raise ValueError("there is no picture to evaluate; give at least one")
    return {name: float(value) / count for name, value in sums.items()}


@torch.no_grad()
def pooled_features(
    pyramid: nn.Module,  # FeaturePyramid, or any (B, 3, R, R) -> [(B, C, H, W)]
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
    a: Tensor,  # (N, F)
    b: Tensor,  # (M, F)
    subsets: int = 100,
    subset_size: int = 1000,  # at most the smaller of N and M
    seed: int = 0,
) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased squared MMD, kernel (x y / F + 1)^3.

    Binkowski et al. 2018 (arXiv:1801.01401), sec. 4. Unbiased: around 0 for equal distributions,
    also negative.
    """
    a, b = _features(a), _features(b)
    size = min(subset_size, len(a), len(b))
    random = torch.Generator().manual_seed(seed)
    values = torch.stack(
        [
            squared_mmd(
                a[torch.randperm(len(a), generator=random)[:size]],
                b[torch.randperm(len(b), generator=random)[:size]],
            )
            for _ in range(subsets)
        ]
    )
    return float(values.mean()), float(values.std(correction=0))


def squared_mmd(a: Tensor, b: Tensor) -> Tensor:
    """(N, F), (N, F) -> (): the unbiased estimate of Gretton et al. 2012, eq. 3."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3  # (N, N)

    n = len(a)
    within = kernel(a, a).fill_diagonal_(0).sum() + kernel(b, b).fill_diagonal_(0).sum()
    return within / (n * (n - 1)) - 2 * kernel(a, b).mean()


def batches(images: Tensor | Iterable[Tensor], batch_size: int) -> Iterable[Tensor]:
    """One tensor (N, 3, R, R) in pieces, the last one maybe short; batches as they are."""
    return images.split(batch_size) if isinstance(images, Tensor) and len(images) else images


def _features(x: Tensor) -> Tensor:
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(
            f"distances need features (N, F) of at least two pictures, not {tuple(x.shape)}"
        )
    return x.double().cpu()
