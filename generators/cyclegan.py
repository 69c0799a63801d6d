"""CycleGAN's networks (Zhu et al. 2017, arXiv:1703.10593), as a baseline; photos drawn with one.

    python -m generators.cyclegan runs/c/generator.safetensors --input faces/ --output drawn/

    generator = CycleGenerator(CycleGeneratorConfig(resolution=64))     # photo -> drawing
    discriminator = PatchDiscriminator(PatchDiscriminatorConfig())
    logits = discriminator(generator(photos))                           # (B, N), one a patch
    seen = PicturePool(50, 64)(drawings, already, rng)                  # old and new ones, mixed

A picture is named as its input is: by its file's name without the suffix, or by its row number.
How they are trained: `generators.cycles`. Pictures are aligned faces; each becomes its central
square at the generator's resolution. Shape letters: B batch, R resolution, C channels, P pictures
of a pool, N patches.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import tyro
from torch import Tensor, nn

from generators.checkpoint import load, resolve
from generators.command import command, console, parse_device, printable
from generators.data import named_pictures
from generators.dcgan import init_weights
from generators.disk import may_write, write_atomically
from generators.images import to_pil
from generators.runs import check_numbers

HALVINGS = 2  # of a generator: its residual blocks work at R / 4


@dataclass(frozen=True)
class CycleGeneratorConfig:
    resolution: int = 64  # side R that it is trained at, in pixels, a multiple of 4, 16 or more
    width: int = 16  # channels at R, doubled at each of two halvings; 64 in the paper
    blocks: int = 6  # residual blocks at R / 4; 6 in the paper for pictures of 128 pixels

    def __post_init__(self) -> None:
        if self.resolution < 16 or self.resolution % 2**HALVINGS:
            raise ValueError(
                f"a CycleGAN's resolution is a multiple of 4, 16 or more, not {self.resolution}"
            )
        if self.width < 1 or self.blocks < 0:
            raise ValueError("a CycleGAN's generator needs width >= 1 and blocks >= 0")


@dataclass(frozen=True)
class PatchDiscriminatorConfig:
    width: int = 32  # channels of the first layer, doubled at each further one; 64 in the paper
    halvings: int = 2  # strided layers; a patch is 16, 34, 70 (the paper's) pixels for 1, 2, 3

    def __post_init__(self) -> None:
        if self.width < 1 or self.halvings < 1:
            raise ValueError("a patch discriminator needs width >= 1 and halvings >= 1")


class ResidualBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), (B, C, r, r) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect", bias=False),
            nn.InstanceNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect", bias=False),
            nn.InstanceNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class CycleGenerator(nn.Module):
    """Pictures (B, 3, R, R) in [-1, 1] -> the same: c7s1-k, d2k, d4k, blocks, u2k, uk, c7s1-3
    (section 7.2), each with instance norm. Sides are multiples of 4, R or another."""

    kind: ClassVar[str] = "cyclegan"
    config_class: ClassVar[type] = CycleGeneratorConfig

    def __init__(self, config: CycleGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.resolution = config.resolution
        widths = [config.width * 2**i for i in range(HALVINGS + 1)]
        first = nn.Conv2d(3, widths[0], 7, padding=3, padding_mode="reflect", bias=False)
        downs = [nn.Conv2d(a, b, 3, 2, 1, bias=False) for a, b in pairwise(widths)]
        ups = [
            nn.ConvTranspose2d(a, b, 3, 2, 1, output_padding=1, bias=False)
            for a, b in pairwise(widths[::-1])
        ]
        self.down = nn.Sequential(*(with_norm(conv) for conv in (first, *downs)))
        self.blocks = nn.Sequential(*(ResidualBlock(widths[-1]) for _ in range(config.blocks)))
        self.up = nn.Sequential(*(with_norm(conv) for conv in ups))
        self.torgb = nn.Conv2d(widths[0], 3, 7, padding=3, padding_mode="reflect")
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        x = self.up(self.blocks(self.down(images)))  # (B, C, R, R); R / 4 in the blocks
        return self.torgb(x).float().tanh()


def with_norm(conv: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.InstanceNorm2d(conv.out_channels), nn.ReLU(inplace=True))


class PatchDiscriminator(nn.Module):
    """Pictures (B, 3, R, R) in [-1, 1] -> logits (B, N), one for each of N overlapping patches
    (Isola et al. 2017, arXiv:1611.07004, section 3.2.2): Ck, C2k, …, instance norm after all but
    the first; the last two layers keep the size, less one pixel."""

    kind: ClassVar[str] = "patch_discriminator"
    config_class: ClassVar[type] = PatchDiscriminatorConfig

    def __init__(self, config: PatchDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * 2**i for i in range(config.halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (a, b) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < config.halvings else 1
            layers += [
                nn.Conv2d(a, b, 4, stride, 1, bias=False),
                nn.InstanceNorm2d(b),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).float().flatten(1)


class PicturePool(nn.Module):
    """The history that a discriminator learns from (Shrivastava et al. 2017, arXiv:1612.07828,
    section 2.3; 50 pictures in CycleGAN). Its pictures are a buffer, so a checkpoint holds them."""

    def __init__(self, size: int, resolution: int) -> None:
        """size: P, 0 or more; 0: each picture is seen as it comes."""
        super().__init__()
        self.register_buffer("pictures", torch.zeros(size, 3, resolution, resolution))
        self.pictures: Tensor

    @torch.no_grad()
    def forward(self, images: Tensor, already: int, rng: torch.Generator) -> Tensor:
        """(B, 3, R, R) -> what is to be seen of them, the same shape.

        The first P are kept and seen. From then on, each picture is by even chance seen itself, or
        takes the place of a random one of the pool, which is seen instead.

        already: how many pictures came before these
        """
        size, seen = len(self.pictures), []
        draws = torch.rand(len(images), 2, generator=rng).tolist()
        for i, (image, (chance, place)) in enumerate(zip(images, draws, strict=True)):
            if already + i < size:
                self.pictures[already + i] = image
            elif size and chance < 0.5:
                old = self.pictures[int(place * size)]
                seen.append(old.clone())
                old.copy_(image)
                continue
            seen.append(image)
        return torch.stack(seen)


# ------------------------------------------------------------------------------ the command


@dataclass(frozen=True)
class Config:
    generator: Annotated[str, tyro.conf.Positional]  # RUN/generator.safetensors, or inverse
    input: str  # aligned faces: a folder (named by file) or parquet (named by row number)
    output: Path  # folder for OUTPUT/NAME.png
    images: int | None = None  # so many, evenly spread; None: all
    batch_size: int = 16  # pictures in one forward pass
    device: str = "auto"  # cpu, cuda, mps
    overwrite: bool = False  # replace pictures that exist

    def __post_init__(self) -> None:
        check_numbers(self, {"of 1 or more": ("images", "batch_size")})


@torch.no_grad()
def run(config: Config) -> None:
    device = parse_device(config.device)
    generator = load(resolve(config.generator), CycleGenerator).to(device)
    names, images = named_pictures(config.input, config.images, generator.resolution)
    if double := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"{printable(config.input)} has several pictures named {printable(double[0])}; leave "
            "one of each."
        )
    paths = [config.output / f"{name}.png" for name in names]
    for path in paths:
        may_write(path, config.overwrite)
    drawn = [generator(batch.to(device)) for batch in images.split(config.batch_size)]
    for path, picture in zip(paths, torch.cat(drawn), strict=True):
        write_atomically(path, partial(to_pil(picture).save, format="PNG"))
    console.print(f"written: {len(paths)} pictures to {printable(config.output)}")


def main(argv: Sequence[str] | None = None) -> int:
    return command(Config, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
