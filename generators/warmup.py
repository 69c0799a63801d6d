"""The throw-away variational encoder of the reconstruction warm-up.

On small compute an adversarial game from scratch goes nowhere for hours. So the generator, mapping
network included, first learns as the decoder of a small variational autoencoder (Kingma & Welling
2014; with an adversary on top, Larsen et al. 2016): hair, skin tone and pose are there after some
thousand pictures, and samples of the prior are faces.

Shape letters: B batch, Z z dimension, R resolution.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (48, 96, 160, 224)


class VariationalEncoder(nn.Module):
    """Images (B, 3, R, R) -> mean and log-variance of z, each (B, Z), from a 4 x 4 map."""

    def __init__(self, resolution: int, z_dim: int) -> None:
        super().__init__()
        halvings = resolution.bit_length() - 3
        widths = [3] + [WIDTHS[min(i, len(WIDTHS) - 1)] for i in range(halvings)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.fc = nn.Linear(widths[-1] * 16, 512)
        self.out = nn.Linear(512, 2 * z_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        mean, log_variance = self.out(F.leaky_relu(self.fc(x.flatten(1)), 0.2)).chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 4)


def kl_to_prior(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) in nats, (B, Z) -> (B,) (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)
