"""Judges of drawn faces: a detector, a network that knows damaged drawings, what is kept.

    python benchmarks/drawn.py --data anime/train.parquet --output judge.safetensors
    python benchmarks/translation.py … --detector-cascade lbpcascade_animeface.xml \\
        --judge judge.safetensors

The network tells sound drawings from damaged copies of them. It sees what a person sees at once and
feature distances do not: one eye of two gone, paler, of another size or of another face; features
smeared or out of place. It learns from drawings alone, nothing that a generator has made, so no
generator can have learnt to please it. Sound drawings get harmless changes, which the damaged ones
get too: colours, softness, noise, both eyes repainted alike, so that neither blur nor a seam tells.
Every tenth drawing is held back; `thresholds` are where a third of those would be called damaged:
hair over an eye, a profile, a wink.

Shape letters: B batch, N pictures, R resolution.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.align import Aligner
from encoder.attributes import CHEEKS, HAIR, median_colour, points_of
from encoder.metrics import LUMA
from encoder.prepare.crops import cascade
from encoder.retouch.mouths import mouths_of
from generators import checkpoint
from generators.command import command, console
from generators.data import PictureStream, first_pictures, open_dataset
from generators.disk import may_write
from generators.images import resize, to_pil
from generators.runs import progress, seed_of

EYES = (-0.32, 0.02), (0.32, 0.02)  # x, y in [-1, 1], where a face detector's crops have them
HELD_BACK = 10  # every tenth
REFUSED = 0.35  # of the drawings held back; a milder judge hardly tells good from very good
SEARCHED, BORDER, AGREEING = 192, 48, 10  # pixels; windows that agree: with 5 photos pass, too
DRAWN_MOUTH = (38, 46, 27, 37)  # rows and columns in 64ths, as HAIR and CHEEKS


@dataclass(frozen=True)
class JudgeConfig:
    resolution: int = 64  # side in pixels at which it looks
    widths: tuple[int, ...] = (24, 48, 64, 96)

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # a list when read from JSON


class Judge(nn.Module):
    """Drawings (B, 3, R, R) -> logits (B, 2): two like eyes, features in one piece. It sees each
    picture beside its mirror image, so that the two eyes meet in the first convolution."""

    kind: ClassVar = "drawn_judge"
    config_class: ClassVar = JudgeConfig
    thresholds: Tensor

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = 6
        for width in config.widths:
            layers += [nn.Conv2d(before, width, 4, 2, 1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)]
            before = width
        side = config.resolution >> len(config.widths)
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.out = nn.Sequential(
            nn.Linear(before * side**2, 128), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(128, 2)
        )
        self.register_buffer("thresholds", torch.zeros(2))

    def forward(self, images: Tensor) -> Tensor:
        x = resize(images, self.config.resolution)
        x = torch.cat([x, x.flip(-1)], dim=1).contiguous(memory_format=torch.channels_last)
        return self.out(self.layers(x))

    @torch.inference_mode()
    def passes(self, images: Tensor) -> Tensor:
        """(N, 3, R, R) -> bool (N, 2): like eyes, features in one piece."""
        logits = [self(batch.to(self.thresholds.device)) for batch in images.split(100)]
        return (torch.cat(logits) > self.thresholds).cpu()


def detected(images: Tensor, file: Path) -> float:
    """The share of (N, 3, R, R) in which an OpenCV cascade finds a face."""
    detect = cascade(file, AGREEING)
    wide = F.pad(resize(images, SEARCHED), (BORDER,) * 4, mode="replicate")
    return sum(bool(detect(to_pil(image))) for image in wide) / len(wide)


def colours_kept(
    photos: Tensor, drawings: Tensor, place: tuple[int, int, int, int] = HAIR
) -> dict[str, float]:
    """How the hair, or another place, of (N, 3, R, R) follows the photo's, over people: the
    correlation of lightness and of tint (colour less lightness), and the slope of lightness,
    without which drawings of almost equal colours could correlate."""
    top, bottom, left, right = place

    def measured(images: Tensor) -> tuple[Tensor, Tensor]:
        there = resize(images, 64, "area")[:, :, top:bottom, left:right]
        colours = there.mean(dim=(2, 3))  # (N, 3)
        colours = colours - colours.mean(dim=0)
        lightness = (colours * colours.new_tensor(LUMA)).sum(dim=1, keepdim=True)  # (N, 1)
        return lightness, colours - lightness

    (light, tint), (drawn_light, drawn_tint) = measured(photos), measured(drawings)
    slope = (light * drawn_light).sum() / light.square().sum().clamp(min=1e-8)
    return {
        "lightness": correlation(light, drawn_light),
        "lightness_slope": float(slope),
        "tint": correlation(tint, drawn_tint),
    }


def opened(photos: Tensor, aligner: Aligner) -> tuple[Tensor, Tensor]:
    """How open the mouths of photos (N, 3, R, R) are, (N) from 0 to 1, and where a face is seen."""
    batches = [mouths_of(batch, *points_of(batch, aligner)) for batch in photos.cpu().split(32)]
    found = torch.cat([mouths.found for mouths in batches])
    return torch.cat([mouths.open for mouths in batches]), found


def laughs_kept(mouths: tuple[Tensor, Tensor], drawings: Tensor) -> float:
    """The correlation, over people, of open mouths and of drawings (N, 3, R, R) that are redder
    where theirs is than on their cheeks."""
    wide, found = mouths
    top, bottom, left, right = DRAWN_MOUTH
    small = resize(drawings, 64, "area")
    change = small[:, :, top:bottom, left:right] - median_colour(small, CHEEKS)
    red = (change[:, 0] - change[:, 1]).mean(dim=(1, 2))
    wide, red = wide[found], red.to(wide)[found]
    return correlation(wide - wide.mean(), red - red.mean())


def correlation(a: Tensor, b: Tensor) -> float:
    """Of deviations from the mean."""
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-3))


# --------------------------------------------------------------------- what can go wrong


class Chance:
    """Numbers and maps for a batch, from one stream."""

    def __init__(self, batch: int, side: int, seed: int) -> None:
        self.batch, self.side = batch, side
        self.rng = torch.Generator().manual_seed(seed)
        line = torch.linspace(-1, 1, side)
        self.places = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)  # (R, R, 2)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """(B, *shape), of shape (B, 1, 1, 1) unless given."""
        drawn = torch.rand(self.batch, *(shape or (1, 1, 1)), generator=self.rng)
        return low + (high - low) * drawn

    def yes(self, probability: float) -> Tensor:
        return self.between(0, 1) < probability

    def one_of(self, pictures: list[Tensor]) -> Tensor:
        """Another of these (B, 3, R, R) for each row."""
        chosen = torch.randint(len(pictures), (self.batch,), generator=self.rng)
        return torch.stack(pictures)[chosen, torch.arange(self.batch)]

    def spot(self, centre: Tensor, radius: Tensor) -> Tensor:
        """Soft ellipses (B, 1, R, R) in [0, 1]; centre and radius (B, 1, 1, 2)."""
        distance = ((self.places - centre) / radius).norm(dim=-1)[:, None]
        return torch.sigmoid(8 * (1 - distance))

    def fetch(self, images: Tensor, offset: Tensor) -> Tensor:
        """images at each place plus offset, (B, R, R, 2) or less."""
        places = (self.places + offset).expand(self.batch, self.side, self.side, 2)
        return F.grid_sample(images, places, padding_mode="reflection", align_corners=True)

    def repaint(self, images: Tensor, strength: float) -> Tensor:
        """Other contrast, lightness and saturation, and the colours turned."""
        grey = images.mean(dim=1, keepdim=True)
        turn = torch.softmax(self.between(-2, 2, 3, 3) * strength + 2 * torch.eye(3), dim=-1)
        turned = torch.einsum("bij,bjhw->bihw", turn, images - grey)
        light = grey * self.between(1 - strength, 1) + self.between(-strength, strength) * 0.6
        return (light + turned * self.between(1 - strength, 1 + strength)).clamp(-1, 1)


def soft(images: Tensor, side: int) -> Tensor:
    return resize(resize(images, side), images.shape[-1])


def harmless(images: Tensor, chance: Chance) -> Tensor:
    """Colours, softness, sharpness and noise as drawings have them anyway."""
    x = torch.where(chance.yes(0.7), chance.repaint(images, 0.3), images)
    blurred = soft(x, int(chance.side * (0.4 + 0.4 * float(chance.between(0, 1)[0]))))
    x = x + chance.between(-1, 0.8) * (x - blurred)  # -1: soft; above 0: sharpened
    noise = torch.randn(x.shape, generator=chance.rng) * chance.between(0, 0.08)
    return (x + noise * chance.yes(0.5)).clamp(-1, 1)


def eyes_changed(images: Tensor, chance: Chance, alike: bool) -> Tensor:
    """One eye gone, pale, blotted, another's, larger or smaller, elsewhere, of another colour; or,
    `alike`, both in the same way, where that leaves two eyes alike."""
    left, right = (torch.tensor(eye) + chance.between(-0.07, 0.07, 1, 1, 2) for eye in EYES)
    first = torch.where(chance.yes(0.5), left, right)
    radius = chance.between(0.17, 0.3, 1, 1, 2)
    zoom = torch.where(chance.yes(0.5), chance.between(0.55, 0.8), chance.between(1.3, 1.8))
    strange = chance.repaint(images, 0.9)
    if alike:
        mirrored = images.flip(-1)  # the other eye, turned round
        spots = [chance.spot(centre, radius) for centre in (left, right)]
        changed = chance.one_of([strange, mirrored])
        both = torch.where(chance.yes(0.5), spots[0], spots[1])  # of the mirrored: either one
        where = torch.where((changed == mirrored).all(dim=1, keepdim=True), both, sum(spots))
        return images.lerp(changed, where.clamp(0, 1))
    gone = soft(images, 6)
    shift = torch.stack([chance.between(-0.1, 0.1, 1, 1), chance.between(0.12, 0.25, 1, 1)], dim=-1)
    changed = chance.one_of([
        gone,
        images.lerp(gone, chance.between(0.6, 1)),
        (0.3 * gone - chance.between(0.3, 0.8)).clamp(-1, 1),
        images.roll(1, 0),
        chance.fetch(images, (chance.places - first) * (1 / zoom - 1)),
        chance.fetch(images, torch.where(chance.yes(0.5), shift, -shift)),
        strange,
    ])  # fmt: skip
    return images.lerp(changed, chance.spot(first, radius))


def features_changed(images: Tensor, chance: Chance) -> Tensor:
    """Part of the face smeared, bent, doubled or another's."""
    middle = chance.between(-0.45, 0.45, 1, 1, 2) + torch.tensor([0.0, 0.15])
    angle = chance.between(0, math.pi, 1, 1)
    along = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (B, 1, 1, 2)
    steps = (-0.25, -0.125, 0, 0.125, 0.25)
    smear = torch.stack([chance.fetch(images, along * step) for step in steps]).mean(dim=0)
    bend = resize(chance.between(-1, 1, 2, 5, 5), chance.side).permute(0, 2, 3, 1)
    bent = chance.fetch(images, 0.28 * bend)
    doubled = images.lerp(chance.fetch(images, 0.2 * along), 0.5)
    changed = chance.one_of([smear, bent, doubled, bent, images.roll(1, 0)])
    return images.lerp(changed, chance.spot(middle, chance.between(0.25, 0.6, 1, 1, 2)))


def lesson(images: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pictures, wanted, asked): sound ones, and of the same drawings with an eye or with features
    changed; wanted and asked (3 B, 2): of a damage of one kind the other logit is not asked."""
    chance = Chance(len(images), images.shape[-1], seed)
    sound = torch.where(chance.yes(0.5), eyes_changed(images, chance, alike=True), images)
    made = [sound, eyes_changed(images, chance, alike=False), features_changed(images, chance)]
    wanted = torch.tensor([[1.0, 1], [0, 0], [0, 0]]).repeat_interleave(len(images), dim=0)
    asked = torch.tensor([[1.0, 1], [1, 0], [0, 1]]).repeat_interleave(len(images), dim=0)
    return torch.cat([harmless(x, chance) for x in made]), wanted, asked


# ------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Config:
    data: str  # drawings framed by a face detector, anything `open_dataset` reads
    output: Path  # .safetensors
    overwrite: bool = False  # replace it
    steps: int = 2000
    batch_size: int = 24  # drawings; each is seen three times
    lr: float = 2e-3
    seed: int = 0


def train(config: Config) -> Judge:
    """A judge of the drawings' damages; its thresholds are of those held back, unchanged."""
    torch.manual_seed(seed_of(config.seed, "judge"))
    judge = Judge(JudgeConfig()).to(memory_format=torch.channels_last)
    dataset = open_dataset(config.data, judge.config.resolution)
    if isinstance(dataset, PictureStream):
        raise ValueError("Of a stream no tenth can be held back; give a folder or parquet files.")
    drawings = first_pictures(dataset, len(dataset))
    held_back = torch.arange(len(drawings)) % HELD_BACK == 0
    drawings, test = drawings[~held_back], drawings[held_back]
    optimiser = torch.optim.AdamW(judge.parameters(), config.lr, (0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, config.steps)
    rng = torch.Generator().manual_seed(seed_of(config.seed, "drawings"))
    with progress(config.steps, 0, True, "steps") as advance:
        for step in range(config.steps):
            chosen = drawings[torch.randint(len(drawings), (config.batch_size,), generator=rng)]
            pictures, wanted, asked = lesson(chosen, seed_of(config.seed, step))
            losses = F.binary_cross_entropy_with_logits(judge(pictures), wanted, reduction="none")
            loss = (losses * asked).sum() / asked.sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if step % 50 == 0:
                advance(step, loss=loss.item())
    judge.eval()
    with torch.inference_mode():
        logits = torch.cat([judge(batch) for batch in test.split(100)])
        judge.thresholds.copy_(logits.quantile(REFUSED, dim=0))
        pictures, wanted, asked = lesson(test, seed_of(config.seed, "test"))
        passed = judge.passes(pictures).float()
    for i, name in enumerate(("eyes", "features")):
        sound, damaged = (passed[(wanted[:, i] == x) & (asked[:, i] == 1), i] for x in (1, 0))
        console.print(f"{name}: {sound.mean():.3f} of the sound pass, {damaged.mean():.3f} of the "
                      "damaged")  # fmt: skip
    return judge


def run(config: Config) -> None:
    may_write(config.output, config.overwrite)
    judge = train(config)
    checkpoint.save(config.output, judge, provenance={"data": Path(config.data).name}, half=True)


def main(argv: Sequence[str] | None = None) -> int:
    return command(Config, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
