"""Other people's StyleGAN2 checkpoints to this project's .safetensors. Executes nothing in it.

    python -m generators.convert ffhq.pkl face.safetensors --discriminator face_d.safetensors
    python -m generators.convert 550000.pt anime.safetensors --which g --licence "CC BY 4.0"

Read are pickles of NVIDIA's stylegan2-ada-pytorch and of the StyleGAN2 configurations of stylegan3,
and `.pt` files of rosinality/stylegan2-pytorch. Sizes come from the tensors' shapes. A key is
renamed by a table, dropped by a table, or refused. Not read: conditional models, StyleGAN3's own
architecture, TensorFlow-era pickles.

Shape letters: B batch, C channels, D w dimension, Z z dimension, R resolution.
"""

import argparse
import hashlib
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from generators.checkpoint import load_state, save
from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.pickles import (
    Refused,
    Unpickler,
    mapping,
    persistent,
    restricted_torch_load,
    tensor,
    walk,
)
from generators.stylegan2 import Generator, GeneratorConfig

Which = Literal["g_ema", "g", "d"]
Tensors = dict[str, Tensor]

# --- NVIDIA: the names are ours already -----------------------------------------------------------

NVIDIA_KEYS: dict[Which, str] = {"g_ema": "G_ema", "g": "G", "d": "D"}
NVIDIA_KEPT = re.compile(
    r"mapping\.(w_avg|fc\d+\.(weight|bias))"
    r"|synthesis\.b4\.const"
    r"|synthesis\.b\d+\.conv[01]\.(weight|bias|noise_const|noise_strength|affine\.(weight|bias))"
    r"|synthesis\.b\d+\.torgb\.(weight|bias|affine\.(weight|bias))"
    r"|b\d+\.(fromrgb|conv0|conv1|skip|conv|fc|out)\.(weight|bias)"
)
NVIDIA_DROPPED = re.compile(r"(.*\.)?resample_filter")  # the FIR filter: a constant of our ops
SETTINGS = ("conv_clamp", "mbstd_group_size")  # what no tensor's shape tells


def read_nvidia(path: Path, which: Which) -> tuple[Tensors, dict[str, Any]]:
    """Tensors under our names, and the SETTINGS."""
    with path.open("rb") as file:
        networks = mapping(Unpickler(file).load())
    key = NVIDIA_KEYS[which]
    if networks.get(key) is None:
        raise Refused(f"holds no {key}, only {_list(networks)}; choose another with --which")
    root = persistent(networks[key])
    init = _init_kwargs(root)
    if root.get("c_dim") or init.get("c_dim"):
        raise Refused("holds a conditional model (c_dim > 0); give an unconditional one")
    tensors: Tensors = {}
    settings = {name: init[name] for name in SETTINGS if name in init}
    for prefix, state in walk(networks[key]):
        for kind in ("_parameters", "_buffers"):
            nodes = mapping(state[kind])
            tensors |= {
                prefix + name: tensor(node) for name, node in nodes.items() if node is not None
            }
        settings |= _layer_settings(prefix, state)
    if any(not isinstance(value, int | float | None) for value in settings.values()):
        raise Refused("has settings that are not numbers; get the file again")
    return rename_nvidia(tensors), settings


def _init_kwargs(root: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments, with those of the parts (synthesis_kwargs, epilogue_kwargs)."""
    init = mapping(root.get("_init_kwargs", {}))
    for part in ("synthesis_kwargs", "epilogue_kwargs"):
        init = init | mapping(init.get(part, {}))
    return init


def _layer_settings(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer says of itself: it overrides the arguments, whose defaults differ by version."""
    if state.get("activation", "lrelu") not in ("lrelu", "linear"):
        raise Refused(f"has the activation {state['activation']!r}; only lrelu can be converted")
    if prefix.startswith("mapping.fc") and not math.isclose(state.get("bias_gain", 0.01), 0.01):
        raise Refused("has another mapping lr_multiplier than 0.01; it cannot be converted")
    if prefix in ("synthesis.b4.conv1.", "b4.conv.") and "conv_clamp" in state:
        return {"conv_clamp": state["conv_clamp"]}
    if prefix == "b4.mbstd." and "group_size" in state:
        return {"mbstd_group_size": state["group_size"]}
    return {}


def rename_nvidia(tensors: Mapping[str, Tensor]) -> Tensors:
    """NVIDIA's state dict without its FIR filters; Refused on a key that is in neither table."""
    if any("magnitude_ema" in name or name.startswith("synthesis.input.") for name in tensors):
        raise Refused("holds a StyleGAN3 network; only StyleGAN2 ones can be converted")
    kept: Tensors = {}
    for name, value in tensors.items():
        if NVIDIA_DROPPED.fullmatch(name):
            _check_filter(name, value)
        elif NVIDIA_KEPT.fullmatch(name):
            kept[name] = value
        else:
            raise Refused(_unknown(name))
    return kept


def _check_filter(name: str, value: Tensor) -> None:
    """A filter may be dropped if it is the one built into our ops: [1, 3, 3, 1], up to its gain."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    expected = line if value.ndim == 1 else line[:, None] * line  # (4,) or (4, 4)
    value = value.float() / value.float().sum()
    if value.shape != expected.shape or not torch.allclose(value, expected, atol=1e-4):
        raise Refused(f"has another filter than [1, 3, 3, 1] in {name}; it cannot be converted")


def _unknown(name: str) -> str:
    return (
        f"has the unknown tensor {name}; "
        "only the skip generator and the residual discriminator of StyleGAN2 can be converted"
    )


def _list(names: Any) -> str:
    return ", ".join(map(str, names))


# --- rosinality: a row per pattern: their name, our name for its number i, change of shape --------

Row = tuple[str, Callable[[int], str], Callable[[Tensor], Tensor]]


def _same(value: Tensor) -> Tensor:
    return value


def _first(value: Tensor) -> Tensor:
    return value.squeeze(0)  # (1, …) -> (…): the 1 broadcasts over the batch


def _conv(i: int) -> str:
    """Convolution i, two per resolution from 8 up; -1 is the only one at 4x4."""
    return f"synthesis.b{8 * 2 ** (i // 2)}.conv{i % 2}" if i >= 0 else "synthesis.b4.conv1"


def _rgb(i: int) -> str:
    return f"synthesis.b{8 * 2**i}.torgb"


def _layer(pattern: str, name: Callable[[int], str]) -> list[Row]:
    """A modulated convolution with its style, noise and bias."""
    return [
        (rf"{pattern}\.conv\.weight", lambda i: f"{name(i)}.weight", _first),
        (rf"{pattern}\.conv\.modulation\.weight", lambda i: f"{name(i)}.affine.weight", _same),
        (rf"{pattern}\.conv\.modulation\.bias", lambda i: f"{name(i)}.affine.bias", _same),
        (rf"{pattern}\.noise\.weight", lambda i: f"{name(i)}.noise_strength", _first),
        (rf"{pattern}\.activate\.bias", lambda i: f"{name(i)}.bias", _same),
        (rf"{pattern}\.bias", lambda i: f"{name(i)}.bias", torch.flatten),  # toRGB's: (1, 3, 1, 1)
    ]


ROSINALITY_G: list[Row] = [
    (r"style\.(\d+)\.weight", lambda i: f"mapping.fc{i - 1}.weight", _same),  # style.0: no weights
    (r"style\.(\d+)\.bias", lambda i: f"mapping.fc{i - 1}.bias", _same),
    (r"input\.input", lambda i: "synthesis.b4.const", _first),
    *_layer(r"conv1", lambda i: "synthesis.b4.conv1"),
    *_layer(r"convs\.(\d+)", _conv),
    *_layer(r"to_rgb1", lambda i: "synthesis.b4.torgb"),
    *_layer(r"to_rgbs\.(\d+)", _rgb),
    (r"noises\.noise_(\d+)", lambda i: f"{_conv(i - 1)}.noise_const", lambda noise: noise[0, 0]),
]
ROSINALITY_DROPPED = re.compile(  # FIR filters: constants of our ops
    r"convs\.\d+\.conv\.blur\.kernel|to_rgbs\.\d+\.upsample\.kernel"
    r"|convs\.\d+\.(conv2|skip)\.0\.kernel"
)


def rosinality_d(resolution: int) -> list[Row]:
    """The discriminator's rows: block i works at R / 2^(i - 1)."""

    def block(i: int) -> str:
        return f"b{resolution >> (i - 1)}"

    return [
        (r"convs\.0\.0\.weight", lambda i: f"b{resolution}.fromrgb.weight", _same),
        (r"convs\.0\.1\.bias", lambda i: f"b{resolution}.fromrgb.bias", _same),
        (r"convs\.(\d+)\.conv1\.0\.weight", lambda i: f"{block(i)}.conv0.weight", _same),
        (r"convs\.(\d+)\.conv1\.1\.bias", lambda i: f"{block(i)}.conv0.bias", _same),
        (r"convs\.(\d+)\.conv2\.1\.weight", lambda i: f"{block(i)}.conv1.weight", _same),
        (r"convs\.(\d+)\.conv2\.2\.bias", lambda i: f"{block(i)}.conv1.bias", _same),
        (r"convs\.(\d+)\.skip\.1\.weight", lambda i: f"{block(i)}.skip.weight", _same),
        (r"final_conv\.0\.weight", lambda i: "b4.conv.weight", _same),
        (r"final_conv\.1\.bias", lambda i: "b4.conv.bias", _same),
        (r"final_linear\.0\.weight", lambda i: "b4.fc.weight", _same),
        (r"final_linear\.0\.bias", lambda i: "b4.fc.bias", _same),
        (r"final_linear\.1\.weight", lambda i: "b4.out.weight", _same),
        (r"final_linear\.1\.bias", lambda i: "b4.out.bias", _same),
    ]


def read_rosinality(path: Path, which: Which) -> tuple[Tensors, dict[str, Any]]:
    """Tensors under our names; without w_avg if the file has no latent_avg (`build` makes one)."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # its train.py saves its options
        checkpoint = restricted_torch_load(path)
    if not isinstance(checkpoint, dict):
        raise Refused(f"holds a {type(checkpoint).__name__}; give a checkpoint of rosinality's")
    state = checkpoint.get(which)
    if not isinstance(state, dict):
        raise Refused(f"holds no {which}, only {_list(checkpoint)}; choose another with --which")
    if which == "d":
        blocks = sum(
            re.fullmatch(r"convs\.\d+\.conv1\.0\.weight", name) is not None for name in state
        )
        return rename_rosinality(state, rosinality_d(4 << blocks)), {}
    tensors = rename_rosinality(state, ROSINALITY_G)
    if checkpoint.get("latent_avg") is not None:
        tensors["mapping.w_avg"] = checkpoint["latent_avg"].flatten()
    return tensors, {}


def rename_rosinality(state: Mapping[str, Tensor], rows: list[Row]) -> Tensors:
    """Each tensor through the row that fits its whole name; Refused on a key in no table."""
    renamed: Tensors = {}
    for name, value in state.items():
        if ROSINALITY_DROPPED.fullmatch(name):
            _check_filter(name, value)
            continue
        for pattern, new_name, reshape in rows:
            if match := re.fullmatch(pattern, name):
                renamed[new_name(int(match[1]) if match.groups() else 0)] = reshape(value)
                break
        else:
            raise Refused(_unknown(name))
    return renamed


# --- From tensors to a network --------------------------------------------------------------------


def generator_config(tensors: Tensors, settings: Mapping[str, Any]) -> GeneratorConfig:
    """Every size from the tensors' shapes."""
    widths = _per_resolution(tensors, r"synthesis\.b(\d+)\.conv1\.weight", 0)
    return GeneratorConfig(
        resolution=2 << len(widths),
        z_dim=tensors["mapping.fc0.weight"].shape[1],
        w_dim=tensors["synthesis.b4.conv1.affine.weight"].shape[1],
        mapping_layers=len(_per_resolution(tensors, r"mapping\.fc(\d+)\.weight", 0)),
        widths=widths,
        conv_clamp=settings.get("conv_clamp"),
    )


def discriminator_config(tensors: Tensors, settings: Mapping[str, Any]) -> DiscriminatorConfig:
    """Every size from the tensors' shapes, but for the minibatch group (4 in rosinality's code)."""
    width, inputs = tensors["b4.conv.weight"].shape[:2]
    widths = (width, *_per_resolution(tensors, r"b(\d+)\.conv0\.weight", 1))
    group = settings.get("mbstd_group_size", 4)
    if not isinstance(group, int):
        raise Refused("compares whole batches in its discriminator; that cannot be converted")
    return DiscriminatorConfig(
        resolution=2 << len(widths),
        widths=widths,
        mbstd_group_size=group,
        mbstd_channels=inputs - width,
        conv_clamp=settings.get("conv_clamp"),
    )


def _per_resolution(tensors: Tensors, pattern: str, dim: int) -> tuple[int, ...]:
    """The size in `dim` of every tensor whose name fits, in the order of the number in the name."""
    matches = ((re.fullmatch(pattern, name), value) for name, value in tensors.items())
    sizes = {int(match[1]): value.shape[dim] for match, value in matches if match}
    return tuple(sizes[number] for number in sorted(sizes))


def build(tensors: Tensors, settings: Mapping[str, Any], which: Which) -> Generator | Discriminator:
    """The network of these tensors, in eval mode. A missing w_avg: the mean of 16384 w, seed 0."""
    if which == "d":
        discriminator = Discriminator(discriminator_config(tensors, settings))
        load_state(discriminator, tensors)
        return discriminator.eval()
    config = generator_config(tensors, settings)
    generator = Generator(config)
    load_state(generator, {"mapping.w_avg": torch.zeros(config.w_dim)} | tensors)
    if "mapping.w_avg" not in tensors:
        z = torch.randn(1 << 14, config.z_dim, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            generator.w_avg.copy_(generator.mapping(z).mean(dim=0))
    return generator.eval()


def convert(source: Path, which: Which = "g_ema") -> Generator | Discriminator:
    """The network `which` of a checkpoint; ValueError in one sentence where it cannot be had."""
    if not source.is_file():
        raise ValueError(f"{source}: no such file; give the path of a .pkl or .pt checkpoint")
    try:
        tensors, settings = (read_rosinality if _is_torch_file(source) else read_nvidia)(
            source, which
        )
        return build(tensors, settings, which)
    except Refused as error:
        raise ValueError(f"{source}: {error}") from error
    except Exception as error:  # a damaged or hostile file can raise anything while it is read
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{source}: not a whole StyleGAN2 checkpoint ({reason}); get the .pkl or .pt again"
        ) from error


def _is_torch_file(path: Path) -> bool:
    """Whether torch.save wrote it: a zip or, before torch 1.6, a pickle with its magic number."""
    with path.open("rb") as file:
        head = file.read(15)
    return head.startswith(b"PK\x03\x04") or head == b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def main(
    source: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    which: Which = "g_ema",
    discriminator: Path | None = None,
    licence: str = "not stated: that of the source applies",
    half: bool = False,
) -> None:
    """Convert an NVIDIA .pkl or rosinality .pt checkpoint to .safetensors.

    Args:
        source: the .pkl or .pt file.
        out: the .safetensors file to write.
        which: the network to write: averaged generator, generator in training, or discriminator.
        discriminator: a second .safetensors file to write, with the discriminator.
        licence: licence of the weights, kept in the metadata.
        half: store as fp16.
    """
    jobs: list[tuple[Which, Path]] = [(which, out)]
    if discriminator is not None:
        jobs.append(("d", discriminator))
    networks = [convert(source, name) for name, _ in jobs]  # all are read before one is written
    origin = {"source": source.name, "sha256": _sha256(source), "licence": licence}
    for (name, path), network in zip(jobs, networks, strict=True):
        save(path, network, provenance=origin | {"network": name}, half=half)
        print(f"{name} -> {path}  {network.config}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
