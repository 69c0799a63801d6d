"""Everything that is done to whole blocks of a network, named by their resolution.

    python -m generators.blocks face64 anime64 --grid out.png      # swap n = 1, 2, … last blocks

    freeze_generator(generator, below=32)                # FreezeG: train b32, b64, … only
    freeze_discriminator(discriminator, blocks=2)        # FreezeD: the two next to the image fixed
    swapped = swap(face, anime, swap_resolution=16)      # b4, b8 of face; b16, … of anime
    blended = blend(face, anime, swap_resolution=16, width=0.5)
    reconstruction, drawn = SwappedSynthesis(face, anime, 16)(ws, both=True)
    drawings = SwappedSynthesis(face, {"anime": anime, "sketch": sketch}, 16).draw(ws)

Letters: B batch, L layers of w+, D w dimension, R resolution, K number of blocks.
"""

import copy
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, overload

import torch
import tyro
from torch import Tensor, nn

from generators import checkpoint
from generators.command import command, console, printable
from generators.discriminator import Discriminator
from generators.disk import may_write, write_atomically
from generators.images import grid, labelled, resize
from generators.latents import DEVIATIONS, StyleLimit, read_ws
from generators.runs import seed_of
from generators.stylegan2 import (
    Generator,
    GeneratorConfig,
    NoiseMode,
    SynthesisNetwork,
    resolutions_up_to,
)

RECONSTRUCTION = "reconstruction"  # among drawings, by style, the face generator's own picture

# --------------------------------------------------------------------------- freezing


def freeze_generator(generator: Generator, below: int) -> list[str]:
    """FreezeG: fine-tune only the blocks of resolution >= `below`, in place.

    The mapping network, the constant and the earlier blocks stay fixed, so that the fine-tune
    draws the same pose and layout for the same w as its source (Lee 2020, github.com/bryandlee/
    FreezeG; Back 2021, arXiv:2106.05744). Returns the names of the trainable parameters.
    """
    check_resolution(below, generator.config)
    trainable = []
    for name, parameter in generator.named_parameters():
        free = resolution_of(name) >= below and name != "synthesis.b4.const"
        parameter.requires_grad_(free)
        if free:
            trainable.append(name)
    return trainable


def freeze_discriminator(discriminator: Discriminator, blocks: int) -> list[str]:
    """FreezeD: keep the first `blocks` blocks from the image side fixed, in place.

    Mo et al. 2020, "Freeze the Discriminator" (arXiv:2002.10964), section 3. The last block, b4,
    is always trained. Returns the names of the trainable parameters.
    """
    resolutions = discriminator.resolutions  # [R, …, 8]
    if not 0 <= blocks <= len(resolutions):
        raise ValueError(f"blocks to freeze must be 0 to {len(resolutions)} here, not {blocks}.")
    fixed = tuple(f"b{resolution}." for resolution in resolutions[:blocks])
    trainable = []
    for name, parameter in discriminator.named_parameters():
        free = not name.startswith(fixed)
        parameter.requires_grad_(free)
        if free:
            trainable.append(name)
    return trainable


# ------------------------------------------------------------------- swapping, blending


def swap(face: Generator, anime: Generator, swap_resolution: int) -> Generator:
    """A new generator: mapping, w_avg and early blocks of `face`, blocks >= swap_resolution of
    `anime`. The two given stay as they are."""
    check_pair(face, anime, swap_resolution)
    return _mix(face, anime, lambda resolution: float(resolution >= swap_resolution))


def blend(face: Generator, anime: Generator, swap_resolution: int, width: float) -> Generator:
    """`swap` with a soft border: weights interpolated block by block.

    The share of `anime` at resolution r is sigmoid((log2(r / swap_resolution) + 1/2) / width), so
    the middle of the transition lies between the last early and the first late block, and width 0
    is `swap`. Pinkney & Adler 2020, "Resolution Dependent GAN Interpolation" (arXiv:2010.05334),
    section 2. width: in doublings of the resolution, >= 0.
    """
    check_pair(face, anime, swap_resolution)
    if not (0 <= width < math.inf):
        raise ValueError(f"The width of a blend must be 0 or more doublings, not {width}.")
    if width == 0:
        return swap(face, anime, swap_resolution)

    def share(resolution: int) -> float:
        distance = math.log2(resolution / swap_resolution) + 0.5
        return 0.5 * (1 + math.tanh(distance / width / 2))  # the sigmoid, without overflow

    return _mix(face, anime, share)


def _mix(face: Generator, anime: Generator, share: Callable[[int], float]) -> Generator:
    """A copy of `face` whose block r has moved by share(r) in [0, 1] towards that of `anime`."""
    result = copy.deepcopy(face)
    target = anime.state_dict()
    with torch.no_grad():
        for name, tensor in result.state_dict().items():  # these share memory with `result`
            resolution = resolution_of(name)
            weight = share(resolution) if resolution else 0.0
            if weight == 1:
                tensor.copy_(target[name])
            elif weight > 0:
                tensor.lerp_(target[name].to(tensor), weight)
    return result


class SwappedSynthesis(nn.Module):
    """The synthesis of `swap(face, anime, swap_resolution)`, and with `both` also that of `face`,
    for the price of the late blocks: the early ones are computed once. The weights are shared
    with the generators, not copied. The late blocks of `anime` get w limited to `style_limit`
    standard deviations (inf: as given), see `generators.latents`.

    Several fine-tunes by name are styles: `draw` gives a picture of each from one pass of the early
    blocks, a call of the network that of the first.
    """

    def __init__(
        self,
        face: Generator,
        anime: Generator | Mapping[str, Generator],
        swap_resolution: int,
        style_limit: float = DEVIATIONS,
    ) -> None:
        super().__init__()
        styles = {"anime": anime} if isinstance(anime, Generator) else dict(anime)
        if not styles or RECONSTRUCTION in styles:
            raise ValueError(f"A synthesis needs one style or more, none named {RECONSTRUCTION}.")
        for generator in styles.values():
            check_pair(face, generator, swap_resolution)
        self.limit = StyleLimit(face, swap_resolution, style_limit)
        self.face = face.synthesis
        self.styles = tuple(styles)
        self.tails = nn.ModuleList(generator.synthesis for generator in styles.values())
        self.resolutions = face.config.block_resolutions
        self.swap_resolution = swap_resolution

    @overload
    def forward(
        self,
        ws: Tensor,
        noise_mode: NoiseMode = ...,
        both: Literal[False] = ...,
        colours: float = ...,
        swap_resolution: int | None = ...,
        drawing_ws: Tensor | None = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        ws: Tensor,
        noise_mode: NoiseMode,
        both: Literal[True],
        colours: float = ...,
        swap_resolution: int | None = ...,
        drawing_ws: Tensor | None = ...,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        ws: Tensor,
        noise_mode: NoiseMode = ...,
        *,
        both: Literal[True],
        colours: float = ...,
        swap_resolution: int | None = ...,
        drawing_ws: Tensor | None = ...,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        ws: Tensor,
        noise_mode: NoiseMode = "const",
        both: bool = False,
        colours: float = 0.0,  # see `StyleLimit`
        swap_resolution: int | None = None,  # None: the constructor's
        drawing_ws: Tensor | None = None,  # (B, L, D) of the blocks of `anime`; None: `ws`
    ) -> Tensor | tuple[Tensor, Tensor]:
        """ws (B, L, D) -> anime (B, 3, R, R), or with `both` (reconstruction, anime)."""
        first = self.styles[0]
        made = self.draw(
            ws,
            (first,),
            both,
            noise_mode=noise_mode,
            colours=colours,
            swap_resolution=swap_resolution,
            drawing_ws=drawing_ws,
        )
        return (made[RECONSTRUCTION], made[first]) if both else made[first]

    def draw(
        self,
        ws: Tensor,
        styles: Sequence[str] | None = None,  # None: all
        reconstruction: bool = False,
        *,
        noise_mode: NoiseMode = "const",
        colours: float = 0.0,
        swap_resolution: int | None = None,
        drawing_ws: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """ws (B, L, D) -> {style: (B, 3, R, R)} of the named styles and, if asked for,
        "reconstruction". The other arguments are those of a call."""
        swap = self.swap_resolution if swap_resolution is None else swap_resolution
        early = [r for r in self.resolutions if r < swap]
        late = [r for r in self.resolutions if r >= swap]
        x = image = None
        if early:
            x, image = self.face.run_blocks(early, None, None, ws, noise_mode)
        limited = self.limit(ws if drawing_ws is None else drawing_ws, colours, swap)
        if drawing_ws is not None and self.face.spatial:  # which is no style
            limited = torch.cat([limited[:, : self.face.layers], ws[:, self.face.layers :]], dim=1)
        made = {
            name: self.tail(name).run_blocks(late, x, image, limited, noise_mode)[1]
            for name in (self.styles if styles is None else styles)
        }
        if reconstruction:
            made[RECONSTRUCTION] = self.face.run_blocks(late, x, image, ws, noise_mode)[1]
        return made

    def tail(self, style: str) -> SynthesisNetwork:
        """The synthesis whose late blocks draw that style. ValueError where there is no such."""
        if style not in self.styles:
            raise ValueError(f"There is no style {style}; choose from {', '.join(self.styles)}.")
        return self.tails[self.styles.index(style)]  # type: ignore[return-value]


# ------------------------------------------------------------ more blocks, a spatial code


def with_resolution(generator: Generator, resolution: int, seed: int = 0) -> Generator:
    """The generator and blocks up to `resolution`, that at first only enlarge its picture: their
    toRGB are 0 (Karras et al. 2018, arXiv:1710.10196, grow by fading in). The rows of their layers
    come behind the other layers'. Their widths are those of the config's rule; from listed widths
    on, half as many with each doubling. ValueError for a smaller resolution."""
    config = generator.config
    if resolution == config.resolution:
        return generator
    if resolution < config.resolution:
        raise ValueError(
            f"The generator draws {config.resolution}x{config.resolution}; it can grow, not "
            f"shrink to {resolution}."
        )
    widths = list(config.widths)
    while widths and len(widths) < len(resolutions_up_to(resolution)):
        widths.append(max(widths[-1] // 2, 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "resolution"))
        result = Generator(replace(config, resolution=resolution, widths=tuple(widths)))
    for r in result.config.block_resolutions[len(config.block_resolutions) :]:
        nn.init.zeros_(result.synthesis.get_parameter(f"b{r}.torgb.weight"))
    result.load_state_dict(result.state_dict() | generator.state_dict())
    return result.to(generator.w_avg).train(generator.training)


def with_spatial(generator: Generator, channels: int, seed: int = 0) -> Generator:
    """The generator, and a spatial code of so many channels, to which its pictures answer at
    random. ValueError where it has another one."""
    if generator.config.spatial == channels:
        return generator
    if generator.config.spatial:
        raise ValueError(
            f"The generator has a spatial code of {generator.config.spatial} channels, not "
            f"{channels}; leave --spatial out."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "spatial"))
        result = Generator(replace(generator.config, spatial=channels))
    result.load_state_dict(result.state_dict() | generator.state_dict())
    return result.to(generator.w_avg).train(generator.training)


# ----------------------------------------------------------------------------- checks


def resolution_of(name: str) -> int:
    """The resolution in a canonical name: "synthesis.b64.conv0.weight" -> 64; mapping -> 0."""
    match = re.match(r"synthesis\.b(\d+)\.", name)
    return int(match[1]) if match else 0


def check_resolution(resolution: int, config: GeneratorConfig) -> None:
    valid = config.block_resolutions
    if resolution not in valid:
        raise ValueError(
            f"There is no block of resolution {resolution}; "
            f"choose one of {', '.join(map(str, valid))}."
        )


def check_pair(face: Generator, anime: Generator, swap_resolution: int) -> None:
    """Both must be of one architecture, however their configs spell the channels."""

    def spelled_out(config: GeneratorConfig) -> dict:
        widths = tuple(config.channels.values())
        return asdict(replace(config, widths=widths, channel_base=1, channel_max=1))

    ours, theirs = spelled_out(face.config), spelled_out(anime.config)
    if ours != theirs:
        differences = [f"{k} {ours[k]} and {theirs[k]}" for k in ours if ours[k] != theirs[k]]
        raise ValueError(
            f"The two generators differ ({'; '.join(differences)}); "
            "swap a generator with its own fine-tune."
        )
    check_resolution(swap_resolution, face.config)


# ------------------------------------------------------------------------------- grids

Mode = Literal["swap", "blend"]


@torch.no_grad()
def swap_grid(
    face: Generator,
    anime: Generator,
    ws: Tensor,  # (B, L, D)
    mode: Mode = "swap",
    width: float = 0.5,  # of a blend, in doublings of the resolution
) -> Tensor:
    """(B, 1 + K, 3, R, R) in [-1, 1]: the face generator's own picture, then that with the last
    n = 1, 2, … K blocks of `anime`, constant noise."""
    width = width if mode == "blend" else 0.0
    columns = [face.synthesis(ws)]
    for resolution in face.config.block_resolutions[::-1]:
        columns.append(blend(face, anime, resolution, width).synthesis(ws))
    return torch.stack(columns, dim=1).clamp(-1, 1)


@dataclass(frozen=True)
class GridConfig:
    face: Annotated[str, tyro.conf.Positional]  # a .safetensors file or a bundled name
    anime: Annotated[str, tyro.conf.Positional]  # its fine-tune
    grid: Path  # the picture to write: rows are faces, columns the number of swapped blocks
    mode: Mode = "swap"  # or a blend, with a soft border
    width: float = 0.5  # of a blend, in doublings of the resolution, >= 0
    latents: Path | None = None  # .safetensors with `ws`, (L, D) or (N, L, D); None: drawn
    faces: int = 8  # rows, at most
    seed: int = 0  # of the draw
    truncation: float = 0.7  # of the draw; 1 is none
    size: int = 128  # side of each picture in pixels, up to 1024
    overwrite: bool = False  # replace the picture if it exists

    def __post_init__(self) -> None:
        if self.faces < 1 or not 1 <= self.size <= 1024:
            raise ValueError("--faces must be at least 1, and --size 1 to 1024.")
        if not (0 <= self.width < math.inf and math.isfinite(self.truncation)):
            raise ValueError("--width must be 0 or more doublings, and --truncation finite.")


@torch.no_grad()
def run(config: GridConfig) -> None:
    may_write(config.grid, config.overwrite, [config.latents] if config.latents else [])
    face, anime = (
        checkpoint.load(checkpoint.resolve(name), Generator) for name in (config.face, config.anime)
    )
    if config.latents is None:
        rng = torch.Generator().manual_seed(config.seed)
        ws = face.map(torch.randn(config.faces, face.z_dim, generator=rng), config.truncation)
    else:
        ws = read_ws(config.latents, face)[: config.faces]
    pictures = swap_grid(face, anime, ws, config.mode, config.width)
    resolutions = face.config.block_resolutions[::-1]
    labels = ["face", *(f"n = {n}, {r}²" for n, r in enumerate(resolutions, 1))]
    sheet = grid(resize(pictures.flatten(0, 1), config.size), columns=len(labels))
    write_atomically(config.grid, lambda p: labelled(sheet, labels).save(p, format="PNG"))
    console.print(f"written: {printable(config.grid)}")


def main(argv: Sequence[str] | None = None) -> int:
    return command(GridConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
