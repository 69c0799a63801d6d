"""One training step of each architecture: draw, lower the losses, return them.

    logs = STEPS[config.architecture](config, players, datasets, step, accelerator)

All that is random is a function of (seed, step, rank). Shape letters: B batch, L layers of w+, Z z
dimension, D w dimension, R resolution, N logits of a picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor

from generators.adversarial import (
    discriminator_loss,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    path_length,
    path_length_penalty,
    r1_penalty,
)
from generators.augment import ada_augment, diff_augment
from generators.data import Pictures, random_batch
from generators.dcgan import with_noise
from generators.features import FeaturePyramid, perceptual_distance
from generators.players import PATH_INTERVAL, R1_INTERVAL, GanTrainConfig, Players
from generators.projected import ProjectedDiscriminator
from generators.runs import average_gradients, rows_of_rank, seed_of, step_generator
from generators.stylegan2 import Generator, mix_styles
from generators.superres import patches, superres_terms
from generators.warmup import kl_to_prior

W_AVG_DECAY = 0.995  # per step, of the running mean of w
ADA_INTERVAL = 4  # steps between the controller's decisions (Karras et al. 2020 ADA, section 3.1)
PATCH = 96  # side of the pictures that super-resolution is trained on, where they are as large
Step = Callable[[GanTrainConfig, Players, Sequence[Pictures], int, Accelerator], dict[str, Tensor]]


@dataclass
class Draw:
    """What one rank gets to see in one step; a function of (seed, step, rank) alone."""

    real: Tensor  # (B, 3, R, R) in [-1, 1]
    rng: torch.Generator  # of the step, in the same state in every process
    rank: int
    world: int

    def own_rng(self) -> torch.Generator:
        """The next stream of the step that is this rank's own."""
        draw = int(torch.randint(2**62, (), generator=self.rng))
        return torch.Generator().manual_seed(seed_of(draw, self.rank))

    def z(self, generator: Any) -> Tensor:
        """The rank's share of latents for the global batch, (B, Z)."""
        z = torch.randn(len(self.real) * self.world, generator.z_dim, generator=self.rng)
        return rows_of_rank(z, self.rank, self.world).to(self.real.device)


def draw_step(
    config: GanTrainConfig, datasets: Sequence[Pictures], step: int, accelerator: Accelerator
) -> Draw:
    """One global batch, of which each rank takes its rows; seeds the noise maps too.

    Of several data sets each step takes the next one in turn.
    """
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    torch.manual_seed(seed_of(config.seed, step, "network noise", rank))
    rng = step_generator(config.seed, step, "batch")
    dataset = datasets[step % len(datasets)]
    real = random_batch(dataset, config.batch_size * world, rng, rank, world).to(device)
    return Draw(real, rng, rank, world)


# ------------------------------------------------------------------------ adversarial


def gan_step(
    config: GanTrainConfig,
    players: Players,
    datasets: Sequence[Pictures],
    step: int,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """The generator's step, then the discriminator's if it plays already."""
    draw = draw_step(config, datasets, step, accelerator)
    seen = step * config.batch_size * accelerator.num_processes
    weight = config.adversarial_weight_at(seen)
    for group in players.optimisers["generator"].param_groups:
        group["lr"] = config.generator_lr_at(seen)
    logs, view = generator_step(config, players, draw, seen, weight, accelerator)
    if "path" in players.state and step % PATH_INTERVAL == 0 and weight:
        logs |= path_length_step(config, players, draw, accelerator)
    update(players, "generator", accelerator)
    if players.variational is not None and config.reconstructs_at(seen):
        update(players, "variational", accelerator)
    if weight:
        logs |= discriminator_step(config, players, draw, view, step, accelerator)
    return logs


def generator_step(
    config: GanTrainConfig,
    players: Players,
    draw: Draw,
    seen: int,
    weight: float,
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Gradients of the reconstruction through the variational encoder, and of the adversarial loss
    of this `weight`, on reconstructions and samples. Returns the losses, and what the discriminator
    saw of the fakes; nothing for a weight of 0."""
    generator, variational, real = players.generator, players.variational, draw.real
    logs: dict[str, Tensor] = {}
    view: list[Tensor] = []
    z = draw.z(generator)
    players.train_discriminator(False)
    with accelerator.autocast():
        loss = torch.zeros((), device=real.device)
        if variational is not None and config.reconstructs_at(seen):
            if weight:  # one pass for half a batch of reconstructions and half of samples
                half = max(len(real) // 2, 1)
                real, z = real[:half], z[half:]
            mean, log_variance = variational(real)
            code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            code = torch.cat([code, z]) if weight else code
            fake = synthesise(config, players, code, draw, unmixed=len(real))
            logs |= reconstruction_terms(
                config, real, fake[: len(real)], mean, log_variance, players.perceptual
            )
            loss = loss + config.reconstruction_weight * logs["reconstruction"]
        elif weight:
            fake = synthesise(config, players, z, draw)
        if weight:
            view = look(config, players, draw, fake)
            losses = hinge_generator_loss if config.judge == "projected" else generator_loss
            logs["g"] = losses(judge(players.discriminator, view)).mean()
            loss = loss + weight * logs["g"]
    accelerator.backward(loss)
    return logs, [part.detach() for part in view]


def discriminator_step(
    config: GanTrainConfig,
    players: Players,
    draw: Draw,
    fake: list[Tensor],
    step: int,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Real against the fakes it has just seen; a residual one with lazy R1, a projected one with
    the hinge loss. Returns the losses."""
    discriminator, logs = players.discriminator, {}
    players.train_discriminator(True)
    with accelerator.autocast():
        real_logits = judge(discriminator, look(config, players, draw, draw.real))
        fake_logits = judge(discriminator, fake)
        if config.judge == "projected":
            losses = hinge_discriminator_loss(real_logits, fake_logits)
        else:
            smoothing = config.label_smoothing if config.judge == "dcgan" else 0.0
            losses = discriminator_loss(real_logits, fake_logits, smoothing)
        logs["d"] = losses.mean()
        logs["d_real"], logs["d_fake"] = real_logits.mean(), fake_logits.mean()
    accelerator.backward(logs["d"])
    if config.judge == "residual" and step % R1_INTERVAL == 0:
        picture = augmented(config, players, draw, draw.real).requires_grad_(True)
        logs["r1"] = r1_penalty(discriminator(picture), picture).mean()
        accelerator.backward(logs["r1"] * config.r1_gamma * R1_INTERVAL)
    update(players, "discriminator", accelerator)
    if "ada" in players.state:
        controller: Any = players.state["ada"]
        controller.observe(real_logits, draw.world)
        if (step + 1) % ADA_INTERVAL == 0:
            controller.update()
        logs["ada_p"] = controller.p
    return logs


def path_length_step(
    config: GanTrainConfig, players: Players, draw: Draw, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Adds the gradients of the path-length penalty on half a batch (Karras et al. 2020, section
    3.2; lazily, appendix B)."""
    generator, running = players.generator, players.state["path"]
    z = draw.z(generator)[: max(len(draw.real) // 2, 1)]
    with accelerator.autocast():
        ws = generator.mapping(z)[:, None].expand(-1, generator.num_ws, -1)
        images = generator.synthesis(ws, "random")
        lengths = path_length(images, ws, torch.randn_like(images))
    mean = lengths.detach().mean()
    if draw.world > 1:
        mean = accelerator.reduce(mean, "mean")
    running.update(mean)  # type: ignore[operator]
    penalty = path_length_penalty(lengths, running.mean).mean()  # type: ignore[arg-type]
    accelerator.backward(config.path_length_weight * PATH_INTERVAL * penalty)
    return {"path": mean}


def synthesise(
    config: GanTrainConfig, players: Players, z: Tensor, draw: Draw, unmixed: int = 0
) -> Tensor:
    """z (B, Z) -> images (B, 3, R, R) with random noise maps; moves the mean of w. All but the
    first `unmixed` get style mixing, and the second half of them given latents in place of z."""
    generator = players.generator
    if not isinstance(generator, Generator):
        return generator(z)
    w = generator.mapping(z)  # (B, D)
    if not config.freeze_generator_below:
        mean = w.detach().float().mean(0)
        if draw.world > 1:
            torch.distributed.all_reduce(mean)
            mean /= draw.world
        generator.w_avg.lerp_(mean, 1 - W_AVG_DECAY)
    ws = w[:, None].expand(-1, generator.num_ws, -1)  # (B, L, D)
    if config.style_mixing:
        mixed = mix_styles(ws, ws.roll(1, 0), config.style_mixing, draw.own_rng())
        ws = torch.cat([ws[:unmixed], mixed[unmixed:]])
    if players.latents is not None:
        count = (len(ws) - unmixed) // 2
        chosen = torch.randint(len(players.latents), (count,), generator=draw.own_rng())
        given = players.latents[chosen.to(ws.device)].to(ws.dtype)
        ws = torch.cat([ws[: len(ws) - count], given])
    return generator.synthesis(ws, "random")


def look(config: GanTrainConfig, players: Players, draw: Draw, images: Tensor) -> list[Tensor]:
    """What the discriminator's trained part gets of pictures: them, augmented, or their maps."""
    seen = augmented(config, players, draw, images)
    discriminator = players.discriminator
    projected = isinstance(discriminator, ProjectedDiscriminator)
    return discriminator.features(seen) if projected else [seen]


def judge(discriminator: Any, view: list[Tensor]) -> Tensor:
    """The logits (B, N) of what `look` returned."""
    projected = isinstance(discriminator, ProjectedDiscriminator)
    return discriminator.judge(view) if projected else discriminator(view[0])


def augmented(config: GanTrainConfig, players: Players, draw: Draw, images: Tensor) -> Tensor:
    """Each call with a draw of its own."""
    if config.augment == "diffaugment":
        images = diff_augment(images, draw.own_rng())
    elif config.augment == "ada":
        strength: Any = players.state["ada"].p
        images = ada_augment(images, strength, draw.own_rng())
    if config.judge == "dcgan" and config.input_noise:
        images = with_noise(images, config.input_noise, draw.own_rng())
    return images


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


# -------------------------------------------------------------------- super-resolution


def superres_step(
    config: GanTrainConfig,
    players: Players,
    datasets: Sequence[Pictures],
    step: int,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Patches of one data set, and their copies of half the size."""
    draw = draw_step(config, datasets, step, accelerator)
    high = patches(draw.real, min(PATCH, draw.real.shape[-1]), draw.own_rng())
    weight = config.superres_perceptual_weight
    with accelerator.autocast():
        terms = superres_terms(players.generator, high, draw.own_rng(), players.perceptual, weight)
    accelerator.backward(terms["superres"])
    update(players, "generator", accelerator)
    return terms


def update(players: Players, role: str, accelerator: Accelerator) -> None:
    """One step of a network with its gradients' mean over processes."""
    average_gradients(players.trained[role], accelerator.num_processes)
    players.prepared[role].step()
    players.prepared[role].zero_grad()


STEPS: dict[str, Step] = {"stylegan2": gan_step, "dcgan": gan_step, "superres": superres_step}
