"""From the models of one resolution to those of twice as much, before the new block is trained.

    python -m encoder.grow face64 big/face.safetensors
    python -m generators.train stylegan2 --init big/face.safetensors --freeze-generator-below 128 …
    python -m encoder.grow encoder64 big/encoder.safetensors --face-generator big/face.safetensors
    python -m encoder.grow pairs/latents.safetensors big/latents.safetensors --face-generator …

A generator, or a style, gets a block that only enlarges its picture; an encoder gives the two new
layers the w of the last one it knew, and so do latents; directions move them with that one; a
search in the coordinates of a curvature leaves them still. So everything draws and finds what it
did, twice as large, and what is trained from there on is the new block, or more.

Shape letters: N directions, L rows of w+, D dimension of w, R resolution.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from encoder.directions import Directions, fingerprint
from encoder.model import Encoder
from generators import checkpoint
from generators.blocks import with_resolution
from generators.command import command, console, printable
from generators.curvature import Curvature
from generators.disk import may_write
from generators.latents import write_latents
from generators.stylegan2 import Generator
from generators.tails import Tail, tail_of
from generators.tensors import load_state, read_header, read_weights


def grown_latents(ws: Tensor, face: Generator) -> Tensor:
    """ws (N, L', D) -> (N, L, D), new layers having the w of the last one."""
    more = face.num_ws - ws.shape[1]
    last = face.layers - more
    new = ws[:, last - 1 : last].expand(-1, more, -1)
    return torch.cat([ws[:, :last], new, ws[:, last:]], dim=1)


def grown_encoder(encoder: Encoder, face: Generator) -> Encoder:
    """The same encoder, for a face generator that has grown: new layers repeat the last."""
    config, more = encoder.config, face.num_ws - encoder.config.num_ws
    shape = replace(config, num_ws=face.num_ws, repeated=config.repeated + more)
    return rebuilt(encoder, Encoder(shape))


def grown_curvature(curvature: Curvature, face: Generator) -> Curvature:
    """The same curvature, with the new layers still. They come before the rows of a spatial code,
    behind all others."""
    config, more = curvature.config, face.num_ws - curvature.config.num_ws
    if config.still:
        raise ValueError("A curvature that has grown cannot grow again; measure it anew.")
    still = tuple(range(face.layers - more, face.layers))
    return rebuilt(curvature, Curvature(replace(config, num_ws=face.num_ws, still=still)))


def grown_directions(directions: Directions, face: Generator) -> Directions:
    """The same directions; those that move the last layer move the new ones alike."""
    config = directions.config
    before, more = config.layers or config.num_ws, face.num_ws - config.num_ws
    last = tuple(end + more if end == before - 1 else end for end in config.last)
    shape = replace(
        config, num_ws=face.num_ws, layers=face.layers, last=last, trunk=fingerprint(face)
    )
    made = Directions(shape)
    made.steps.copy_(grown_latents(directions.steps, face))
    return made.eval()


def grown_tail(tail: Tail, face: Generator) -> Tail:
    """The same style, on a face generator that has grown."""
    config = tail.config
    with torch.random.fork_rng(devices=[]):
        late = Generator(config.whole)
    late.load_state_dict(late.state_dict() | tail.state_dict())
    return tail_of(with_resolution(late, face.resolution), config.first, face)


def rebuilt(network: Any, larger: Any) -> Any:
    load_state(larger, network.state_dict(), "the network's tensors have other shapes")
    return larger.eval()


GROWN: dict[type[nn.Module], Any] = {
    Encoder: grown_encoder,
    Curvature: grown_curvature,
    Directions: grown_directions,
    Tail: grown_tail,
}


@dataclass(frozen=True)
class GrowConfig:
    source: Annotated[str, tyro.conf.Positional]  # a bundled name or a file, of any of these kinds,
    # or of latents
    target: Annotated[Path, tyro.conf.Positional]  # the .safetensors to write, in half precision
    face_generator: str | None = None  # that has grown; a generator needs none
    provenance: dict[str, str] = field(default_factory=dict)  # KEY VALUE …, which replace SOURCE's
    base: str | None = None  # bundled name: what is equal to it is left out
    overwrite: bool = False  # replace TARGET if it exists


def run(config: GrowConfig) -> None:
    source = checkpoint.resolve(config.source)
    may_write(config.target, config.overwrite, [source])
    if "kind" not in read_header(source):  # no network
        write_latents(config.target, {"ws": latents_for(source, config)})
        console.print(f"written: {printable(config.target)}")
        return
    network: Any = checkpoint.load(source, Generator, *GROWN)
    grown: nn.Module
    if isinstance(network, Generator):
        grown = with_resolution(network, 2 * network.resolution)
    else:
        grown = for_generator(network, config)
    provenance = checkpoint.read_metadata(source)["provenance"] | config.provenance
    checkpoint.save(config.target, grown, provenance=provenance, half=True, base=config.base)
    console.print(f"written: {printable(config.target)}")


def latents_for(source: Path, config: GrowConfig) -> Tensor:
    ws = read_weights(source).get("ws")
    if ws is None or ws.ndim != 3:
        raise ValueError(
            f"{printable(config.source)} holds neither a network of this project nor latents (ws)."
        )
    return grown_latents(ws, grown_face(config, ws.shape[1], ws.shape[2]))


def for_generator(network: Any, config: GrowConfig) -> nn.Module:
    shape = asdict(network.config)
    rows = shape.get("num_ws") or network.config.whole.num_ws
    return GROWN[type(network)](network, grown_face(config, rows, shape["w_dim"]))


def grown_face(config: GrowConfig, rows: int, width: int) -> Generator:
    """The face generator, of whose w+ so many rows of that width were; ValueError where it cannot
    have grown from that."""
    if config.face_generator is None:
        raise ValueError(
            f"{printable(config.source)} belongs to a face generator; grow that one first, and "
            "give it as --face-generator."
        )
    face = checkpoint.load(checkpoint.resolve(config.face_generator), Generator)
    more = face.num_ws - rows
    if not 0 < more < face.layers or more % 2 or face.w_dim != width:
        raise ValueError(
            f"{printable(config.source)} has {rows} rows of {width} numbers, the face generator "
            f"{face.num_ws} of {face.w_dim}; give one that has grown."
        )
    return face


def main(argv: Sequence[str] | None = None) -> int:
    return command(GrowConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
