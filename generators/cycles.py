"""CycleGAN's training (Zhu et al. 2017, arXiv:1703.10593): photos to drawings and back, unpaired.

    training = CycleganTraining(config, accelerator)
    training.step(0, meter)                        # draws, and lowers the losses
    generators.loop.run(training)

Shape letters: B batch, R resolution, N patches of a picture.
"""

from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from generators.adversarial import least_squares_discriminator_loss, least_squares_generator_loss
from generators.cyclegan import PicturePool
from generators.data import PictureStream, first_pictures, random_batch, start_at
from generators.images import grid, labelled
from generators.networks import DISCRIMINATORS, adam
from generators.options import CycleganOptions
from generators.runs import rows_of_rank, seed_of, step_generator
from generators.state import LossMeter
from generators.steps import GeneratorTraining

ROWS = 8  # of the sheet


class CycleganTraining(GeneratorTraining):
    """The generator draws, the inverse takes photos of drawings; each has its discriminator."""

    config: CycleganOptions
    averaged = ("generator", "inverse")
    shown = ("cycle", "identity", "g", "d")

    def __init__(self, config: CycleganOptions, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        for dataset, (name, _) in zip(self.datasets, config.sources(0), strict=True):
            count = None if isinstance(dataset, PictureStream) else len(dataset)
            if count is not None and count < self.pictures:
                raise ValueError(
                    f"{name} has {count} pictures, fewer than the {self.pictures} of a step; give "
                    "more, or a smaller --batch-size."
                )
        self.inverse: Any = self.state.modules["inverse"]
        self.pools: list[Any] = [self.state.modules[f"pool of {name}"] for name in DISCRIMINATORS]
        self.judges: list[Any] = [self.state.modules[name] for name in DISCRIMINATORS]

    def counters(self) -> dict[str, nn.Module]:
        size, side = self.config.pool, self.generator.resolution
        pools = {f"pool of {name}": PicturePool(size, side) for name in DISCRIMINATORS}
        return {name: pool.to(self.accelerator.device) for name, pool in pools.items()}

    def optimisers(self, networks: dict[str, Any]) -> dict[str, torch.optim.Adam]:
        return {role: adam(networks[role], self.config.lr, (0.5, 0.999)) for role in networks}

    # ------------------------------------------------------------------------- draws

    def pair(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's photos and drawings of a step, (B, 3, R, R) each; they do not belong
        together."""
        device, rank = self.accelerator.device, self.accelerator.process_index
        world = self.accelerator.num_processes
        photos, drawings = (
            random_batch(
                dataset, self.pictures, step_generator(self.config.seed, step, name), rank, world
            ).to(device)
            for name, dataset in zip(("photos", "drawings"), self.datasets, strict=True)
        )
        return photos, drawings

    def batch(self, step: int) -> dict[str, Tensor]:
        photos, drawings = self.pair(step)
        return {"photos": photos, "drawings": drawings}

    def seek(self, step: int) -> None:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for i, dataset in enumerate(self.datasets):
            start_at(dataset, step * self.config.batch_size, rank, world,
                     seed_of(self.config.seed, i))  # fmt: skip

    # -------------------------------------------------------------------------- step

    def step(self, step: int, meter: LossMeter) -> None:
        """Both generators' step, then both discriminators' (Zhu et al. 2017, section 7.1)."""
        photos, drawings = self.pair(step)
        lr = self.config.lr_at(step * self.pictures)
        for optimiser in self.state.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = lr

        for judge in self.judges:
            judge.requires_grad_(False)
        with self.accelerator.autocast():
            logs, fakes = self.generator_terms(photos, drawings)
        self.accelerator.backward(logs["g"])
        self.state.update("generator")
        self.state.update("inverse")

        for judge in self.judges:
            judge.requires_grad_(True)
        logs["d"] = torch.zeros((), device=photos.device)
        for i, (judge, real, fake) in enumerate(
            zip(self.judges, (drawings, photos), fakes, strict=True)
        ):
            seen = self.from_pool(i, fake, step)
            with self.accelerator.autocast():
                losses = least_squares_discriminator_loss(judge(real), judge(seen))
            # halved: the discriminators are to learn more slowly (section 7.1)
            logs["d"] = logs["d"] + 0.5 * losses.mean()
        self.accelerator.backward(logs["d"])
        for name in DISCRIMINATORS:
            self.state.update(name)
        meter.add(step, logs)
        self.move_average(step)

    def generator_terms(
        self, photos: Tensor, drawings: Tensor
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """The terms of the generators' loss and, as "g", their weighted sum (Zhu et al. 2017,
        eq. 3, and the identity loss of section 5.2); the drawings and photos made, detached."""
        config = self.config
        drawn, drawings_kept = self.made(self.generator, photos, drawings)
        made, photos_kept = self.made(self.inverse, drawings, photos)
        as_drawing, as_photo = (
            least_squares_generator_loss(judge(fake)).mean()
            for judge, fake in zip(self.judges, (drawn, made), strict=True)
        )
        cycle = l1(self.inverse(drawn), photos) + l1(self.generator(made), drawings)
        terms = {"adversarial": as_drawing + as_photo, "cycle": cycle}
        total = terms["adversarial"] + config.cycle_weight * cycle
        if config.identity_weight:
            terms["identity"] = l1(drawings_kept, drawings) + l1(photos_kept, photos)
            total = total + config.identity_weight * terms["identity"]
        return terms | {"g": total}, (drawn.detach(), made.detach())

    def made(self, network: Any, source: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """What a network makes of `source` and, where that is to stay as it is, of its own domain,
        in one pass; (B, 3, R, R) each."""
        if not self.config.identity_weight:
            return network(source), own
        translated, kept = network(torch.cat([source, own])).chunk(2)
        return translated, kept

    def from_pool(self, which: int, fakes: Tensor, step: int) -> Tensor:
        """This rank's share of what a discriminator sees: the pool is that of all processes."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        rng = step_generator(self.config.seed, step, f"pool {which}")
        whole = self.accelerator.gather(fakes)
        seen = self.pools[which](whole, step * self.pictures, rng)
        return rows_of_rank(seen, rank, world)

    # ------------------------------------------------------------------------- sheet

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        """By the averages, always the same pictures: photo, drawing, photo again; and drawing,
        photo, drawing again."""
        draw, undo = (self.state.averages[name] for name in self.averaged)
        photos, drawings = (
            first_pictures(dataset, ROWS).to(self.accelerator.device) for dataset in self.datasets
        )
        rows = min(len(photos), len(drawings))
        photos, drawings = photos[:rows], drawings[:rows]
        drawn, made = draw(photos), undo(drawings)
        columns = torch.stack([photos, drawn, undo(drawn), drawings, made, draw(made)], dim=1)
        names = ("photo", "drawing", "cycle")
        return labelled(grid(columns.flatten(0, 1), columns=6), (*names, *names[1::-1], names[2]))


def l1(made: Tensor, wanted: Tensor) -> Tensor:
    return (made - wanted).abs().mean()
