"""Held-out quality of reconstructions: the mean of per-picture metrics.

    metrics = image_metrics(lpips_weights=Path("alex.safetensors"))
    evaluate(images, lambda x: generator.synthesis(encoder(x)), metrics)   # {"mse": ..., ...}

Distances between sets of pictures: `generators.distances`. Letters: B batch, N pictures,
R resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from encoder.losses import Lpips, LpipsNet
from encoder.pixels import ms_ssim, mse
from generators.distances import batches

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
