"""One .safetensors file = one network: weights, config, provenance, licence. Nothing is pickled.

    python -m generators.checkpoint runs/a/generator.safetensors small.safetensors   # to fp16
    save(Path("face.safetensors"), generator, provenance={"licence": "CC BY 4.0", "data": "…"})
    generator = load(resolve("face64"), "generator")      # a bundled model, or a path of your own

A kind of network is a row of KINDS; other packages add theirs: KINDS["encoder"] = Config, Encoder.
Loading is strict: a file gives the whole network it describes, or a ValueError. Half precision is a
storage format only: networks come back in the precision they are built in, fp32.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import tyro
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from generators.dcgan import (
    DcganConfig,
    DcganDiscriminator,
    DcganDiscriminatorConfig,
    DcganGenerator,
)
from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.projected import ProjectedConfig, ProjectedDiscriminator
from generators.runs import write_atomically
from generators.stylegan2 import Generator, GeneratorConfig
from generators.superres import SuperResolution, SuperResolutionConfig

FORMAT = "1"

Kinds = dict[str, tuple[type, Callable[[Any], nn.Module]]]
KINDS: Kinds = {
    "generator": (GeneratorConfig, Generator),
    "discriminator": (DiscriminatorConfig, Discriminator),
    "projected": (ProjectedConfig, partial(ProjectedDiscriminator, weights="random")),
    "dcgan": (DcganConfig, DcganGenerator),
    "dcgan_discriminator": (DcganDiscriminatorConfig, DcganDiscriminator),
    "superres": (SuperResolutionConfig, SuperResolution),
}

_WEIGHTS = Path(__file__).parent / "weights"
_NAMES = ("face64", "anime64", "encoder64", "superres64", "curvature64")
BUNDLED = {name: _WEIGHTS / f"{name}.safetensors" for name in _NAMES}


def resolve(name_or_path: str | Path) -> Path:
    """The file of a bundled model, or the path itself; ValueError where there is no such file."""
    path = BUNDLED.get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        names = ", ".join(BUNDLED)
        raise ValueError(
            f"{name_or_path}: no such file; give a .safetensors path or a bundled name ({names})"
        )
    return path


def save(
    path: str | Path,
    module: nn.Module,
    *,
    provenance: Mapping[str, str] | None = None,
    half: bool = False,
) -> None:
    """Writes `module` (of a kind in KINDS, with its `.config`) whole or not at all.

    provenance: where the weights come from, as short texts; "licence" is "not stated" unless given.
    half: store floating-point weights as fp16; ValueError if one does not fit.
    """
    config = module.config
    kind = next(
        (name for name, (config_class, _) in KINDS.items() if type(config) is config_class), None
    )
    if kind is None:
        raise ValueError(
            f"{type(module).__name__} is of no known kind ({', '.join(KINDS)}); add it to KINDS"
        )
    tensors = {name: _stored(name, tensor, half) for name, tensor in module.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "kind": kind,
        "config": json.dumps(dataclasses.asdict(config)),  # type: ignore[call-overload]
        "provenance": json.dumps({"licence": "not stated"} | dict(provenance or {})),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: safetensors.torch.save_file(tensors, file, metadata))


def load(path: str | Path, kind: str, kinds: Kinds | None = None) -> Any:
    """The network (an nn.Module) in the file, built from its own config: on the CPU, in eval mode.

    ValueError in one sentence if the file is missing, damaged, of another kind or unlike its config
    The global random state is left as it was.
    """
    kinds = KINDS if kinds is None else kinds
    if kind not in kinds:
        raise ValueError(f"unknown kind of network {kind!r}; known are {', '.join(kinds)}")
    metadata, tensors = _read(path)
    if metadata["kind"] != kind:
        raise ValueError(
            f"{path}: holds a network of kind {metadata['kind']!r}; give a file with a {kind} here"
        )
    config_class, build = kinds[kind]
    with torch.random.fork_rng(devices=[]):
        try:
            module = build(config_from(config_class, metadata["config"]))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path}: bad config ({error}); convert or download the file again"
            ) from error
    try:
        load_state(module, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; convert or download the file again") from error
    return module.eval()


def load_one_of(path: str | Path, kinds: Sequence[str]) -> Any:
    """`load` of a file that may be of several kinds."""
    kind = read_metadata(path)["kind"]
    return load(path, kind if kind in kinds else kinds[0])


def load_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies `tensors` into `module` in its own dtypes; on any difference ValueError, no copy."""
    own = module.state_dict()
    if missing := sorted(own.keys() - tensors.keys()):
        raise ValueError(f"{len(missing)} tensors are missing, {missing[0]} for one")
    if unknown := sorted(tensors.keys() - own.keys()):
        raise ValueError(f"{len(unknown)} tensors are unknown, {unknown[0]} for one")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            )
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, not {own[name].dtype}")
    module.load_state_dict(
        {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()}, strict=True
    )


def read_metadata(path: str | Path) -> dict[str, Any]:
    """{"format", "kind", "config": {…}, "provenance": {"licence", …}} of a file, no weights."""
    return _read(path, weights=False)[0]


def config_from(config_class: type, values: Mapping[str, Any]) -> Any:
    """A config dataclass from JSON values (lists become tuples); ValueError on an unknown key."""
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{config_class.__name__} has no field {', '.join(unknown)}")
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def pack(source: Path, target: Path, provenance: dict[str, str]) -> None:
    """Writes the network of `source`, of any kind, to `target` in half precision, for shipping.

    provenance: entries that replace those of `source`. ValueError if a weight does not fit in fp16.
    """
    metadata, tensors = _read(source)
    metadata["config"] = json.dumps(metadata["config"])
    metadata["provenance"] = json.dumps(metadata["provenance"] | provenance)
    tensors = {name: _stored(name, tensor, True) for name, tensor in tensors.items()}
    write_atomically(target, lambda file: safetensors.torch.save_file(tensors, file, metadata))


def _read(path: str | Path, weights: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; give the path of a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in (file.keys() if weights else ())}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a whole .safetensors file ({error}); download it again, "
            "or convert a .pkl or .pt file with python -m generators.convert"
        ) from error
    if missing := [key for key in ("format", "kind", "config", "provenance") if key not in raw]:
        raise ValueError(
            f"{path}: its metadata has no {', '.join(missing)}, so this project did not write it; "
            "give a bundled name, or convert the original with python -m generators.convert"
        )
    if raw["format"] != FORMAT:
        raise ValueError(
            f"{path}: is of format {raw['format']}, this version reads {FORMAT}; update the project"
        )
    try:
        config, provenance = json.loads(raw["config"]), json.loads(raw["provenance"])
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: its metadata is damaged ({error}); convert or download the file again"
        ) from error
    if not isinstance(config, dict) or not isinstance(provenance, dict):
        raise ValueError(
            f"{path}: its metadata is damaged (no JSON object); convert or download the file again"
        )
    return raw | {"config": config, "provenance": provenance}, tensors


def _stored(name: str, tensor: Tensor, half: bool) -> Tensor:
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if half and tensor.is_floating_point():
        if tensor.isfinite().all() and not tensor.half().isfinite().all():
            raise ValueError(
                f"{name} has values beyond half precision (65504); save it with half=False"
            )
        return tensor.half()
    return tensor


def main(source: Path, target: Path, provenance: dict[str, str] | None = None) -> None:
    """Stores the network in SOURCE in half precision in TARGET.

    provenance: KEY VALUE pairs that replace those of SOURCE.
    """
    try:
        pack(source, target, provenance or {})
    except ValueError as error:
        Console(stderr=True).print(f"[red]{error}[/red]")
        raise SystemExit(2) from None


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
