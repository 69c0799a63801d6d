"""What the trainings of generators have in common: draws, data sets in turn, the moving average;
and super-resolution, the simplest of them.

    training = SuperresTraining(config, accelerator)
    training.step(0, meter)                        # draws, and lowers the losses
    generators.loop.run(training)

All that is random is a function of (seed, step, rank). Against a discriminator: `generators.gan`.
Shape letters: B batch, Z z dimension, R resolution.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from generators.data import first_pictures, open_dataset, random_batch, start_at
from generators.images import grid, resize
from generators.loop import Training
from generators.networks import adam, build, perceptual_network
from generators.options import PATCH, GeneratorOptions, SuperresOptions
from generators.runs import rows_of_rank, seed_of, step_generator
from generators.state import LossMeter, TrainingState
from generators.superres import patches, superres_terms


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


class GeneratorTraining(Training):
    """What all have in common: data sets in turn, the generator and its moving average."""

    config: GeneratorOptions
    changeable = (*Training.changeable, "images")
    averaged: ClassVar[tuple[str, ...]] = ("generator",)  # written at the end
    best_of = "kid"
    shown: ClassVar[tuple[str, ...]] = ("l1", "superres", "g", "d", "d_real", "d_fake", "ada_p")

    def __init__(self, config: GeneratorOptions, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.pictures = config.batch_size * accelerator.num_processes
        self.steps = -(-config.images // self.pictures)
        networks = {role: net.to(accelerator.device) for role, net in build(config).items()}
        self.generator = networks["generator"]
        resolution = getattr(self.generator, "resolution", config.side)  # a fine-tuned one's
        self.datasets = [open_dataset(data, size) for data, size in config.sources(resolution)]
        self.prepare(networks)
        self.state = TrainingState(
            accelerator, networks | self.counters(), self.optimisers(networks), self.averaged
        )
        self.average: Any = self.state.averages["generator"]
        self.outputs = dict(self.state.averages)
        if "discriminator" in networks:
            self.outputs["discriminator"] = networks["discriminator"]

    def prepare(self, networks: dict[str, Any]) -> None:
        """Before the moving average is copied."""

    def counters(self) -> dict[str, nn.Module]:
        """Running means and the like."""
        return {}

    def optimisers(self, networks: dict[str, Any]) -> dict[str, torch.optim.Adam]:
        raise NotImplementedError

    def draw(self, step: int) -> "Draw":
        """One global batch, of which each rank takes its rows; seeds the noise maps too.

        Of several data sets each step takes the next one in turn.
        """
        device, rank = self.accelerator.device, self.accelerator.process_index
        world = self.accelerator.num_processes
        torch.manual_seed(seed_of(self.config.seed, step, "network noise", rank))
        rng = step_generator(self.config.seed, step, "batch")
        dataset = self.datasets[step % len(self.datasets)]
        real = random_batch(dataset, self.pictures, rng, rank, world).to(device)
        return Draw(real, rng, rank, world)

    def batch(self, step: int) -> dict[str, Tensor]:
        return {"real": self.draw(step).real}

    def seek(self, step: int) -> None:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for i, dataset in enumerate(self.datasets):
            turns = max(0, -(-(step - i) // len(self.datasets)))
            start_at(dataset, turns * self.config.batch_size, rank, world, self.config.seed)

    def move_average(self, step: int) -> None:
        """From scratch with a ramp-up (Karras et al. 2020 ADA: 5 % of all that was seen)."""
        half_life = self.config.ema_images
        if self.config.init is None:
            half_life = min(half_life, 0.05 * (step + 1) * self.pictures)
        self.state.average(0.5 ** (self.pictures / half_life))

    def provenance(self) -> dict[str, str]:
        names = ", ".join(Path(data).name for data, _ in self.config.sources(0))
        return {"data": names, "trained_with": "generators.train"}


class SuperresTraining(GeneratorTraining):
    """Patches of one data set, and their copies of half the size."""

    config: SuperresOptions

    def __init__(self, config: SuperresOptions, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        weight = config.perceptual_weight
        self.perceptual = perceptual_network(config, weight, 2, accelerator.device)

    def optimisers(self, networks: dict[str, Any]) -> dict[str, torch.optim.Adam]:
        return {"generator": adam(networks["generator"], self.config.generator_lr, (0.9, 0.99))}

    def step(self, step: int, meter: LossMeter) -> None:
        draw = self.draw(step)
        high = patches(draw.real, min(PATCH, draw.real.shape[-1]), draw.own_rng())
        weight = self.config.perceptual_weight
        with self.accelerator.autocast():
            terms = superres_terms(self.generator, high, draw.own_rng(), self.perceptual, weight)
        self.accelerator.backward(terms["superres"])
        self.state.update("generator")
        meter.add(step, terms)
        self.move_average(step)

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        """Photos of each data set, bicubic and the network's result, in turn."""
        rows = []
        for dataset in self.datasets:
            high = resize(first_pictures(dataset, 4).to(self.accelerator.device), 128)
            low = resize(high, 64)
            result = self.average(low)
            rows.append(torch.stack([high, resize(low, 128), result], dim=1).flatten(0, 1))
        return grid(torch.cat(rows), columns=6)
