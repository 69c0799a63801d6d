"""Adversarial losses, and the augmentation that keeps a discriminator honest on little data.

Shape letters: B batch, H W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss -log D(fake), (B, 1) -> (B,) (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake_logits).flatten()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Logistic loss -log D(real) - log(1 - D(fake)), (B, 1), (B, 1) -> (B,)."""
    return (F.softplus(-real_logits) + F.softplus(fake_logits)).flatten()


def r1_penalty(real_logits: Tensor, real_images: Tensor) -> Tensor:
    """Half the squared gradient norm of D at real images, (B,) (Mescheder et al. 2018, eq. 9,
    without gamma).

    Lazy R1 (Karras et al. 2020, appendix B): apply it every k-th step, times k.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), real_images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)) / 2


def diff_augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """DiffAugment (Zhao et al. 2020, policy colour, translation 1/8, cutout 1/2), with its own draw
    per picture."""
    batch, _, height, width = images.shape

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, device=rng.device).to(images.device)

    brightness, saturation, contrast = (draw(batch, 1, 1, 1) for _ in range(3))
    x = images + (brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (saturation * 2)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (contrast + 0.5)

    shift = (draw(2, batch) * 2 - 1) / 8  # fraction of the side
    rows = torch.arange(height, device=x.device) + (shift[0, :, None] * height).round()  # (B, H)
    columns = torch.arange(width, device=x.device) + (shift[1, :, None] * width).round()  # (B, W)
    rows, columns = rows[:, :, None], columns[:, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    index = rows.clamp(0, height - 1).long(), columns.clamp(0, width - 1).long()
    picture = torch.arange(batch, device=x.device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[picture, index[0], index[1]]  # (B, H, W, 3)
    x = moved.permute(0, 3, 1, 2) * inside[:, None]

    centre = draw(2, batch)
    away_y = torch.arange(height, device=x.device) - centre[0, :, None] * height
    away_x = torch.arange(width, device=x.device) - centre[1, :, None] * width
    far_rows, far_columns = away_y.abs() > height / 4, away_x.abs() > width / 4
    kept = far_rows[:, :, None] | far_columns[:, None, :]
    return x * kept[:, None]
