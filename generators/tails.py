"""Styles: the late blocks of a face generator's fine-tune, in a small file of their own.

    python -m generators.tails runs/sketch/generator.safetensors sketch64.safetensors
    anime = load_style("anime64", face)      # a whole generator: the early blocks are the face's

Of a fine-tune with frozen early blocks (FreezeG) only the late ones are new. A tail holds these and
a fingerprint of its trunk, which is mapping and early blocks: with another face generator it would
draw nonsense, so it is refused there. The face generator's own late blocks may change.

Letters: R resolution.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro
from torch import nn

from generators import checkpoint
from generators.blocks import (
    check_pair,
    check_resolution,
    resolution_of,
    swap,
    with_spatial,
)
from generators.command import command, console, printable
from generators.disk import may_write
from generators.stylegan2 import SPATIAL_SIDE, Generator, GeneratorConfig, SynthesisNetwork
from generators.tensors import load_state


@dataclass(frozen=True)
class TailConfig(GeneratorConfig):
    first: int = 16  # resolution of the first block that is there
    trunk: str = ""  # `trunk_of` the generator that it goes on

    def __post_init__(self) -> None:
        super().__post_init__()
        check_resolution(self.first, self)

    @property
    def whole(self) -> GeneratorConfig:
        """Of the generator that trunk and tail are together."""
        values = asdict(self)
        return GeneratorConfig(**{k: v for k, v in values.items() if k not in ("first", "trunk")})


class Tail(nn.Module):
    """The blocks of resolution >= `config.first` of a generator's synthesis."""

    kind: ClassVar[str] = "tail"
    config_class: ClassVar[type] = TailConfig

    def __init__(self, config: TailConfig) -> None:
        super().__init__()
        self.config = config
        self.synthesis = SynthesisNetwork(config, config.first)

    def on(self, face: Generator) -> Generator:
        """`face` with these late blocks. ValueError where its trunk is another one."""
        if trunk_of(face, self.config.first) != self.config.trunk:
            raise ValueError("This is the tail of another face generator.")
        with torch.random.fork_rng(devices=[]):
            late = Generator(self.config.whole)
        late.load_state_dict(late.state_dict() | self.state_dict())
        return swap(face, late.to(face.w_avg.device), self.config.first)


def tail_of(generator: Generator, first: int, trunk: Generator | None = None) -> Tail:
    """The late blocks of a fine-tune, for the face generator `trunk`; None: for its own trunk. They
    do not mind whether that has a spatial code, where theirs begin behind it."""
    if trunk is not None:
        if first > SPATIAL_SIDE:
            generator = with_spatial(generator, trunk.config.spatial)
        check_pair(trunk, generator, first)
    fingerprint = trunk_of(trunk or generator, first)
    with torch.random.fork_rng(devices=[]):
        tail = Tail(TailConfig(**asdict(generator.config), first=first, trunk=fingerprint))
    state = generator.state_dict()
    tail.load_state_dict({name: state[name] for name in tail.state_dict()})
    return tail.eval()


def moved(tail: Tail, trunk: Generator) -> Tail:
    """The same late blocks for another face generator, as one whose early blocks have learnt on."""
    with torch.random.fork_rng(devices=[]):
        fingerprint = trunk_of(trunk, tail.config.first)
        shape = asdict(trunk.config) | {"first": tail.config.first, "trunk": fingerprint}
        result = Tail(TailConfig(**shape))
    load_state(result, tail.state_dict(), "the tail's blocks have other shapes")
    return result.eval()


def trunk_of(generator: Generator, first: int) -> str:
    """A hash of architecture, mapping and blocks below `first`, in half precision: the same for
    weights that were rounded for shipping."""
    check_resolution(first, generator.config)
    config, clamp = generator.config, generator.config.conv_clamp
    shape = (config.z_dim, config.channels, None if clamp is None else float(clamp))
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
    for name, tensor in sorted(generator.state_dict().items()):
        if resolution_of(name) < first:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().half().contiguous().numpy().data)
    return digest.hexdigest()


def load_style(name_or_path: str | Path, face: Generator) -> Generator:
    """A fine-tune of `face`: a tail on it, or a whole generator, which gets the face's spatial code
    if it is from before that had one. ValueError, where the file is neither, or a tail of another
    face generator."""
    path = checkpoint.resolve(name_or_path)
    found: Any = checkpoint.load(path, Generator, Tail)
    if isinstance(found, Generator):
        if face.config.spatial and not found.config.spatial:
            found = with_spatial(found, face.config.spatial)
            answer, its = (g.synthesis.get_submodule("b8.spatial") for g in (found, face))
            answer.load_state_dict(its.state_dict())
        return found
    try:
        return found.on(face).eval()
    except ValueError as error:
        raise ValueError(
            f"{printable(name_or_path)} is the tail of another face generator (mapping or early "
            "blocks differ); give that one as --face-generator, or styles that were trained for "
            "this one (generators.train stylegan2 --freeze-generator-below)."
        ) from error


def load_styles(styles: Mapping[str, str | Path], face: Generator) -> dict[str, Generator]:
    """{name: fine-tune of `face`} of {name: bundled name or file}."""
    return {name: load_style(source, face) for name, source in styles.items()}


# ------------------------------------------------------------------------------ the command


@dataclass(frozen=True)
class TailsConfig:
    source: Annotated[str, tyro.conf.Positional]  # a fine-tune or a tail: a bundled name or a file
    target: Annotated[Path, tyro.conf.Positional]  # its late blocks, in half precision
    first: int = 16  # resolution of the first block that is kept
    face_generator: str | None = None  # that it is for; None: the source's own early blocks
    provenance: dict[str, str] = field(default_factory=dict)  # KEY VALUE …, which replace SOURCE's
    overwrite: bool = False  # replace TARGET if it exists


def run(config: TailsConfig) -> None:
    source = checkpoint.resolve(config.source)
    face = None
    if config.face_generator is not None:
        face = checkpoint.load(checkpoint.resolve(config.face_generator), Generator)
    may_write(config.target, config.overwrite, [source])
    found: Any = checkpoint.load(source, Generator, Tail)
    if isinstance(found, Generator):
        tail = tail_of(found, config.first, face)
    elif face is None:
        raise ValueError(
            f"{printable(config.source)} is a tail already; give --face-generator, the generator "
            "that it is to go on."
        )
    else:
        tail = moved(found, face)
    provenance = checkpoint.read_metadata(source)["provenance"] | config.provenance
    checkpoint.save(config.target, tail, provenance=provenance, half=True)
    size = config.target.stat().st_size / 1e6
    console.print(f"written: {printable(config.target)}, {size:.2f} MB")


def main(argv: Sequence[str] | None = None) -> int:
    return command(TailsConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
