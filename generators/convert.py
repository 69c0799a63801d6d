"""Other people's StyleGAN2 checkpoints to this project's .safetensors. Executes nothing in it.

    python -m generators.convert ffhq.pkl face.safetensors --discriminator face_d.safetensors
    python -m generators.convert 550000.pt anime.safetensors --which g --licence "CC BY 4.0"

Read are pickles of NVIDIA's stylegan2-ada-pytorch and of the StyleGAN2 configurations of stylegan3,
and `.pt` files of rosinality/stylegan2-pytorch. Sizes come from the tensors' shapes. A key is
renamed by a table, dropped by a table, or refused. Not read: conditional models, StyleGAN3's own
architecture, TensorFlow-era pickles.

Shape letters: B batch, C channels, D w dimension, Z z dimension, R resolution.
"""

import hashlib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from generators.checkpoint import Bound, save
from generators.command import command, console, printable
from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.disk import may_write, open_regular
from generators.pickles import (
    Budget,
    Refused,
    is_torch,
    load_torch,
    mapping,
    persistent,
    read_pickle,
    tensor,
    walk,
)
from generators.stylegan2 import Generator, GeneratorConfig
from generators.tensors import check_finite, load_state

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
LINEAR = ("affine.", "skip.", "out.")  # the layers without an activation
SETTINGS = ("conv_clamp", "mbstd_group_size")  # what no tensor's shape tells


def read_nvidia(path: Path, which: Which) -> tuple[Tensors, dict[str, Any]]:
    """Tensors under our names, and the SETTINGS."""
    budget = Budget(path.stat().st_size)
    with open_regular(path) as file:
        networks = mapping(read_pickle(file, budget=budget))
    key = NVIDIA_KEYS[which]
    if networks.get(key) is None:
        raise Refused(f"holds no {key}, only {_list(networks)}; choose another with --which")
    root = persistent(networks[key])
    init = _init_kwargs(root)
    if root.get("c_dim") or init.get("c_dim"):
        raise Refused("holds a conditional model (c_dim > 0); give an unconditional one")
    tensors: Tensors = {}
    settings = {name: init[name] for name in SETTINGS if name in init}
    for prefix, state in walk(networks[key], budget):
        for kind in ("_parameters", "_buffers"):
            for name, node in mapping(state[kind]).items():
                if node is not None:
                    tensors[f"{prefix}{name}"] = tensor(node, budget)
        settings |= _layer_settings(prefix, state)
    numbers = [value for value in settings.values() if value is not None]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
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
    usual = {"activation": "linear" if prefix.endswith(LINEAR) else "lrelu", "use_noise": True}
    usual["architecture"] = "skip" if prefix.startswith("synthesis.") else "resnet"
    for name, value in usual.items():
        if name in state and state[name] != value:
            other = state[name] if isinstance(state[name], str | bool) else "of another kind"
            raise Refused(f"has {name} {printable(other, 40)}; only {value} can be converted")
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
        where = printable(name, 80)
        raise Refused(f"has another filter than [1, 3, 3, 1] in {where}; it cannot be converted")


def _unknown(name: str) -> str:
    return (
        f"has the unknown tensor {printable(name, 80)}; "
        "only the skip generator and the residual discriminator of StyleGAN2 can be converted"
    )


def _list(names: Any) -> str:
    return printable(", ".join(map(str, names)))


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
    (
        r"style\.(\d\d?)\.weight",
        lambda i: f"mapping.fc{i - 1}.weight",
        _same,
    ),  # style.0: no weights
    (r"style\.(\d\d?)\.bias", lambda i: f"mapping.fc{i - 1}.bias", _same),
    (r"input\.input", lambda i: "synthesis.b4.const", _first),
    *_layer(r"conv1", lambda i: "synthesis.b4.conv1"),
    *_layer(r"convs\.(\d\d?)", _conv),
    *_layer(r"to_rgb1", lambda i: "synthesis.b4.torgb"),
    *_layer(r"to_rgbs\.(\d\d?)", _rgb),
    (r"noises\.noise_(\d\d?)", lambda i: f"{_conv(i - 1)}.noise_const", lambda noise: noise[0, 0]),
]
ROSINALITY_DROPPED = re.compile(  # FIR filters: constants of our ops
    r"convs\.\d\d?\.conv\.blur\.kernel|to_rgbs\.\d\d?\.upsample\.kernel"
    r"|convs\.\d\d?\.(conv2|skip)\.0\.kernel"
)


def rosinality_d(resolution: int) -> list[Row]:
    """The discriminator's rows: block i works at R / 2^(i - 1)."""

    def block(i: int) -> str:
        return f"b{resolution >> (i - 1)}"

    return [
        (r"convs\.0\.0\.weight", lambda i: f"b{resolution}.fromrgb.weight", _same),
        (r"convs\.0\.1\.bias", lambda i: f"b{resolution}.fromrgb.bias", _same),
        (r"convs\.(\d\d?)\.conv1\.0\.weight", lambda i: f"{block(i)}.conv0.weight", _same),
        (r"convs\.(\d\d?)\.conv1\.1\.bias", lambda i: f"{block(i)}.conv0.bias", _same),
        (r"convs\.(\d\d?)\.conv2\.1\.weight", lambda i: f"{block(i)}.conv1.weight", _same),
        (r"convs\.(\d\d?)\.conv2\.2\.bias", lambda i: f"{block(i)}.conv1.bias", _same),
        (r"convs\.(\d\d?)\.skip\.1\.weight", lambda i: f"{block(i)}.skip.weight", _same),
        (r"final_conv\.0\.weight", lambda i: "b4.conv.weight", _same),
        (r"final_conv\.1\.bias", lambda i: "b4.conv.bias", _same),
        (r"final_linear\.0\.weight", lambda i: "b4.fc.weight", _same),
        (r"final_linear\.0\.bias", lambda i: "b4.fc.bias", _same),
        (r"final_linear\.1\.weight", lambda i: "b4.out.weight", _same),
        (r"final_linear\.1\.bias", lambda i: "b4.out.bias", _same),
    ]


def read_rosinality(path: Path, which: Which) -> tuple[Tensors, dict[str, Any]]:
    """Tensors under our names; without w_avg if the file has no latent_avg (`build` makes one)."""
    checkpoint = load_torch(path)
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


def check_shapes(tensors: Tensors) -> None:
    """Refused for what these networks can be configured to, and this project's cannot."""
    for name, value in tensors.items():
        channels = {"torgb.weight": 0, "fromrgb.weight": 1}.get(".".join(name.split(".")[-2:]))
        if channels is not None and value.shape[channels] != 3:
            count = value.shape[channels]
            raise Refused(f"is for pictures of {count} channels; only RGB can be converted")
        if re.search(r"\.conv[01]?\.weight$", name) and value.shape[-1] != 3:
            size = value.shape[-1]
            raise Refused(f"has convolutions of {size} x {size}; only 3 x 3 can be converted")
    if "mapping.fc0.weight" in tensors:
        names = [name for name in tensors if re.fullmatch(r"mapping\.fc\d+\.weight", name)]
        w_dim = tensors["synthesis.b4.conv1.affine.weight"].shape[1]
        if any(len(tensors[name]) != w_dim for name in names):
            raise Refused(f"has mapping layers (layer_features) not of w's {w_dim}; not supported")
        if not any(name.endswith("noise_strength") for name in tensors):
            raise Refused("has no noise inputs; only generators with noise can be converted")


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
        with Bound(tensors):
            discriminator = Discriminator(discriminator_config(tensors, settings))
        load_state(discriminator, tensors, "its sizes do not fit")
        return discriminator.eval()
    config = generator_config(tensors, settings)
    with Bound(tensors):
        generator = Generator(config)
    state = {"mapping.w_avg": torch.zeros(config.w_dim)} | tensors
    load_state(generator, state, "its sizes do not fit")
    if "mapping.w_avg" not in tensors:
        z = torch.randn(1 << 14, config.z_dim, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            generator.w_avg.copy_(generator.mapping(z).mean(dim=0))
    return generator.eval()


def convert(source: Path, which: Which = "g_ema") -> Generator | Discriminator:
    """The network `which` of a checkpoint; ValueError in one sentence where it cannot be had."""
    name = printable(source)
    try:
        with open_regular(source) as file:
            read = read_rosinality if is_torch(file.read(16)) else read_nvidia
        tensors, settings = read(source, which)
        check_shapes(tensors)
        check_finite(tensors)
        return build(tensors, settings, which)
    except Refused as error:
        raise ValueError(f"{name}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged or hostile file can raise anything while it is read
        if isinstance(error, OSError) and error.strerror:
            reason = f"{error.strerror}; give the path of a .pkl or .pt checkpoint"
        else:
            what = f"{type(error).__name__}: {printable(error)}"
            reason = f"not a whole StyleGAN2 checkpoint ({what}); get the .pkl or .pt again"
        raise ValueError(f"{name}: {reason}") from error


@dataclass(frozen=True)
class ConvertConfig:
    source: Annotated[Path, tyro.conf.Positional]  # the .pkl or .pt file
    out: Annotated[Path, tyro.conf.Positional]  # the .safetensors file to write
    which: Which = "g_ema"  # averaged generator, generator in training, or discriminator
    discriminator: Path | None = None  # a second .safetensors file to write, with the discriminator
    licence: str = "not stated: that of the source applies"  # of the weights, kept in the metadata
    half: bool = False  # store as fp16
    overwrite: bool = False  # replace files that exist

    def __post_init__(self) -> None:
        if self.discriminator is not None and self.discriminator.resolve() == self.out.resolve():
            raise ValueError("OUT and --discriminator are one file; give them different names.")


def run(config: ConvertConfig) -> None:
    jobs: list[tuple[Which, Path]] = [(config.which, config.out)]
    if config.discriminator is not None:
        jobs.append(("d", config.discriminator))
    for _, path in jobs:
        may_write(path, config.overwrite, [config.source])
    networks = [convert(config.source, name) for name, _ in jobs]  # all, before one is written
    origin = {"source": config.source.name, "sha256": _sha256(config.source)}
    for (name, path), network in zip(jobs, networks, strict=True):
        provenance = origin | {"licence": config.licence, "network": name}
        save(path, network, provenance=provenance, half=config.half)
        console.print(f"{name} -> {printable(path)}  {network.config}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    return command(ConvertConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
