"""The configuration of a training, its networks and their optimisers.

    config = GanTrainConfig(data=("faces.parquet",), output=Path("runs/face64"))
    players = set_up(config, accelerator)

What they do in a step is `generators.steps`; the loop around it, `generators.train`.
Shape letters: B batch, Z z dimension, D w dimension, R resolution.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from generators import checkpoint
from generators.augment import AdaController
from generators.blocks import freeze_discriminator, freeze_generator, read_ws
from generators.data import Pictures, first_pictures
from generators.dcgan import (
    DcganConfig,
    DcganDiscriminator,
    DcganDiscriminatorConfig,
    DcganGenerator,
)
from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.features import FeaturePyramid
from generators.principal import StyleLimit
from generators.projected import ProjectedConfig, ProjectedDiscriminator, learning_part
from generators.runs import frozen, seed_of
from generators.stylegan2 import Generator, GeneratorConfig
from generators.superres import SuperResolution, SuperResolutionConfig
from generators.warmup import VariationalEncoder

R1_INTERVAL = 16  # steps between R1 penalties (Karras et al. 2020, appendix B)
PATH_INTERVAL = 4  # steps between path-length penalties (same place)
CALIBRATION = 256  # real pictures that set a projected discriminator's scales

# What each kind of training takes unless told otherwise: pictures of one process in one step,
# learning rates of generator and discriminator, Adam's betas.
USUAL: dict[str, tuple[int, float, float, tuple[float, float]]] = {
    "projected": (16, 4e-4, 1e-3, (0.0, 0.99)),
    "residual": (16, 2e-3, 2e-3, (0.0, 0.99)),
    "dcgan": (128, 1e-4, 4e-4, (0.5, 0.999)),  # two time scales: Heusel et al. 2017
    "superres": (8, 1e-3, 0.0, (0.9, 0.99)),
}


@dataclass(frozen=True)
class GanTrainConfig:
    data: tuple[str, ...]  # pictures: a folder, parquet, a saved Hugging Face data set, or hf:NAME;
    # of super-resolution several in turn, each with its own PATH@RESOLUTION if it differs
    output: Path  # run folder; the same command goes on with what it holds
    architecture: Literal["stylegan2", "dcgan", "superres"] = "stylegan2"
    images: int = 100_000  # real pictures seen in all
    batch_size: int = 0  # pictures of one process in one step; 0: 16, dcgan 128, superres 8
    seed: int = 0
    data_license: str = "not stated"  # kept in the weights' metadata

    init: str | None = None  # generator to fine-tune: a bundled name or file; None: from scratch
    init_discriminator: str | None = None  # its discriminator, a .safetensors
    freeze_generator_below: int = 0  # FreezeG: mapping, constant, all blocks below this resolution
    freeze_discriminator_blocks: int = 0  # FreezeD: that many of a residual one, image side first
    resolution: int = 64  # from scratch: side in pixels, and the sizes below
    latent_dim: int = 256  # z and w; of dcgan, whose paper has 100, z
    mapping_layers: int = 4
    channel_base: int = 2048
    channel_max: int = 192

    discriminator: Literal["projected", "residual"] = "projected"  # hinge | logistic and lazy R1
    augment: Literal["diffaugment", "ada", "none"] = "diffaugment"  # of what it gets to see
    adversarial_weight: float = 1.0  # final weight of the adversarial loss
    r1_gamma: float = 1.0  # residual
    path_length_weight: float = 0.0  # 2 in the paper; off with frozen blocks
    style_mixing: float = 0.0  # probability; 0.9 in the paper
    latents: Path | None = None  # file or folder of ws, an encoder's of photos: half of the fakes
    feature_weights: str | None = "wheel"  # of the perceptual net and of the projected one
    ada_target: float = 0.6
    ada_images: int = 500_000  # pictures in which p can go from 0 to 1

    reconstruction_weight: float = 0.0  # > 0: the generator also decodes a variational autoencoder
    warmup_images: int = 20_000  # with reconstruction: pictures before the adversary joins
    adversarial_ramp: int = 10_000  # pictures over which its weight grows from a tenth
    warmup_lr: float = 2e-3  # of the generator until then; afterwards it is generator_lr
    reconstruction_images: int | None = None  # pictures after which the adversary plays alone
    l1_weight: float = 2.0
    perceptual_weight: float = 0.6
    kl_weight: float = 2e-3

    superres_perceptual_weight: float = 0.02  # beside a Charbonnier loss of weight 1
    label_smoothing: float = 0.1  # dcgan: the target of real pictures is 1 - this
    input_noise: float = 0.02  # dcgan: standard deviation, of what the discriminator sees

    generator_lr: float = 0.0  # 0: the usual one, see USUAL
    discriminator_lr: float = 0.0  # 0: the usual one
    ema_images: float = 3_000  # half-life of the moving average
    log_every: int = 25  # steps
    sample_every: int = 250  # steps
    save_every: int = 250  # steps

    eval_data: str | None = None  # held-out pictures for FD and KID; None: no scores
    eval_every: int = 1_000  # steps
    eval_samples: int = 1_000  # generated pictures, and at most so many held-out ones
    eval_space: str = "efficientnet"  # NAME or NAME=WEIGHTS of generators.distances

    def __post_init__(self) -> None:
        usual = USUAL[self.judge if self.architecture == "stylegan2" else self.architecture]
        for name, value in zip(("batch_size", "generator_lr", "discriminator_lr"), usual[:3],
                               strict=True):  # fmt: skip
            object.__setattr__(self, name, getattr(self, name) or value)
        object.__setattr__(self, "data", tuple(self.data))
        every = (self.log_every, self.sample_every, self.save_every, self.eval_every)
        if min(self.images, self.batch_size, *every) < 1:
            raise ValueError("images, batch_size and the *_every fields must be at least 1")
        if self.reconstruction_weight < 0 or self.adversarial_weight < 0:
            raise ValueError("weights must not be negative")
        if not (self.reconstruction_weight or self.adversarial_weight):
            raise ValueError("give the reconstruction or the adversarial loss a weight")
        if self.architecture != "stylegan2" and (
            self.reconstruction_weight
            or self.freeze_generator_below
            or self.style_mixing
            or self.latents
        ):
            raise ValueError(
                "reconstruction, freezing, style mixing and latents are for --architecture "
                "stylegan2"
            )
        if self.architecture == "superres" and self.eval_data:
            raise ValueError("FD and KID are for generators; leave out --eval-data")
        if self.architecture != "superres" and len(self.data) != 1:
            raise ValueError("several data sets are for --architecture superres; give one --data")
        if self.freeze_generator_below and self.path_length_weight:
            raise ValueError(
                "frozen blocks leave the path length as it is; set --path-length-weight 0"
            )
        if self.freeze_discriminator_blocks and self.judge != "residual":
            raise ValueError("freezing discriminator blocks needs --discriminator residual")

    def sources(self, resolution: int) -> list[tuple[str, int]]:
        """Each data set and the side in pixels of what is read from it."""
        cut = [data.rpartition("@") for data in self.data]
        return [
            (path, int(size)) if path and size.isdigit() else (data, resolution)
            for data, (path, _, size) in zip(self.data, cut, strict=True)
        ]

    @property
    def judge(self) -> str:
        """The kind of discriminator: projected, residual, dcgan."""
        return "dcgan" if self.architecture == "dcgan" else self.discriminator

    def adversarial_weight_at(self, seen: int) -> float:
        """0 during the warm-up, then from a tenth to the whole weight over the ramp."""
        if not self.reconstruction_weight:
            return self.adversarial_weight
        if seen < self.warmup_images:
            return 0.0
        done = (seen - self.warmup_images) / max(self.adversarial_ramp, 1)
        return self.adversarial_weight * min(1.0, 0.1 + 0.9 * done)

    def generator_lr_at(self, seen: int) -> float:
        return self.generator_lr if self.adversarial_weight_at(seen) else self.warmup_lr

    def reconstructs_at(self, seen: int) -> bool:
        last = self.images if self.reconstruction_images is None else self.reconstruction_images
        return self.reconstruction_weight > 0 and seen < last


class RunningMean(nn.Module):
    """The mean path length, with a memory of about a hundred penalties; part of a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros([]))
        self.mean: Tensor

    def update(self, value: Tensor) -> None:
        self.mean.lerp_(value, 0.01)


@dataclass
class Players:
    """The networks of a training, by role, and their optimisers."""

    trained: dict[str, Any]  # "generator" first, then "discriminator", "variational"
    average: Any  # moving average of the generator
    perceptual: FeaturePyramid | None
    optimisers: dict[str, torch.optim.Optimizer]  # by the role of their network
    prepared: dict[str, Any]  # the same, wrapped by Accelerate
    state: dict[str, nn.Module] = field(default_factory=dict)  # ADA's p, the mean path length
    latents: Tensor | None = None  # (N, L, D) at which half of the fakes are drawn

    def __post_init__(self) -> None:
        self.generator: Any = self.trained["generator"]
        self.discriminator: Any = self.trained.get("discriminator")
        self.variational: VariationalEncoder | None = self.trained.get("variational")
        if self.discriminator is not None:
            self.judged = [p for p in self.discriminator.parameters() if p.requires_grad]

    @property
    def saved(self) -> dict[str, nn.Module]:
        """What a checkpoint holds, beside the optimisers."""
        return self.trained | {"average": self.average} | self.state

    def train_discriminator(self, on: bool) -> None:
        """Gradients for the discriminator's weights, but the frozen ones, or for none."""
        for parameter in self.judged:
            parameter.requires_grad_(on)


def build(config: GanTrainConfig) -> dict[str, Any]:
    """The trained networks at step 0 by role, the same in every process."""
    torch.manual_seed(seed_of(config.seed, "weights"))  # no z of a user is a row of a weight
    builders = {"stylegan2": stylegan2, "dcgan": dcgan, "superres": superres}
    trained = builders[config.architecture](config)
    for network in trained.values():
        network.train()
    if config.freeze_generator_below:
        freeze_generator(trained["generator"], config.freeze_generator_below)
    if config.freeze_discriminator_blocks:
        freeze_discriminator(trained["discriminator"], config.freeze_discriminator_blocks)
    return trained


def stylegan2(config: GanTrainConfig) -> dict[str, Any]:
    generator: Any = initial(config.init, "generator")
    if generator is None:
        generator = Generator(
            GeneratorConfig(
                resolution=config.resolution,
                z_dim=config.latent_dim,
                w_dim=config.latent_dim,
                mapping_layers=config.mapping_layers,
                channel_base=config.channel_base,
                channel_max=config.channel_max,
            )
        )
        if config.reconstruction_weight:  # a calm start: the sum of all toRGB is within [-1, 1]
            for r in generator.config.block_resolutions:
                generator.synthesis.get_submodule(f"b{r}.torgb").weight.data.mul_(0.3)
    discriminator: Any
    if config.discriminator == "projected":
        discriminator = initial(config.init_discriminator, "projected")
        if discriminator is None:
            discriminator = ProjectedDiscriminator(ProjectedConfig(), config.feature_weights)
    else:
        discriminator = initial(config.init_discriminator, "discriminator")
        if discriminator is None:
            widths = tuple(generator.config.channels.values())
            discriminator = Discriminator(DiscriminatorConfig(generator.resolution, widths=widths))
    trained = {"generator": generator, "discriminator": discriminator}
    if config.reconstruction_weight:
        trained["variational"] = VariationalEncoder(generator.resolution, generator.z_dim)
    return trained


def dcgan(config: GanTrainConfig) -> dict[str, Any]:
    generator = initial(config.init, "dcgan")
    if generator is None:
        generator = DcganGenerator(DcganConfig(config.resolution, config.latent_dim))
    discriminator = initial(config.init_discriminator, "dcgan_discriminator")
    if discriminator is None:
        shape = DcganDiscriminatorConfig(generator.resolution, generator.config.width)
        discriminator = DcganDiscriminator(shape)
    return {"generator": generator, "discriminator": discriminator}


def superres(config: GanTrainConfig) -> dict[str, Any]:
    network = initial(config.init, "superres")
    return {"generator": network or SuperResolution(SuperResolutionConfig())}


def resolution_of(config: GanTrainConfig) -> int:
    """Side in pixels of the pictures to train on: a fine-tuned generator's own."""
    if config.init is None or config.architecture == "superres":
        return config.resolution
    metadata = checkpoint.read_metadata(checkpoint.resolve(config.init))
    return metadata["config"]["resolution"]


def initial(source: str | None, kind: str) -> Any:
    """The network to begin with, all of its weights trainable but a frozen feature net's."""
    if source is None:
        return None
    network = checkpoint.load(checkpoint.resolve(source), kind)
    learning_part(network).requires_grad_(True)
    return network


def set_up(config: GanTrainConfig, accelerator: Accelerator, dataset: Pictures) -> Players:
    """Everything that has weights, on this process's device."""
    device = accelerator.device
    trained: dict[str, Any] = {role: net.to(device) for role, net in build(config).items()}
    betas = USUAL[config.architecture if config.architecture != "stylegan2" else config.judge][3]
    rates = {
        "generator": (config.generator_lr, betas),
        "discriminator": (config.discriminator_lr, betas),
        "variational": (5e-4, (0.9, 0.99)),
    }
    optimisers: dict[str, torch.optim.Optimizer] = {}
    for role, network in trained.items():
        free = [p for p in network.parameters() if p.requires_grad]
        optimisers[role] = torch.optim.Adam(free, *rates[role])
    discriminator = trained.get("discriminator")
    if isinstance(discriminator, ProjectedDiscriminator) and not config.init_discriminator:
        discriminator.calibrate(first_pictures(dataset, CALIBRATION).to(device))
    perceptual = None
    levels: tuple[int, ...]
    if config.architecture == "superres":
        weight, levels = config.superres_perceptual_weight, (0, 1)
    else:
        weight = config.perceptual_weight * config.reconstruction_weight
        levels = (0, 1, 2, 3)
    if weight:
        perceptual = FeaturePyramid(weights=config.feature_weights, out_indices=levels).to(device)
    state: dict[str, nn.Module] = {}
    if config.augment == "ada":
        state["ada"] = AdaController(config.ada_target, config.ada_images).to(device)
    if config.path_length_weight:
        state["path"] = RunningMean().to(device)
    prepared = {name: accelerator.prepare(optimiser) for name, optimiser in optimisers.items()}
    average = frozen(copy.deepcopy(trained["generator"]))
    latents = None
    if config.latents is not None:
        latents = read_ws(config.latents, trained["generator"]).to(device)
        if config.freeze_generator_below:  # as the translation of photos will
            latents = StyleLimit(trained["generator"], config.freeze_generator_below)(latents)
    return Players(trained, average, perceptual, optimisers, prepared, state, latents)
