"""One .safetensors file = one network: weights, config, provenance, licence. Nothing is pickled.

    python -m generators.checkpoint runs/a/generator.safetensors small.safetensors   # to fp16
    save(Path("face.safetensors"), generator, provenance={"licence": "CC BY 4.0", "data": "…"})
    generator = load(resolve("face128"), Generator)       # a bundled model, or a path of your own

A network's class says what its files hold: `kind`, a word in their metadata, and `config_class`.
Loading is strict: a file gives the whole network it describes, or a ValueError. Half precision is a
storage format only: networks come back in the precision they are built in, fp32.

A file may leave out the tensors that are those of a bundled model, its base: a fine-tune with
frozen blocks, a generator grown by a block. It then names the base and what it took from there.
"""

import dataclasses
import hashlib
import json
import math
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import safetensors.torch
import torch
import tyro
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from generators.bundled import BUNDLED
from generators.command import command, console, printable
from generators.disk import may_write, write_atomically
from generators.tensors import load_state, read_header, read_weights

FORMAT = "1"
MOST = 1 << 20  # of whole numbers in a config
WANTED = "a bundled name, or a .safetensors file of this project (python -m generators.convert)"
N = TypeVar("N", bound=nn.Module)


def resolve(name_or_path: str | Path) -> Path:
    """The file of a bundled model, or the path itself; ValueError where there is no such file."""
    path = BUNDLED.get(str(name_or_path), Path(name_or_path).expanduser())
    if not path.exists():
        raise ValueError(
            f"{printable(name_or_path)}: no such file; "
            f"give a .safetensors path or a bundled name ({', '.join(BUNDLED)})"
        )
    return path


def save(
    path: str | Path,
    module: nn.Module,
    *,
    provenance: Mapping[str, str] | None = None,
    half: bool = False,
    base: str | None = None,
) -> None:
    """Writes `module`, a network with `kind` and `config`, whole or not at all.

    provenance: where the weights come from, as short texts; "licence" is "not stated" unless given.
    half: store floating-point weights as fp16; ValueError if one does not fit.
    base: name of a bundled model, whose equal tensors are left out; ValueError if there are none.
    """
    tensors = {name: _stored(name, tensor, half) for name, tensor in module.state_dict().items()}
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "kind": module.kind,
        "config": json.dumps(dataclasses.asdict(module.config)),  # type: ignore[call-overload]
        "provenance": json.dumps({"licence": "not stated"} | dict(provenance or {})),
    }
    if base is not None:
        tensors, metadata["base"] = _without(tensors, base)
    write_atomically(Path(path), lambda file: safetensors.torch.save_file(tensors, file, metadata))


def load(path: str | Path, *classes: type[N]) -> N:
    """The network in the file, of one of `classes`, built from its own config: on the CPU, in eval
    mode.

    ValueError in one sentence if the file is missing, damaged, of another kind, unlike its config
    or has values that are not finite. The global random state is left as it was.
    """
    metadata = read_metadata(path)
    rows: dict[str, Any] = {network.kind: network for network in classes}  # type: ignore[attr-defined]
    if metadata["kind"] not in rows:
        raise ValueError(
            f"{printable(path)}: holds a network of kind '{printable(metadata['kind'], 40)}'; "
            f"give a file with a {' or '.join(rows)} here"
        )
    network, tensors = rows[metadata["kind"]], read_weights(path, WANTED)
    inherited = _of_base(path, metadata)
    try:
        config = config_from(network.config_class, metadata["config"])
        with torch.random.fork_rng(devices=[]), Bound(tensors | inherited):
            module = getattr(network, "blank", network)(config)
    except MemoryError:
        raise
    except Exception as error:  # timm raises nearly any type for what it cannot build
        raise ValueError(
            f"{printable(path)}: bad config ({printable(error)}); convert or download it again"
        ) from error
    taken = {k: inherited[k] for k in module.state_dict() if k in inherited and k not in tensors}
    if inherited and _digest(taken) != metadata["base"].get("digest"):
        raise ValueError(
            f"{printable(path)}: what it left out was of another {metadata['base']['name']}; "
            "get it again for this version"
        )
    complaint = f"{printable(path)} is not as its config says, get it again"
    load_state(module, tensors | taken, complaint)
    return module.eval()


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a network's file, and those of its base that it does not have."""
    return _of_base(path, read_metadata(path)) | read_weights(path, WANTED)


def _of_base(path: str | Path, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of the bundled model that a file is based on, and of that one's own base."""
    if "base" not in metadata:
        return {}
    name = str(metadata["base"].get("name"))
    if name not in BUNDLED or BUNDLED[name] == Path(path):
        raise ValueError(
            f"{printable(path)}: is based on {printable(name, 40)}, which is no bundled model "
            "here; get it again for this version"
        )
    return read_tensors(resolve(name))


def _without(tensors: dict[str, Tensor], base: str) -> tuple[dict[str, Tensor], str]:
    """The tensors that are not the base's, and what tells which these are."""
    theirs = _of_base("", {"base": {"name": base}})
    equal = {k for k, v in tensors.items() if k in theirs and torch.equal(v, theirs[k].to(v.dtype))}
    if not equal:
        raise ValueError(f"no weight is one of {base}; leave the base out")
    if len(equal) == len(tensors):
        smallest = min(equal, key=lambda name: (tensors[name].numel(), name))
        equal.remove(smallest)  # a file without any tensor is taken for a damaged one
    digest = _digest({name: tensors[name] for name in equal})
    own = {name: tensor for name, tensor in tensors.items() if name not in equal}
    return own, json.dumps({"name": base, "digest": digest})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names and values, in half precision."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Bound(TorchDispatchMode):
    """While a network is built: ValueError as soon as it is far larger than the file's tensors, as
    a config may ask for a billion layers, or for one that fills the memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.operations = 1000 + 200 * len(tensors)
        self.elements = (1 << 20) + 8 * sum(tensor.numel() for tensor in tensors.values())

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        size = args[0] if args and isinstance(args[0], list | tuple) else ()
        self.operations -= 1
        if all(isinstance(side, int) for side in size):  # of a new tensor
            self.elements -= math.prod(size)
        if min(self.operations, self.elements) < 0:
            raise ValueError("it describes a larger network than the file holds")
        return operation(*args, **kwargs or {})


def read_metadata(path: str | Path) -> dict[str, Any]:
    """{"format", "kind", "config": {…}, "provenance": {"licence", …}} of a file, no weights."""
    raw: dict[str, Any] = read_header(path, WANTED)
    if missing := [key for key in ("format", "kind", "config", "provenance") if key not in raw]:
        raise ValueError(
            f"{printable(path)}: its metadata has no {', '.join(missing)}, so this project did not "
            "write it; give a bundled name, or convert the original with "
            "python -m generators.convert"
        )
    if raw["format"] != FORMAT:
        raise ValueError(
            f"{printable(path)}: is of format {printable(raw['format'], 40)}, this version reads "
            f"{FORMAT}; update the project"
        )
    try:
        objects = [key for key in ("config", "provenance", "base") if key in raw]
        return raw | {key: _json_object(raw[key]) for key in objects}
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{printable(path)}: its metadata is damaged ({printable(error)}); "
            "convert or download the file again"
        ) from error


def _json_object(text: str) -> dict[str, Any]:
    """ValueError for what is no object, has a key twice, or a number that is none."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    if len(text) > MOST:
        raise ValueError("it is too long")
    value = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def config_from(config_class: type, values: Mapping[str, Any]) -> Any:
    """A config dataclass from JSON values (lists become tuples); ValueError on an unknown key, on a
    value of another type than the field's, and on a number of absurd size."""
    kinds = get_type_hints(config_class)
    if unknown := sorted(values.keys() - kinds.keys()):
        raise ValueError(f"{config_class.__name__} has no field {', '.join(unknown)}")
    for name, value in values.items():
        if not _is_of(value, kinds[name]):
            kind = getattr(kinds[name], "__name__", kinds[name])
            raise ValueError(f"{name} is {printable(json.dumps(value), 40)}, not a fit {kind}")
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a JSON value is one of a field of this type; whole numbers up to MOST."""
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return any(_is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:  # of any length
        return isinstance(value, list) and all(_is_of(one, get_args(kind)[0]) for one in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) <= MOST
    return type(value) is kind and (kind is not int or abs(value) <= MOST)


def pack(
    source: Path, target: Path, provenance: Mapping[str, str], base: str | None = None
) -> None:
    """Writes the network of `source`, of any kind, to `target` in half precision, for shipping.

    provenance: entries that replace those of `source`. base: as of `save`. ValueError if a weight
    does not fit in fp16, or `source` has a base already.
    """
    metadata, tensors = read_metadata(source), read_weights(source, WANTED)
    metadata["config"] = json.dumps(metadata["config"])
    metadata["provenance"] = json.dumps(metadata["provenance"] | dict(provenance))
    tensors = {name: _stored(name, tensor, True) for name, tensor in tensors.items()}
    if "base" in metadata:
        if base is not None:
            raise ValueError(f"{printable(source)}: has a base already; leave --base out")
        metadata["base"] = json.dumps(metadata["base"])
    elif base is not None:
        tensors, metadata["base"] = _without(tensors, base)
    write_atomically(target, lambda file: safetensors.torch.save_file(tensors, file, metadata))


def _stored(name: str, tensor: Tensor, half: bool) -> Tensor:
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if half and tensor.is_floating_point():
        if tensor.isfinite().all() and not tensor.half().isfinite().all():
            raise ValueError(
                f"{name} has values beyond half precision (65504); save it with half=False"
            )
        return tensor.half()
    return tensor


@dataclass(frozen=True)
class PackConfig:
    source: Annotated[str, tyro.conf.Positional]  # a network: a bundled name or a file
    target: Annotated[Path, tyro.conf.Positional]  # the same in half precision
    provenance: dict[str, str] = field(default_factory=dict)  # KEY VALUE …, which replace SOURCE's
    base: str | None = None  # bundled name of what it was made of: what is equal is left out
    overwrite: bool = False  # replace TARGET if it exists

    def __post_init__(self) -> None:
        if self.base is not None and self.base not in BUNDLED:
            raise ValueError(f"--base is a bundled name, one of {', '.join(BUNDLED)}.")


def run(config: PackConfig) -> None:
    source = resolve(config.source)
    may_write(config.target, config.overwrite, [source])
    pack(source, config.target, config.provenance, config.base)
    console.print(f"written: {printable(config.target)}")


def main(argv: Sequence[str] | None = None) -> int:
    return command(PackConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
