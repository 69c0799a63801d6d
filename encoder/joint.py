"""The generator's part of a training in which encoder and generator learn from the same pictures.

    joint = Joint(JointOptions(generator_lr=4e-4), generator)
    joint.add_discriminators(…)
    drawn = joint.draw(ws, rng)                          # reconstructions, and samples of the prior
    loss, parts = joint.terms(drawn, step, warmup)       # beside the losses of the reconstructions
    loss, parts = joint.judge(real, drawn, step, gamma)  # the discriminators' own

The generator decodes the encoder's w+ of real photos and goes on drawing from its prior. Two
discriminators look at both: one of frozen features, which alone wrinkles faces (Kynkäänniemi et al.
2022, arXiv:2203.06026, find that such features can be satisfied without better pictures), and a
small one of pixels.

Left to itself an encoder puts into each layer what that layer needs, far from any w of the mapping
network: then reconstructions teach the samples nothing, and fine-tunes of the generator cannot draw
at such w+. So three pulls bring the two together: w+ into the spread of w, the layers of one w+ to
their mean (Tov et al. 2021, arXiv:2102.02766, section 4.2), and the distribution of these means and
that of w to one another.

Shape letters: B batch, N samples of the prior, L layers of w+, D dimension of w, R resolution.
"""

import copy
from dataclasses import dataclass, field

import torch
import torch.distributed
from torch import Tensor, nn

from encoder.losses import LossNetworks, LossWeights
from generators import checkpoint
from generators.adversarial import (
    R1_INTERVAL,
    discriminator_loss,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    r1_penalty,
)
from generators.augment import diff_augment
from generators.blocks import freeze_generator
from generators.data import Pictures, first_pictures
from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.latents import mix_styles, principal_axes
from generators.projected import ProjectedConfig, ProjectedDiscriminator
from generators.runs import check_numbers
from generators.stylegan2 import Generator

SPREAD_INTERVAL = 256  # steps between two measurements of the axes of w
DEVIATIONS = 2.0  # of w along its axes that w+ may take at no cost
W_AVG_DECAY = 0.995  # per step, of the running mean of w
SPATIAL_DROP = 0.3  # of the reconstructions are drawn without a spatial code, as samples are
STYLE_MIXING = 0.9  # of the samples of the prior (Karras et al. 2019, section 3.1)
CALIBRATION = 256  # real pictures that set a new projected discriminator's scales
WIDTHS = (16, 32, 48, 64)  # of a new discriminator of pixels from R down; then 64


@dataclass(frozen=True)
class JointOptions:
    generator_lr: float = 0.0  # > 0: the generator learns too, its Adam at this rate or less
    freeze_generator_below: int = 0  # then: its mapping and blocks below this resolution stay
    spread_weight: float = 0.3  # then: of the pull of w+ into the region that z is mapped to
    layers_weight: float = 0.0  # then: of the pull of the layers of w+ to their mean
    match_weight: float = 0.0  # then: of the pull of such means and w to the same distribution
    spatial: int = 0  # then: channels of a spatial code that the generator gets, and that is learnt
    spatial_weight: float = 0.02  # then: of the code's mean square
    pixel_weight: float = 0.0  # then: of a small discriminator of pixels beside loss.adversarial
    pixel_discriminator: str | None = None  # to begin with, a .safetensors; None: a new one

    def __post_init__(self) -> None:
        names = ("generator_lr", "freeze_generator_below", "spread_weight", "layers_weight",
                 "match_weight", "spatial", "spatial_weight", "pixel_weight")  # fmt: skip
        check_numbers(self, {"of 0 or more": names})
        for name in ("pixel_weight", "spatial"):
            if getattr(self, name) and not self.generator_lr:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is for a generator that learns; give --generator-lr.")

    def check(self, loss: LossWeights, synthetic_fraction: float) -> None:
        """ValueError where a training's other options are for frozen generators alone."""
        if alone := set(loss.of_discriminator) - {"adversarial"}:
            raise ValueError(f"The loss {min(alone)} needs a frozen generator; leave it out.")
        if synthetic_fraction:
            raise ValueError(
                "Synthetic pairs need a frozen generator; give --synthetic-fraction 0."
            )


class Spread(nn.Module):
    """How far ws lie outside the region that a mapping network fills."""

    mean: Tensor
    axes: Tensor
    deviations: Tensor

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        names = ("mean", "axes", "deviations")
        for name, tensor in zip(names, principal_axes(generator), strict=True):
            self.register_buffer(name, tensor)

    def measure(self, generator: Generator) -> None:
        for own, now in zip(self.buffers(), principal_axes(generator), strict=True):
            own.copy_(now)

    def forward(self, ws: Tensor) -> Tensor:
        """ws (B, L, D) -> (B,): squared distance to the clip at DEVIATIONS along the axes, over
        the total variance of w; the mean over layers."""
        along = (ws.float() - self.mean) @ self.axes  # (B, L, D)
        bound = DEVIATIONS * self.deviations
        outside = along - along.clamp(-bound, bound)
        return outside.square().sum(dim=2).mean(dim=1) / self.variance

    @property
    def variance(self) -> Tensor:
        """Of w along all axes together, ()."""
        return self.deviations.square().sum()


@dataclass
class Drawn:
    """What one forward pass made."""

    ws: Tensor  # (B, L, D), the encoder's
    w: Tensor  # (N, D), of the prior
    images: Tensor  # (B, 3, R, R), reconstructions
    samples: Tensor  # (N, 3, R, R), of the prior
    rng: torch.Generator  # of the draws still to come
    seen: dict[str, list[Tensor]] = field(default_factory=dict)  # by each discriminator, detached

    @property
    def fakes(self) -> Tensor:
        """The samples, and reconstructions up to B."""
        return torch.cat([self.images[: len(self.images) - len(self.samples)], self.samples])


class Joint:
    """A generator that learns, its discriminators, and the spread of its w."""

    def __init__(
        self,
        options: JointOptions,
        generator: Generator,  # to begin with; is not changed
        adversarial: float = 0.0,  # weight of the discriminator of frozen features
    ) -> None:
        self.options = options
        self.weights = {"discriminator": adversarial, "pixel_discriminator": options.pixel_weight}
        self.generator = copy.deepcopy(generator).train().requires_grad_(True)
        if options.freeze_generator_below:  # so that fine-tunes still fit it
            freeze_generator(self.generator, options.freeze_generator_below)
        if options.spatial:
            self.generator.synthesis.get_submodule("b8.spatial").requires_grad_(True)
        self.spread = Spread(generator)
        self.modules: dict[str, nn.Module] = {"generator": self.generator, "spread": self.spread}
        self.optimisers: dict[str, torch.optim.Adam] = {
            "generator": torch.optim.Adam(
                [p for p in self.generator.parameters() if p.requires_grad],
                options.generator_lr,
                (0.0, 0.99),
            )
        }
        self.discriminators: dict[str, nn.Module] = {}
        self.learning: dict[str, nn.Module] = {}  # what of them is trained

    def add_discriminators(self, networks: LossNetworks, lr: float, dataset: Pictures) -> None:
        """Those with a weight, from their files or new; real pictures set the scales of a new
        projected one."""
        resolution, device = self.generator.resolution, self.generator.w_avg.device
        if self.weights["discriminator"]:
            if networks.discriminator is not None:
                projected = checkpoint.load(networks.discriminator, ProjectedDiscriminator)
            else:
                projected = ProjectedDiscriminator(ProjectedConfig(), networks.feature_weights)
                projected.calibrate(first_pictures(dataset, CALIBRATION))
            self.discriminators["discriminator"] = projected
            self.learning["discriminator"] = projected.heads
        if self.weights["pixel_discriminator"]:
            if self.options.pixel_discriminator is not None:
                pixels = checkpoint.load(self.options.pixel_discriminator, Discriminator)
            else:
                pixels = Discriminator(DiscriminatorConfig(resolution, widths=widths(resolution)))
            self.discriminators["pixel_discriminator"] = pixels
            self.learning["pixel_discriminator"] = pixels
        for name, network in self.discriminators.items():
            self.modules[name] = network.to(device).requires_grad_(False)
            self.optimisers[name] = torch.optim.Adam(
                self.learning[name].parameters(), lr, (0.0, 0.99)
            )

    def draw(self, ws: Tensor, rng: torch.Generator) -> Drawn:
        """Reconstructions of ws (B, L, D) and half as many samples of the prior with mixed styles,
        in one pass; moves the mean of w. No samples where nothing would look at them."""
        generator, options, found = self.generator, self.options, ws
        looked_at = self.discriminators or options.match_weight
        count = (len(ws) + 1) // 2 if looked_at or not options.freeze_generator_below else 0
        z = torch.randn(count, generator.z_dim, generator=rng)
        w = generator.mapping(z.to(ws.device))  # (N, D)
        if not options.freeze_generator_below:
            mean = w.detach().float().mean(dim=0)
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(mean)
                mean /= torch.distributed.get_world_size()
            generator.w_avg.lerp_(mean, 1 - W_AVG_DECAY)
        prior = generator.broadcast(w)
        prior = mix_styles(  # (N, L, D)
            prior, prior.roll(1, 0), STYLE_MIXING, rng, generator.layers
        )
        if generator.config.spatial:
            kept = torch.rand(len(ws), 1, 1, generator=rng) >= SPATIAL_DROP
            spatial = ws[:, generator.layers :] * kept.to(ws)
            ws = torch.cat([ws[:, : generator.layers], spatial], dim=1)
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))  # of the noise maps
        images = generator.synthesis(torch.cat([ws, prior.to(ws.dtype)]), "random")
        return Drawn(found, w, images[: len(ws)], images[len(ws) :], rng)

    def terms(self, drawn: Drawn, step: int, warmup: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, (), of the pulls and of what the discriminators say about fakes; and
        each of them. The discriminators' weight grows over the warm-up: new ones know nothing yet.
        """
        if step % SPREAD_INTERVAL == 0:
            self.spread.measure(self.generator)
        options, variance, layers = self.options, self.spread.variance, self.generator.layers
        ws, spatial = drawn.ws[:, :layers].float(), drawn.ws[:, layers:].float()
        means = ws.mean(dim=1)  # (B, D)
        parts = {
            "spread": self.spread(ws).mean(),
            "layers": (ws - means[:, None]).square().sum(dim=2).mean() / variance,
        }
        if len(drawn.w):
            parts["match"] = energy_distance(means, drawn.w.float()) / variance.sqrt()
        total = options.spread_weight * parts["spread"] + options.layers_weight * parts["layers"]
        if options.match_weight:
            total = total + options.match_weight * parts["match"]
        ramp = min(1.0, (step + 1) / max(warmup, 1))
        if spatial.shape[1]:
            parts["spatial"] = spatial.square().mean()
            total = total + options.spatial_weight * parts["spatial"]
        for name, network in self.discriminators.items():
            self.learning[name].requires_grad_(False)
            seen = self.look(network, drawn.fakes, drawn.rng)
            drawn.seen[name] = [part.detach() for part in seen]
            projected = isinstance(network, ProjectedDiscriminator)
            losses = hinge_generator_loss if projected else generator_loss
            parts[f"g_{name}"] = losses(self.logits(network, seen)).mean()
            total = total + ramp * self.weights[name] * parts[f"g_{name}"]
        return total, parts

    def judge(
        self, real: Tensor, drawn: Drawn, step: int, r1_gamma: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminators' losses, (), on real pictures (B, 3, R, R) against the fakes that they
        have just seen, that of pixels with lazy R1; and each of them. Gradients reach nothing
        else."""
        total, parts = real.new_zeros(()), {}
        for name, network in self.discriminators.items():
            self.learning[name].requires_grad_(True)
            projected = isinstance(network, ProjectedDiscriminator)
            losses = hinge_discriminator_loss if projected else discriminator_loss
            seen = self.look(network, real, drawn.rng)
            fake = self.logits(network, drawn.seen[name])
            parts[name] = losses(self.logits(network, seen), fake).mean()
            total = total + parts[name]
            if not projected and step % R1_INTERVAL == 0:
                picture = seen[0].detach().requires_grad_(True)
                parts["r1"] = r1_penalty(network(picture), picture).mean()
                total = total + r1_gamma * R1_INTERVAL * parts["r1"]
        return total, parts

    def look(self, network: nn.Module, images: Tensor, rng: torch.Generator) -> list[Tensor]:
        """What the trained part of a discriminator gets of pictures, augmented: maps, or them."""
        images = diff_augment(images, rng)
        if isinstance(network, ProjectedDiscriminator):
            return network.features(images)
        return [images]

    def logits(self, network: nn.Module, seen: list[Tensor]) -> Tensor:
        """(B, n), of what `look` gave."""
        return (
            network.judge(seen) if isinstance(network, ProjectedDiscriminator) else network(*seen)
        )


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """2 E|a - b| - E|a - a'| - E|b - b'|, (), of rows (B, D) and (N, D): 0 on average where both
    are of one distribution, more elsewhere (Székely & Rizzo 2013, eq. 5, pairs of other rows)."""
    between = torch.cdist(a, b).mean()
    within = [torch.cdist(x, x).sum() / max(len(x) * (len(x) - 1), 1) for x in (a, b)]
    return 2 * between - within[0] - within[1]


def widths(resolution: int) -> tuple[int, ...]:
    """Of a light discriminator of pixels, from 4 up to R."""
    count = resolution.bit_length() - 2
    return (WIDTHS + WIDTHS[-1:] * count)[:count][::-1]
