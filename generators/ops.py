"""Plain-torch ops of StyleGAN2: FIR resampling, equalised linear, modulated convolution.

No compiled extension and no per-sample weights: modulation scales the activations, demodulation
scales the outputs (Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", eq.
1-3, rearranged), so the weight of a convolution is the same for the whole batch. On CPU, without
gradients, both are folded into the weight image by image wherever the weight is smaller than the
activations it saves passes over.

Shape letters: B batch, I / O input / output channels, H W pixels, D latent.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LRELU_SLOPE = 0.2
LRELU_GAIN = math.sqrt(2)
_TAPS = (1 / 8, 3 / 8, 3 / 8, 1 / 8)


def fir_kernel(channels: int, gain: float, like: Tensor) -> Tensor:
    """The low-pass filter [1, 3, 3, 1]² as a depthwise kernel (C, 1, 4, 4) that sums to `gain`."""
    taps = torch.tensor(_TAPS, device=like.device, dtype=like.dtype)
    return (torch.outer(taps, taps) * gain).repeat(channels, 1, 1, 1)


def blur(
    x: Tensor, padding: int, gain: float = 1.0, stride: int = 1, bias: Tensor | None = None
) -> Tensor:
    """FIR low-pass of x (B, C, H, W) after zero padding, plus a bias (C,) in the same pass.

    Output side (H + 2 * padding - 4) // stride + 1.
    """
    kernel = fir_kernel(x.shape[1], gain, x)
    return F.conv2d(x, kernel, bias, padding=padding, stride=stride, groups=x.shape[1])


def upsample2x(x: Tensor) -> Tensor:
    """FIR upsampling with [1, 3, 3, 1], (B, C, H, W) -> (B, C, 2H, 2W): bilinear, zero-padded."""
    padded = F.pad(x, (1, 1, 1, 1))
    wide = F.interpolate(padded, scale_factor=2, mode="bilinear", align_corners=False)
    return wide[:, :, 2:-2, 2:-2]


def downsample2x(x: Tensor) -> Tensor:
    """FIR downsampling by 2 with [1, 3, 3, 1], (B, C, H, W) -> (B, C, H / 2, W / 2)."""
    return blur(x, padding=1, stride=2)


def leaky_relu(x: Tensor, gain: float = LRELU_GAIN, clamp: float | None = None) -> Tensor:
    """Leaky relu (slope 0.2) times `gain`, then clamped to ± clamp * (gain / sqrt 2) as NVIDIA's
    fp16 networks are."""
    x = F.leaky_relu(x, LRELU_SLOPE) * gain
    return x if clamp is None else x.clamp(-clamp * gain / LRELU_GAIN, clamp * gain / LRELU_GAIN)


class Linear(nn.Module):
    """Equalised linear layer (Karras et al. 2018, "Progressive Growing of GANs", section 4.1)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activate: bool = False,  # leaky relu with gain sqrt 2
        lr_multiplier: float = 1.0,  # of weight and bias
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init))
        self.activate = activate
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return leaky_relu(y) if self.activate else y


def demodulation(weight: Tensor, styles: Tensor) -> Tensor:
    """1 / L2 norm of each output's modulated filter (B, O), in fp32 also under autocast (eq. 3)."""
    with torch.autocast(weight.device.type, enabled=False):
        squares = (
            weight.float().square().flatten(1)
        )  # (O, I * 9): one product, no sum over the taps
        styles = styles.float().square().repeat_interleave(weight[0, 0].numel(), 1)  # (B, I * 9)
        return torch.rsqrt(F.linear(styles, squares) + 1e-8)


def modulated_conv(
    x: Tensor, weight: Tensor, styles: Tensor, bias: Tensor, *, up: bool = False, gain: float = 1.0
) -> Tensor:
    """Modulated, demodulated 3x3 convolution times `gain`, plus bias.

    x (B, I, H, W), weight (O, I, 3, 3), styles (B, I), bias (O,) -> (B, O, H', W'), where H' = 2H
    with `up` (a transposed convolution, then the FIR filter), else H. In reduced precision the
    styles are first divided by their largest value and the root of the filter's size, which
    demodulation undoes, so that fp16 does not overflow.
    """
    if styles.dtype != torch.float32:
        largest = styles.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-6)
        styles = styles.float() / (largest * math.sqrt(weight[0].numel()))
    scale = demodulation(weight, styles) * gain  # (B, O)
    bias = bias.to(x.dtype)
    if _folding_pays(x, weight):
        filters = (
            weight * torch.outer(a, b)[:, :, None, None] for a, b in zip(scale, styles, strict=True)
        )
        images = [
            _convolve(image, filter.to(x.dtype), bias, up)
            for image, filter in zip(x.split(1), filters, strict=True)
        ]
        return images[0] if len(images) == 1 else torch.cat(images)
    y = _convolve(x * styles[:, :, None, None].to(x.dtype), weight, None, up)
    return torch.addcmul(bias[:, None, None].to(y.dtype), y, scale[:, :, None, None].to(y.dtype))


def _folding_pays(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.is_grad_enabled() and x.device.type == "cpu" and weight.numel() < 2 * x[0].numel()
    )


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, up: bool) -> Tensor:
    if not up:
        return F.conv2d(x, weight, bias, padding=1)
    wide = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # (B, O, 2H + 1, 2W + 1)
    return blur(wide, padding=1, gain=4, bias=bias)
