"""What a training shows of itself: sample sheets, and scores on held-out pictures.

    sheet(players, datasets, seed).save("step-00001000.png")
    scores = Scores(config, resolution, device)
    scores(players.average)      # {"fd": …, "kid": …, "kid_std": …}

Shape letters: B batch, N pictures, R resolution, F features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from generators.data import Pictures, first_pictures, open_dataset
from generators.distances import (
    draw,
    feature_space,
    frechet_distance,
    kernel_distance,
    pooled_features,
    truncation_curve,
)
from generators.images import grid, resize
from generators.players import GanTrainConfig, Players
from generators.runs import step_generator
from generators.superres import SuperResolution

SHEET = 36  # samples


@torch.no_grad()
def sheet(players: Players, datasets: Sequence[Pictures], seed: int) -> Image.Image:
    """36 samples at truncation 0.8, under 6 photos beside their reconstructions
    where there is a variational encoder. Of super-resolution photos, bicubic and its result, in
    turn. Photos and draws are always the same."""
    average, rows = players.average, []
    device = next(average.parameters()).device
    if isinstance(average, SuperResolution):
        for dataset in datasets:
            high = resize(first_pictures(dataset, 4).to(device), 128)
            low = resize(high, 64)
            rows.append(torch.stack([high, resize(low, 128), average(low)], dim=1).flatten(0, 1))
        return grid(torch.cat(rows), columns=6)
    if players.variational is not None:
        photos = first_pictures(datasets[0], 6).to(device)
        again = average(players.variational.eval()(photos)[0])
        players.variational.train()
        rows.append(torch.stack([photos, again], dim=1).flatten(0, 1))
    z = torch.randn(SHEET, average.z_dim, generator=step_generator(seed, 0, "samples")).to(device)
    rows.append(average(z, truncation=0.8))
    return grid(torch.cat(rows), columns=12)


class Scores:
    """FD and KID of a generator to held-out pictures, whose features are computed once."""

    def __init__(self, config: GanTrainConfig, resolution: int, device: torch.device) -> None:
        assert config.eval_data is not None
        held_out = first_pictures(open_dataset(config.eval_data, resolution), config.eval_samples)
        self.config, self.device = config, device
        self.space = feature_space(config.eval_space).to(device)
        self.real = pooled_features(self.space, held_out, device=device)

    def __call__(self, generator: Any) -> dict[str, float]:
        """Of always the same latents."""
        images = draw(generator, self.config.eval_samples, seed=1)
        fake = pooled_features(self.space, images, device=self.device)
        kid, spread = kernel_distance(self.real, fake, subsets=20)
        return {"fd": frechet_distance(self.real, fake), "kid": kid, "kid_std": spread}

    def at_the_end(self, generator: Any) -> list[dict[str, float]]:
        """FD, KID, precision and recall by truncation."""
        return truncation_curve(
            generator, self.space, self.real, samples=self.config.eval_samples, seed=1
        )
