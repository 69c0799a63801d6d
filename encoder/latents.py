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


def slerp(a: Tensor, b: Tensor, t: Tensor | float) -> Tensor:
    """The vectors (…, Z) that are part `t` in [0, 1], (…, 1) or a number, of the way from a to b:
    directions along the arc of the great circle, lengths linearly; exact at 0 and 1.

    (sin((1 - t) Ω) a + sin(t Ω) b) / sin Ω for vectors of length 1 at the angle Ω: Shoemake 1985,
    "Animating Rotation with Quaternion Curves", section 3.3. Where sin Ω vanishes the way is
    straight, which of opposite vectors leads through 0: no great circle is theirs alone.
    """
    t = torch.as_tensor(t, dtype=a.dtype, device=a.device)
    least = torch.finfo(a.dtype).eps  # a vector of no length has no direction
    length_a, length_b = (x.norm(dim=-1, keepdim=True).clamp(min=least) for x in (a, b))
    u, v = a / length_a, b / length_b
    # accurate for the smallest angles, where the arc cosine of u · v is not
    angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
    sine = angle.sin()
    curved = sine > 1e-6
    sine = torch.where(curved, sine, 1.0)
    first = torch.where(curved, ((1 - t) * angle).sin() / sine, 1 - t)
    second = torch.where(curved, (t * angle).sin() / sine, t)
    length = torch.lerp(length_a, length_b, t)
    return first * (length / length_a) * a + second * (length / length_b) * b
