"""Latent spaces as pure functions: z (B, Z), w (B, D), w+ (B, L, D), offsets from w_avg (B, L, D).

    ws = truncate(from_offsets(offsets, generator.w_avg), generator.w_avg, psi=0.7)

Shape letters: B batch, L layers of w+, D dimension of w, Z dimension of z.
"""

from __future__ import annotations

import torch
from torch import Tensor


def broadcast(w: Tensor, num_ws: int) -> Tensor:
    """w (B, D) -> w+ (B, L, D): the same w at each of the L = num_ws layers."""
    return w.unsqueeze(1).expand(-1, num_ws, -1)


def from_offsets(offsets: Tensor, w_avg: Tensor) -> Tensor:
    """Offsets (B, L, D) from w_avg (D,) or (L, D) -> ws (B, L, D)."""
    return w_avg + offsets


def to_offsets(ws: Tensor, w_avg: Tensor) -> Tensor:
    """ws (B, L, D) -> offsets (B, L, D) from w_avg (D,) or (L, D)."""
    return ws - w_avg


def truncate(ws: Tensor, w_avg: Tensor, psi: float, cutoff: int | None = None) -> Tensor:
    """Pull ws (B, L, D) towards w_avg: psi 1 changes nothing, 0 gives w_avg.

    Only layers below `cutoff` move; None: all. Karras et al. 2019 (arXiv:1812.04948), app. B.
    """
    truncated = w_avg + psi * (ws - w_avg)
    return truncated if cutoff is None else mix(truncated, ws, cutoff)


def mix(coarse: Tensor, fine: Tensor, from_layer: int) -> Tensor:
    """Layers below `from_layer` of one ws (B, L, D), the others of another: style mixing.

    Karras et al. 2019 (arXiv:1812.04948), sec. 3.1.
    """
    return torch.cat([coarse[:, :from_layer], fine[:, from_layer:]], dim=1)
