"""A drawing as the palette: the photo gives pose, outline and expression, a drawing the colours.

    python infer.py --input photos/ --output out/ --reference drawing.png
    python infer.py --input photos/ --output out/ --reference drawings/ --seed 1   # one per photo

    codes, error = invert(translator, drawings)           # (B, D), (B,) of drawings (B, 3, R, R)
    references = References.read("drawings/", translator, photos)   # `photos`: their names
    pictures = translator.drawings(ws, drawing_ws=references.mixed(ws, photos))

The blocks that draw read a w of their own (style mixing: Karras et al. 2019, arXiv:1812.04948,
section 3.1). For a given drawing it is searched in the very network that will draw, as two w: one
of the early blocks, which holds the drawing's own pose and is forgotten, one of the blocks that
draw. Compared are 8 x 8 colours, not pixels, which would blur what the search cannot place; and
both w start at what the photos' encoder sees in the drawing, and are pulled towards it, so that
they stay where w of photos lie, and the blocks draw soundly.

A picture of something else is refused: what the encoder's backbone sees in it lies too far from
what it sees in the style's own samples (a Gaussian of features: Lee et al. 2018, arXiv:1807.03888,
section 2.1, of one class).

Shape letters: B batch, L layers of w+, D dimension of w, R resolution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from encoder.branches import DENSE_SIDE, pool
from encoder.optimisers import Lbfgs
from encoder.pipeline import Translator
from generators.blocks import SwappedSynthesis
from generators.command import printable
from generators.images import find_images, fit, open_image, resize, to_float
from generators.latents import principal_axes
from generators.palette import colours
from generators.runs import seed_of
from generators.stylegan2 import broadcast

STEPS = 30  # looks at a drawing
PULL = 0.01  # towards what the encoder sees, per squared standard deviation of w
LARGEST_ERROR = 0.4  # of 48 drawings 0.28 at the 99th percentile, see benchmarks/LOG.md
LEAST_VARIANCE = 1e-3  # that counts as one: a blank picture has none
LARGEST_STRANGENESS = 4.7  # of training drawings 98 % are below, see benchmarks/LOG.md
SAMPLES = 256  # of the style, that strangeness is measured by
TRUNCATION = 0.8  # of theirs
SHRINKAGE = 0.5  # of their features' correlations (Ledoit & Wolf 2004)
LONGEST = 1.5  # times the shorter side: a longer picture is not a head alone
BATCH = 16


# ---------------------------------------------------------------------------- the search


def invert(translator: Translator, images: Tensor) -> tuple[Tensor, Tensor]:
    """Drawings (B, 3, R, R) in [-1, 1] -> w of the blocks that draw (B, D), and the share (B,) of
    the variance of a drawing's 8 x 8 colours that is missed, 0: none, above 1: a plain area would
    be nearer. Drawings do not influence each other."""
    with torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().to(translator.device)
        target, network, face = colours(images), in_fp32(translator), translator.face
        start, w_of = seen(translator, images)  # (B, D)

        def drawn(x: Tensor) -> Tensor:
            early, late = (face.broadcast(w_of(part)) for part in x.chunk(2, dim=1))
            return network(early, drawing_ws=late)

        start = start.repeat(1, 2)  # (B, 2 D): of the early blocks, of those that draw
        method, best = Lbfgs(start), start
        least = errors = start.new_full((len(start),), torch.inf)
        for step in range(STEPS + 1):
            x = method.ask().requires_grad_(step < STEPS)
            error = (colours(drawn(x)) - target).square().mean(dim=(1, 2, 3))  # (B,)
            loss = error + PULL * (x - start).square().mean(dim=1)
            known = loss.detach().nan_to_num(nan=torch.inf)
            better = known < least
            best = torch.where(better[:, None], x.detach(), best)
            errors = torch.where(better, error.detach(), errors)
            least = torch.where(better, known, least)
            if step < STEPS:
                (gradient,) = torch.autograd.grad(loss.sum(), x)
                method.tell(loss.detach(), gradient)
        variance = target.var(dim=(2, 3)).mean(dim=1).clamp(min=LEAST_VARIANCE)  # (B,)
        return w_of(best.chunk(2, dim=1)[1]), errors / variance


@torch.no_grad()
def seen(translator: Translator, images: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What the encoder sees in drawings (B, 3, R, R), in standard deviations along the principal
    axes of w (B, D), no longer than of a w of z; and the function from these to w."""
    mean, axes, spread = principal_axes(translator.face)
    alive = spread > 1e-3 * spread.max()  # along the others all w are alike
    ws = translator.encoder(images)
    along = (ws[:, : translator.face.layers].mean(dim=1) - mean) @ axes  # (B, D)
    along = torch.where(alive, along / spread.where(alive, spread.max()), 0.0)
    along = along / along.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1)
    return along, lambda x: mean + (x * spread) @ axes.T


def in_fp32(translator: Translator) -> SwappedSynthesis:
    """What draws; a copy where it has another precision, in which nothing can be searched."""
    network = translator.synthesis
    same = translator.dtype == torch.float32
    return network if same else copy.deepcopy(network).float()


# ------------------------------------------------------------------------- what is no head


class Strangeness:
    """strangeness(images): how far pictures (B, 3, R, R) in [-1, 1] lie from a style's own samples
    in what the encoder's backbone sees, (B,): 1 is the samples' median."""

    @torch.no_grad()
    def __init__(self, translator: Translator) -> None:
        self.encoder, network = translator.encoder, in_fp32(translator)
        rng = torch.Generator().manual_seed(seed_of("strangeness"))
        z = torch.randn(SAMPLES, translator.face.z_dim, generator=rng).to(translator.device)
        ws = translator.face.map(z, TRUNCATION)
        samples = [self.features(network(part).clamp(-1, 1)) for part in ws.split(BATCH)]
        x = torch.cat(samples)  # (N, F)
        self.mean, self.deviation = x.mean(dim=0), x.std(dim=0).clamp(min=1e-9)
        correlation = torch.cov(((x - self.mean) / self.deviation).T)
        correlation.lerp_(torch.eye(len(correlation)).to(correlation), SHRINKAGE)
        self.factor = torch.linalg.cholesky(correlation)
        self.unit = self.distance(x).median()

    def __call__(self, images: Tensor) -> Tensor:
        return self.distance(self.features(images)) / self.unit

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, F): means over quarters of the deepest map of 8 x 8 or more."""
        levels = self.encoder.maps(resize(images, self.encoder.config.resolution))
        large = [level for level in levels if level.shape[-1] >= DENSE_SIDE] or levels[:1]
        return pool(large[-1], (2, 2)).flatten(1).cpu().double()

    def distance(self, x: Tensor) -> Tensor:
        white = torch.linalg.solve_triangular(
            self.factor, ((x - self.mean) / self.deviation).T, upper=False
        )
        return white.square().sum(dim=0).sqrt()


# ------------------------------------------------------------------------ pictures to codes


@dataclass(frozen=True)
class References:
    """The drawings of a command: which photo gets which, and their codes."""

    files: dict[str, Path]  # {photo: its reference}
    codes: dict[Path, Tensor]  # (D,)
    strength: float = 1.0  # 0: the photo's own codes, 1: the reference's

    @classmethod
    def read(
        cls,
        source: str | Path,  # a drawing, a folder of them or a glob
        translator: Translator,
        photos: Iterable[str],  # by name
        strength: float = 1.0,
        seed: int = 0,
    ) -> References:
        """Of several drawings a photo's is a function of its name, the seed and their number.

        ValueError for a picture that cannot be read, is no head alone, or shows nothing that the
        generator draws.
        """
        found = [file for file, _ in find_images(source)]
        files = {photo: found[seed_of(seed, photo, "reference") % len(found)] for photo in photos}
        needed = [file for file in found if file in set(files.values())]
        codes: dict[Path, Tensor] = {}
        strangeness = Strangeness(translator)
        for at in range(0, len(needed), BATCH):
            batch = needed[at : at + BATCH]
            pixels = torch.stack([head(file, translator.resolution) for file in batch])
            images = to_float(pixels).to(translator.device)
            for file, far in zip(batch, strangeness(images).tolist(), strict=True):
                if not far <= LARGEST_STRANGENESS:
                    raise ValueError(
                        f"{printable(file)} shows no drawn head, or one unlike any that this style "
                        f"draws ({far:.1f} times as far away as its own, at most "
                        f"{LARGEST_STRANGENESS}); give a drawing whose head fills the picture."
                    )
            ws, errors = invert(translator, images)
            for file, w, error in zip(batch, ws, errors.tolist(), strict=True):
                if not error <= LARGEST_ERROR:
                    raise ValueError(
                        f"{printable(file)} shows no drawn face that the generator can draw (error "
                        f"{error:.2f}, at most {LARGEST_ERROR}); give a drawing whose head fills "
                        "the picture."
                    )
                codes[file] = w
        return cls(files, codes, strength)

    def line(self, photo: str) -> dict[str, str]:
        """What the manifest says of it."""
        return {"reference": str(self.files[photo])}

    def mixed(self, ws: Tensor, photos: Sequence[str]) -> Tensor:
        """ws (B, L, D) of photos of these names -> the codes of the blocks that draw, the same."""
        codes = torch.stack([self.codes[self.files[photo]] for photo in photos]).to(ws)  # (B, D)
        return ws.lerp(broadcast(codes, ws.shape[1]), self.strength)


def head(file: Path, resolution: int) -> Tensor:
    """A drawing's central square, uint8 (3, R, R). ValueError for one that is far from square."""
    picture = open_image(file)
    if max(picture.size) > LONGEST * min(picture.size):
        raise ValueError(
            f"{printable(file)} is {picture.width} x {picture.height} pixels, not a head alone; "
            "cut out the drawn head as a square."
        )
    return fit(picture, resolution)
