"""Adversarial losses and the penalties of their networks.

Shape letters: B batch, N logits of one picture, H W pixels, L layers of w+, D w dimension.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

R1_INTERVAL = 16  # steps between R1 penalties (Karras et al. 2020, appendix B)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss -log D(fake), (B, N) -> (B,) (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake_logits).mean(dim=1)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, smoothing: float = 0.0) -> Tensor:
    """Logistic loss -log D(real) - log(1 - D(fake)), (B, N), (B, N) -> (B,).

    smoothing: the target of real pictures is 1 - smoothing, that of fakes stays 0 (one-sided label
    smoothing: Salimans et al. 2016, arXiv:1606.03498, section 3.4), 0.1 for example.
    """
    real = F.softplus(-real_logits) + smoothing * real_logits
    return (real + F.softplus(fake_logits)).mean(dim=1)


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """-D(fake), (B, N) -> (B,) (Lim & Ye 2017, arXiv:1705.02894; Miyato et al. 2018,
    arXiv:1802.05957, eq. 17)."""
    return -fake_logits.mean(dim=1)


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """max(0, 1 - D(real)) + max(0, 1 + D(fake)), (B, N), (B, N) -> (B,) (Miyato et al. 2018,
    eq. 16)."""
    return (F.relu(1 - real_logits) + F.relu(1 + fake_logits)).mean(dim=1)


def least_squares_generator_loss(fake_logits: Tensor) -> Tensor:
    """(D(fake) - 1)², (B, N) -> (B,) (Mao et al. 2017, arXiv:1611.04076, eq. 9, without its 1/2, as
    in CycleGAN)."""
    return (fake_logits - 1).square().mean(dim=1)


def least_squares_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(D(real) - 1)² + D(fake)², (B, N), (B, N) -> (B,) (Mao et al. 2017, eq. 9, without 1/2)."""
    return ((real_logits - 1).square() + fake_logits.square()).mean(dim=1)


def r1_penalty(real_logits: Tensor, real_images: Tensor) -> Tensor:
    """Half the squared gradient norm of D at real images, (B,) (Mescheder et al. 2018, eq. 9,
    without gamma). Of several logits (B, N) it is their mean's, as the losses are means.

    Lazy R1 (Karras et al. 2020, appendix B): apply it every k-th step, times k.
    """
    (gradient,) = torch.autograd.grad(real_logits.mean(dim=1).sum(), real_images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)) / 2


def path_length(images: Tensor, ws: Tensor, noise: Tensor) -> Tensor:
    """How far a picture moves with its latent: |J^T y| for y = noise / sqrt(H W), (B,), of which
    gradients can be taken again (Karras et al. 2020, arXiv:1912.04958, section 3.2).

    images (B, 3, H, W), made from ws (B, L, D); noise (B, 3, H, W), standard normal. Over layers
    it is the root mean square of the norms over D, as in NVIDIA's code.
    """
    y = noise / math.sqrt(noise.shape[-2] * noise.shape[-1])
    (gradient,) = torch.autograd.grad((images * y).sum(), ws, create_graph=True)  # (B, L, D)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()


def path_length_penalty(lengths: Tensor, mean_length: Tensor) -> Tensor:
    """(length - a)², (B,) -> (B,) (Karras et al. 2020, eq. 4).

    mean_length: a, (), a running mean of the lengths without a gradient, kept by the caller (in
    NVIDIA's code it goes 0.01 of the way at each penalty, which has a weight of 2).
    """
    return (lengths - mean_length).square()
