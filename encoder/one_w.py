"""Give a generator a w that holds what an encoder puts into all layers of w+; move both to it.

    python -m encoder.one_w encoder.safetensors face.safetensors out/ --data faces/ --also anime64

An encoder uses each layer of w+ as a space of its own: the layers of one photo's w+ have next to
nothing in common, and a sample of one w for all layers lies where no photo is. But the w+ of all
photos together fill few dimensions. The new w are coordinates along as many principal axes of the
photos' w+, all layers side by side, as w has dimensions, turned at random and scaled to the old w's
variance. What was linear stays so: each layer's affine layer takes the new w (of fine-tunes too,
`--also`), the encoder's head gives it, one for all layers, and pictures stay as they were but for
the axes left out. The late blocks of a fine-tune, which smear at what photos are encoded to, take a
least-squares fit to these codes limited (`generators.latents.StyleLimit`) instead: there they draw
soundly, and need no limit any more. The mapping network is another one, fitted to the new w of the
photos: first to a normal distribution of their covariance, then by energy distance to them. Train
on from there with `train_encoder.py --generator-lr … --shared`.

The spatial code, where there is one, stays as it is.

With `--mapping-only` the axes of w stay, and with them all that was found along them: for a pair
that has trained on, whose photos have moved away from the w that its mapping network gives.

Shape letters: N photos, L layers of w+, D dimension of w, C width of the encoder's head, B batch.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from einops import rearrange
from torch import Tensor

from encoder.joint import energy_distance
from encoder.model import Encoder
from generators import checkpoint
from generators.command import command, console, printable
from generators.data import first_pictures, open_dataset
from generators.disk import may_write
from generators.latents import LIMIT, StyleLimit, affines, principal_axes
from generators.runs import check_numbers, seed_of
from generators.stylegan2 import Generator, MappingNetwork

BATCH = 384  # latents of a step of fitting the mapping network
DENSE = ("dense.pixels.weight", "dense.pixels.bias", "dense.places.weight")  # its last layers
MAPPING_LR = 0.3  # of Adam; its weights are a hundred times what they act as


@dataclass(frozen=True)
class OneWConfig:
    encoder: Annotated[str, tyro.conf.Positional]  # a bundled name or a file
    generator: Annotated[str, tyro.conf.Positional]  # its generator, likewise
    target: Annotated[Path, tyro.conf.Positional]  # folder for encoder, generator and others
    data: str  # photos: a folder, parquet or a saved Hugging Face data set
    also: tuple[str, ...] = ()  # fine-tunes of the generator: bundled names or files
    images: int = 4000  # photos whose w+ are measured, each mirrored too
    swap_resolution: int = 16  # first block of the fine-tunes that gets limited codes
    style_limit: float | None = LIMIT  # of these codes; None: as found
    mapping_only: bool = False  # the axes of w stay; only the mapping network is fitted anew
    fit_steps: int = 1500  # of the mapping network, to each of its two aims
    seed: int = 0  # of everything that is drawn
    overwrite: bool = False  # replace files that exist

    def __post_init__(self) -> None:
        check_numbers(self, {"of 1 or more": ("images", "fit_steps")})


@dataclass(frozen=True)
class Coordinates:
    """The new w of w+, and back: w = (offsets - mean) @ into; offsets of layer l = mean + w @ back,
    offsets being from the old w_avg."""

    mean: Tensor  # (L, D)
    into: Tensor  # (L, D, D)
    back: Tensor  # (L, D, D)


def coordinates(offsets: Tensor, variance: Tensor, rng: torch.Generator) -> Coordinates:
    """Of photos' offsets (N, L, D): the first D principal axes, scaled to a variance in all, ()."""
    flat = offsets.flatten(1).double()
    mean = flat.mean(dim=0)
    values, axes = torch.linalg.eigh(torch.cov(flat.T))
    size = offsets.shape[2]
    values, axes = values[-size:], axes[:, -size:]  # (D), (L * D, D)
    console.print(f"{values.sum() / torch.cov(flat.T).trace():.2%} of the variance is kept")
    turn = torch.linalg.qr(torch.randn(size, size, generator=rng).double())[0]
    scale = (variance.double() / values.sum()).sqrt()
    into, back = scale * axes @ turn, turn.T @ axes.T / scale
    return Coordinates(
        mean.view(-1, size),
        rearrange(into, "(l d) e -> l d e", d=size),
        rearrange(back, "e (l d) -> l e d", d=size),
    )


def fitted(offsets: Tensor, w: Tensor, to: Coordinates) -> Coordinates:
    """The same new w (N, D), but back to the linear function of them that is nearest to `offsets`
    (N, L, D), which are no linear function of them."""
    mean, w = offsets.double().mean(dim=0), w.double()
    back = torch.linalg.lstsq(w, (offsets.double() - mean).flatten(1)).solution  # (D, L * D)
    return Coordinates(mean, to.into, rearrange(back, "e (l d) -> l e d", l=len(mean)))


@torch.no_grad()
def move_generator(generator: Generator, w_avg: Tensor, to: Coordinates, mapping: dict) -> None:
    """Its affine layers take the new w; `mapping` is the state of its new mapping network."""
    for layer, affine in affines(generator):
        weight = affine.weight.double()
        moved = (w_avg.double() + to.mean[layer]) @ (weight * affine.weight_gain).T
        affine.bias.add_(moved.float())
        affine.weight.copy_(weight @ to.back[layer].T)
    generator.mapping.load_state_dict(mapping)


@torch.no_grad()
def moved_encoder(encoder: Encoder, w_avg: Tensor, to: Coordinates) -> Encoder:
    """An encoder with a head of one w for all layers, around the new w_avg."""
    moved = Encoder(dataclasses.replace(encoder.config, shared=True)).eval()
    state = encoder.state_dict()
    heads = [state["to_offsets"].double()]  # (L, C, D)
    bias = -torch.einsum("ld,lde->e", to.mean, to.into) - w_avg
    total = to.into.sum(dim=0)  # what is shared enters every layer's coordinates
    for name in DENSE if encoder.config.dense else ():
        state[name] = (total.T @ state[name].double()).float()
    if encoder.config.shared:
        own = rearrange(state["to_shared.weight"].double(), "d (l c) -> l c d", l=len(to.mean))
        heads.append(own)
        bias = bias + state["to_shared.bias"].double() @ total
        into = heads[0] @ to.into + heads[1] @ total
    else:
        into = heads[0] @ to.into  # (L, C, D)
    state["to_shared.weight"] = rearrange(into, "l c d -> d (l c)").float()
    state["to_shared.bias"] = bias.float()
    state["to_offsets"] = torch.zeros_like(state["to_offsets"])
    state["w_avg"] = w_avg
    moved.load_state_dict(state)
    return moved


def fitted_mapping(generator: Generator, w: Tensor, steps: int, rng: torch.Generator) -> dict:
    """The state of a mapping network whose w are spread like the rows of w (N, D)."""
    config = generator.config
    mapping = MappingNetwork(config.z_dim, config.w_dim, config.mapping_layers)
    covariance = torch.cov(w.T.double())
    floor = 1e-6 * covariance.trace() / len(covariance) * torch.eye(len(covariance))
    root = torch.linalg.cholesky(covariance + floor).float()  # (D, D)
    variance, mean = covariance.trace().float(), w.mean(dim=0)
    plan = torch.randn(config.z_dim, config.w_dim, generator=rng) / config.z_dim**0.5
    if config.z_dim == config.w_dim:
        plan = torch.eye(config.w_dim)
    optimiser = torch.optim.Adam(mapping.parameters(), MAPPING_LR, (0.9, 0.99))
    for step in range(2 * steps):
        first = step < steps
        rate = 1 - (step % steps) / steps
        for group in optimiser.param_groups:
            group["lr"] = MAPPING_LR * rate * (1.0 if first else 0.3)
        z = torch.randn(BATCH, config.z_dim, generator=rng)
        made = mapping(z)
        if first:
            z = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True))
            loss = (made - mean - z @ plan @ root.T).square().sum(dim=1).mean() / variance
        else:
            rows = torch.randint(len(w), (BATCH,), generator=rng)
            loss = energy_distance(made, w[rows]) / variance.sqrt()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        mapping.w_avg.copy_(mapping(torch.randn(8192, config.z_dim, generator=rng)).mean(dim=0))
    return mapping.state_dict()


def moved(
    encoder: Encoder,
    generators: Sequence[Generator],
    offsets: Tensor,  # (N, L, D) of photos
    config: OneWConfig,
    rng: torch.Generator,
) -> tuple[list[Encoder | Generator], Tensor]:
    """All networks in the new w, and these of the photos (N, D)."""
    face, old = generators[0], generators[0].w_avg.clone()
    to = coordinates(offsets, principal_axes(face)[2].square().sum(), rng)
    w = torch.einsum("nld,lde->ne", offsets.double() - to.mean, to.into).float()  # (N, D)
    mapping = fitted_mapping(face, w, config.fit_steps, rng)
    networks: list[Encoder | Generator] = [moved_encoder(encoder, mapping["w_avg"], to)]
    finer = to
    if config.also and config.style_limit is not None:
        limit = StyleLimit(face, config.swap_resolution, config.style_limit)
        finer = fitted(limit(offsets + old) - old, w, to)
    for generator, its in zip(generators, [to, *[finer] * len(config.also)], strict=True):
        move_generator(generator, old, its, mapping)
        networks.append(generator)
    return networks, w


@torch.no_grad()
def centred(encoder: Encoder, w_avg: Tensor) -> None:
    """The same w+, as offsets from another w_avg. ValueError without one w for all layers."""
    if not encoder.config.shared:
        raise ValueError("--mapping-only is for an encoder of one w; leave it out once.")
    encoder.to_shared.bias.add_(encoder.w_avg - w_avg)
    encoder.w_avg.copy_(w_avg)


def refitted(
    encoder: Encoder,
    generators: Sequence[Generator],
    offsets: Tensor,
    config: OneWConfig,
    rng: torch.Generator,
) -> tuple[list[Encoder | Generator], Tensor]:
    """As `moved`, with another mapping network alone."""
    w = offsets.mean(dim=1) + generators[0].w_avg
    mapping = fitted_mapping(generators[0], w, config.fit_steps, rng)
    centred(encoder, mapping["w_avg"])
    for generator in generators:
        generator.mapping.load_state_dict(mapping)
    return [encoder, *generators], w


def run(config: OneWConfig) -> None:
    names = ("encoder", "generator", *(Path(name).stem for name in config.also))
    if len(set(names)) < len(names):
        raise ValueError(
            f"The files {', '.join(map(printable, names))} would have the same names in "
            f"{printable(config.target)}; give each --also a name of its own."
        )
    targets = [config.target / f"{name}.safetensors" for name in names]
    paths = [checkpoint.resolve(p) for p in (config.encoder, config.generator, *config.also)]
    for target in targets:
        may_write(target, config.overwrite, paths)
    encoder = checkpoint.load(paths[0], Encoder)
    generators = [checkpoint.load(path, Generator) for path in paths[1:]]
    face = generators[0]
    photos = first_pictures(open_dataset(config.data, face.resolution), config.images)
    with torch.no_grad():
        batches = [encoder(x) for b in photos.split(50) for x in (b, b.flip(-1))]
    offsets = torch.cat(batches)[:, : face.layers] - face.w_avg  # (2 N, L, D)
    torch.manual_seed(seed_of(config.seed, "weights"))
    rng = torch.Generator().manual_seed(seed_of(config.seed, "one w"))
    if config.mapping_only:
        networks, w = refitted(encoder, generators, offsets, config, rng)
    else:
        networks, w = moved(encoder, generators, offsets, config, rng)
    for path, target, network in zip(paths, targets, networks, strict=True):
        provenance = checkpoint.read_metadata(path)["provenance"] | {"one_w_of": str(len(w))}
        checkpoint.save(target, network, provenance=provenance)
        console.print(f"written: {printable(target)}")


def main(argv: Sequence[str] | None = None) -> int:
    return command(OneWConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
