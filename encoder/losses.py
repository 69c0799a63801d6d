"""Losses as rows {name: weight}: one weighted sum for the trainer and the latent optimiser alike.

    losses = LossSet({"mse": 1.0, "lpips": 0.8}, lpips_weights=Path("alex.safetensors"))
    total, parts = losses(images, targets)            # (B,), {"mse": (B,), "lpips": (B,)}

A mask marks pixels as valid (1) or corrupted (0). Corrupted pixels are replaced by mid grey in the
target, and this target is composited into the prediction there: no term sees a difference, so a
corrupted pixel of either picture has no influence. Means over pixels are over valid ones.
All terms are computed in fp32 (or in the inputs' fp64), also under autocast.

Shape letters: B batch, L layers of w+, D dimension of w, R resolution, C channels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lpips
import torch
import torch.nn.functional as F
from facenet_pytorch import InceptionResnetV1
from torch import Tensor, nn

from encoder.pixels import edges, l1, ms_ssim, mse
from generators.features import (
    WHEEL_MODEL,
    FeaturePyramid,
    console,
    load_strictly,
    perceptual_distance,
    read_state,
    unit_channels,
)
from generators.runs import frozen

LpipsNet = Literal["alex", "vgg", "squeeze"]
LPIPS_MIN_SIDE = 32  # pixels; AlexNet's poolings leave nothing of less
DISCRIMINATOR_TERMS = ("feature", "feature_mse", "adversarial")
CRITICS = ("discriminator", "projected", "dcgan_discriminator")  # kinds of checkpoints they take
ID_SIDE = 160  # pixels; the size FaceNet was trained at


@dataclass(frozen=True)
class LossWeights:
    """The weighted sum that is minimised; a term of weight 0 is never built."""

    mse: float = 1.0
    l1: float = 0.0
    lpips: float = 0.0
    perceptual: float = 0.0
    id: float = 0.0
    ms_ssim: float = 0.0
    edge: float = 0.0
    edge_lpips: float = 0.0
    feature: float = 0.0  # l1 distance in the discriminator's features
    feature_mse: float = 0.0  # squared
    adversarial: float = 0.0  # against the generator's discriminator, which goes on learning
    latent: float = 0.1  # to the known w+ of synthetic pictures; training only
    w_norm: float = 0.0  # pull of w+ towards w_avg

    @property
    def of_discriminator(self) -> list[str]:
        """The terms with a weight that look through the discriminator."""
        return [name for name in DISCRIMINATOR_TERMS if getattr(self, name)]


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


Term = Callable[[Inputs], Tensor]  # -> (B,)
Judge = Callable[..., tuple[Tensor, dict[str, Tensor]]]  # see LossSet.against


class LossSet(nn.Module):
    """{name: weight} -> (total (B,), {name: (B,)}); a term of weight 0 is never constructed.

    A module only so that `.to(device)` moves the frozen nets; it has nothing to train or save.
    """

    def __init__(
        self,
        weights: Mapping[str, float],  # names from TERMS
        *,
        lpips_net: LpipsNet = "alex",
        lpips_weights: Path | None = None,  # its backbone; None: torchvision's download, said aloud
        feature_net: str = WHEEL_MODEL,  # timm network of "perceptual"
        feature_weights: Path | str | None = None,  # see FeaturePyramid
        id_weights: Path | None = None,  # FaceNet; None: facenet-pytorch's download, said aloud
        discriminator: nn.Module | None = None,  # of DISCRIMINATOR_TERMS, on its device;
        # not moved nor frozen here: a discriminator that trains must drop these gradients itself
    ) -> None:
        super().__init__()
        for name, weight in weights.items():
            if name not in TERMS:
                raise ValueError(f"unknown loss {name!r}; choose from {', '.join(TERMS)}")
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of loss {name!r} is {weight}; give a number >= 0")
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        resources = Resources(
            lpips_net, lpips_weights, feature_net, feature_weights, id_weights, discriminator
        )
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

    def against(self, target: Tensor, mask: Tensor | None = None) -> Judge:
        """The same function of (image, ws, ws_target, w_avg, known) for one target and mask.

        What the networks see in the target is computed at the first call and kept: a search that
        calls it often pays for the target once.
        """
        target = _full(target)
        if mask is not None:
            mask = (mask > 0.5).to(target.dtype)
            target = torch.where(mask > 0, target, 0.0)
        kept: dict[str, Any] = {}

        def judge(
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

        return judge

    def train(self, mode: bool = True) -> LossSet:
        """The nets stay in evaluation mode."""
        return super().train(False)


# Networks ----------------------------------------------------------------------------------------


class Lpips(nn.Module):
    """LPIPS 0.1 (Zhang et al. 2018, arXiv:1801.03924) with the lpips package's networks."""

    def __init__(self, net: LpipsNet = "alex", weights: Path | None = None) -> None:
        """weights: the state dict of `lpips.LPIPS(net).net`, or torchvision's of that network."""
        super().__init__()
        if weights is None:
            console.print(f"fetching [bold]{net}[/] for LPIPS with torchvision (kept in a cache)")
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
            state = read_state(Path(weights))
            if "features.0.weight" in state:  # torchvision's names; its classifier is dropped
                found = {f"features.{key.split('.', 1)[1]}": key for key in model.net.state_dict()}
                state = {found[key]: value for key, value in state.items() if key in found}
            complaint = f"the weights {weights} are not those of LPIPS's backbone {net}"
            load_strictly(model.net, state, complaint)
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
            state = read_state(Path(weights))
            for key in ("logits.weight", "logits.bias"):  # the 8631 training identities: dropped
                state.pop(key, None)
            load_strictly(net, state, f"the weights {weights} are not FaceNet's InceptionResnetV1")
        self.net = frozen(net)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) in [-1, 1], aligned faces -> (B, 512) of length 1."""
        images = _resize(images, ID_SIDE)
        return self.net(images * (127.5 / 128))  # facenet-pytorch's fixed standardisation


@dataclass
class Resources:
    """What builders draw on; each network is built once, when the first term asks for it."""

    lpips_net: LpipsNet
    lpips_weights: Path | None
    feature_net: str
    feature_weights: Path | str | None
    id_weights: Path | None
    discriminator: nn.Module | None
    built: dict[str, nn.Module] = field(default_factory=dict)

    def lpips(self) -> nn.Module:
        return self._once("lpips", lambda: Lpips(self.lpips_net, self.lpips_weights))

    def pyramid(self) -> nn.Module:
        return self._once("pyramid", lambda: FeaturePyramid(self.feature_net, self.feature_weights))

    def embedder(self) -> nn.Module:
        return self._once("embedder", lambda: FaceEmbedder(self.id_weights))

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


def _perceptual(resources: Resources) -> Term:
    net = resources.pyramid()
    return lambda x: perceptual_distance(net(x.image), x.made("perceptual", net))


def _id(resources: Resources) -> Term:
    net = resources.embedder()
    return lambda x: 1 - (net(x.image) * x.made("id", net)).sum(dim=1)


def _feature(distance: Callable[[Tensor, Tensor], Tensor], name: str) -> Callable:
    """Distance of the discriminator's features, averaged over its blocks."""

    def build(resources: Resources) -> Term:
        net = _needed(resources.discriminator, name, "discriminator")
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
    net = _needed(resources.discriminator, "adversarial", "discriminator")
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
    "feature": _feature(l1, "feature"),
    "feature_mse": _feature(mse, "feature_mse"),
    "adversarial": _adversarial,
    "latent": lambda _: latent,
    "w_norm": lambda _: w_norm,
}


def _needed(value, term: str, name: str):
    if value is None:
        raise ValueError(f"the loss {term!r} needs {name}; pass it, or give the loss weight 0")
    return value


def _full(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _resize(images: Tensor, side: int) -> Tensor:
    """(B, 3, R, R) -> (B, 3, side, side), antialiased."""
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)
