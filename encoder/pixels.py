"""How much two pictures differ, by pixel: (B,) terms with an optional mask of valid pixels.

    error = mse(images, targets, mask)              # (B,)

Networks' terms and the weighted sum: `encoder.losses`. Letters: B batch, C channels, R resolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, sec. 3.2
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, C, R, R) -> (B,): the mean where mask (B, 1, R, R) is 1; 0 where no pixel is."""
    if mask is None:
        return values.mean(dim=(1, 2, 3))
    count = mask.sum(dim=(1, 2, 3)) * values.shape[1]
    return (values * mask).sum(dim=(1, 2, 3)) / count.clamp(min=1e-6)


def mse(image: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,) in [0, 4]: mean squared difference of pictures in [-1, 1]."""
    return masked_mean((image - target).square(), mask)


def l1(image: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,) in [0, 2]: mean absolute difference of pictures in [-1, 1]."""
    return masked_mean((image - target).abs(), mask)


def ms_ssim(image: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,) in [0, 1], 1 for equal pictures: multi-scale structural similarity, per channel.

    Wang, Simoncelli, Bovik 2003, eq. 7, for pictures in [-1, 1] (dynamic range 2). As many of the
    five scales as leave the 11-pixel window inside, their exponents scaled to sum to 1: five from
    176 pixels on, three at 64. Negative similarities count as (almost) none.
    """
    side = min(image.shape[-2:])
    scales = 1
    while scales < len(MS_SSIM_WEIGHTS) and side >> scales >= SSIM_WINDOW:
        scales += 1
    weights = MS_SSIM_WEIGHTS[:scales]
    result = image.new_ones(image.shape[:2])  # (B, C)
    for scale, weight in enumerate(weights):
        if scale > 0:
            image, target = F.avg_pool2d(image, 2), F.avg_pool2d(target, 2)
            mask = None if mask is None else F.avg_pool2d(mask, 2)
        luminance, structure = _ssim_maps(image, target)
        similarity = structure * luminance if scale == scales - 1 else structure
        result = result * _window_mean(similarity, mask).clamp(min=1e-4) ** (weight / sum(weights))
    return result.mean(dim=1)


def _ssim_maps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure (B, C, H', W') at each window wholly inside (eq. 1-3)."""
    size = min(SSIM_WINDOW, *a.shape[-2:])
    window = torch.arange(size, device=a.device, dtype=a.dtype) - (size - 1) / 2
    window = torch.exp(-window.square() / (2 * SSIM_SIGMA**2))
    window = window / window.sum()
    moments = torch.stack([a, b, a * a, b * b, a * b])
    flat = rearrange(moments, "m b c h w -> (m b c) 1 h w")
    flat = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    mean_a, mean_b, square_a, square_b, product = rearrange(
        flat, "(m b c) 1 h w -> m b c h w", m=5, b=a.shape[0]
    )
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    variances = (square_a - mean_a.square()) + (square_b - mean_b.square())
    return luminance, (2 * (product - mean_a * mean_b) + c2) / (variances + c2)


def _window_mean(similarity: Tensor, mask: Tensor | None) -> Tensor:
    """(B, C, H', W') -> (B, C): mean over windows with a valid centre; 1 where there is none."""
    if mask is None:
        return similarity.mean(dim=(2, 3))
    (height, width), (rows, columns) = mask.shape[-2:], similarity.shape[-2:]
    top, left = (height - rows) // 2, (width - columns) // 2
    centres = mask[:, :, top : top + rows, left : left + columns]
    return 1 - ((1 - similarity) * centres).sum(dim=(2, 3)) / centres.sum(dim=(2, 3)).clamp(1e-6)


def edges(image: Tensor) -> Tensor:
    """(B, 3, R, R) in [-1, 1] -> (B, 1, R, R) in [0, 1.5): strength of Prewitt's edges of luma."""
    luma = (image * image.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    across = luma.new_tensor([-1.0, 0.0, 1.0]).expand(3, 3) / 6
    kernels = torch.stack([across, across.T]).unsqueeze(1)  # (2, 1, 3, 3)
    gradient = F.conv2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), kernels)
    return (gradient.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()
