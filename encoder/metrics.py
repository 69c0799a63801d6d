"""How much two pictures differ: (B,) by pixel, by LPIPS, by identity; means over held-out pictures.

    error = mse(images, targets, mask)              # (B,), mask of valid pixels
    metrics = image_metrics(lpips_weights=Path("alex.safetensors"))
    evaluate(images, lambda x: generator.synthesis(encoder(x)), metrics)   # {"mse": ..., ...}

Weighted sums to minimise: `encoder.losses`; distances between sets of pictures:
`generators.distances`. Letters: B batch, N pictures, C channels, R resolution.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from generators.command import console
from generators.distances import batches
from generators.features import unit_channels
from generators.runs import frozen
from generators.tensors import load_state, read_weights

Metric = Callable[[Tensor, Tensor], Tensor]  # (prediction, target) in [-1, 1] -> (B,)
LpipsNet = Literal["alex", "vgg", "squeeze"]
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, sec. 3.2
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
LPIPS_MIN_SIDE = 32  # pixels; AlexNet's poolings leave nothing of less
ID_SIDE = 160  # pixels; the size FaceNet was trained at

# ------------------------------------------------------------------------------ by pixel


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, C, R, R) -> (B,): the mean where mask (B, 1, R, R) is 1; 0 where no pixel is."""
    if mask is None:
        return values.mean(dim=(1, 2, 3))
    count = mask.sum(dim=(1, 2, 3)) * values.shape[1]
    return (values * mask).sum(dim=(1, 2, 3)) / count.clamp(min=1e-6)


def mse(image: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,) in [0, 4]: mean squared difference of pictures in [-1, 1]."""
    return masked_mean((image - target).square(), mask)


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,) in dB: peak signal-to-noise ratio with peak 2, the range of [-1, 1]; at most 106."""
    return 10 * torch.log10(4 / mse(prediction, target).clamp(min=1e-10))


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


# --------------------------------------------------------------------------- by networks


class Lpips(nn.Module):
    """LPIPS 0.1 (Zhang et al. 2018, arXiv:1801.03924) with the lpips package's networks."""

    def __init__(self, net: LpipsNet = "alex", weights: Path | None = None) -> None:
        """weights: the state dict of `lpips.LPIPS(net).net`, or torchvision's of that network."""
        super().__init__()
        import lpips  # takes a quarter of a second, and few runs look through it

        if weights is None:
            console.print(f"fetching {net} for LPIPS with torchvision (kept in a cache)")
        try:
            with warnings.catch_warnings():  # it calls torchvision in a deprecated way
                warnings.simplefilter("ignore")
                model = lpips.LPIPS(net=net, pnet_rand=weights is not None, verbose=False)
        except OSError as error:
            raise ValueError(
                f"LPIPS's backbone {net} could not be fetched ({error}); "
                "give the path of its weights (a safetensors file)"
            ) from error
        if weights is not None:
            state = read_weights(weights)
            if "features.0.weight" in state:  # torchvision's names; its classifier is dropped
                found = {f"features.{key.split('.', 1)[1]}": key for key in model.net.state_dict()}
                state = {found[key]: value for key, value in state.items() if key in found}
            complaint = f"the weights {weights} are not those of LPIPS's backbone {net}"
            load_state(model.net, state, complaint)
        self.model = frozen(model)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two (B, 3, R, R) in [-1, 1] -> (B,); pictures under 32 pixels are enlarged to 32."""
        return self.distance(self.features(a), self.features(b))

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, R, R) in [-1, 1] -> the backbone's maps, of length 1 over channels."""
        if min(images.shape[-2:]) < LPIPS_MIN_SIDE:
            images = _resize(images, LPIPS_MIN_SIDE)
        return [unit_channels(x) for x in self.model.net(self.model.scaling_layer(images))]

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Two pictures' `features` -> (B,).

        Not the package's own forward: its square root has no gradient at features that are zero.
        """
        levels = [
            linear((x - y).square()).mean(dim=(1, 2, 3))
            for linear, x, y in zip(self.model.lins, a, b, strict=True)
        ]
        return torch.stack(levels).sum(dim=0)


class FaceEmbedder(nn.Module):
    """FaceNet's identity embedding: InceptionResnetV1 of facenet-pytorch, trained on VGGFace2."""

    def __init__(self, weights: Path | None = None) -> None:
        """weights: state dict of InceptionResnetV1, e.g. facenet-pytorch's own vggface2 file."""
        super().__init__()
        from facenet_pytorch import InceptionResnetV1  # as above

        if weights is None:
            console.print("fetching FaceNet's weights with facenet-pytorch (kept in a cache)")
            try:
                net = InceptionResnetV1(pretrained="vggface2")
            except OSError as error:
                raise ValueError(
                    f"FaceNet's weights could not be fetched ({error}); give the path of "
                    "facenet-pytorch's 20180402-114759-vggface2.pt or of a safetensors file"
                ) from error
        else:
            net = InceptionResnetV1(pretrained=None, classify=False)
            state = read_weights(weights)
            for key in ("logits.weight", "logits.bias"):  # the 8631 training identities: dropped
                state.pop(key, None)
            load_state(net, state, f"the weights {weights} are not FaceNet's InceptionResnetV1")
        self.net = frozen(net)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) in [-1, 1], aligned faces -> (B, 512) of length 1."""
        images = _resize(images, ID_SIDE)
        return self.net(images * (127.5 / 128))  # facenet-pytorch's fixed standardisation


def _resize(images: Tensor, side: int) -> Tensor:
    """(B, 3, R, R) -> (B, 3, side, side), antialiased."""
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


# --------------------------------------------------------------------- held-out pictures


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
