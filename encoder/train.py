"""The encoder's training loop: `accelerate launch train_encoder.py`; resume is the same command.

Shape letters: B batch, R resolution.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from PIL import Image
from rich.console import Console
from torch import Tensor

from encoder.evaluate import evaluate, image_metrics
from encoder.model import Encoder
from encoder.players import EncoderTrainConfig, Players, batch_of_reals
from generators import checkpoint
from generators.blocks import SwappedSynthesis
from generators.data import Pictures, first_pictures, open_dataset, start_at
from generators.images import grid
from generators.runs import LossMeter, NonFiniteLoss, RunFolder, frozen, progress
from generators.stylegan2 import Generator

console = Console()
CHANGEABLE = ("output", "steps", "log_every", "eval_every", "save_every", "tracker")


def train(config: EncoderTrainConfig, cpu: bool = False) -> dict[str, float]:
    """Runs or resumes the training; returns the last held-out metrics.

    Raises ValueError for a wrong set-up, and NonFiniteLoss, with the batch saved, when a loss is
    not finite.
    """
    # ---- set-up: networks, data, held-out judge, run folder
    tracker = config.tracker if config.tracker != "none" else None
    accelerator = Accelerator(
        cpu=cpu,
        log_with=tracker,
        project_dir=str(config.output),
        kwargs_handlers=[GradScalerKwargs(init_scale=2**10)],
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    main = accelerator.is_main_process
    players = Players(config, accelerator)
    generator, average = players.generator, players.average
    dataset = open_dataset(config.data, generator.resolution)
    judge = held_out(config, generator) if main and config.eval_data is not None else None
    sheet = sample_sheet(config, generator, dataset) if main else None
    folder = RunFolder(config.output)
    if main:
        folder.prepare(dataclasses.asdict(config), CHANGEABLE)
    accelerator.wait_for_everyone()
    if tracker:
        accelerator.init_trackers("tensorboard")

    # ---- resume: networks, optimisers, step; nothing random is carried over
    step, best, scores = 0, float("inf"), {}
    state = folder.resume(accelerator.device)
    if state is not None:
        players.load_state(state)
        step, best, scores = state["step"], state["best"], state["scores"]
    start_at(dataset, step * config.accumulation * batch_of_reals(config), rank, world, config.seed)
    if main:
        folder.rewind_metrics(step)
        parameters = sum(p.numel() for p in players.encoder.parameters())
        console.print(
            f"{accelerator.device}, {world} process(es), {accelerator.mixed_precision} precision; "
            f"{parameters:,} parameters; starting at step {step}"
        )

    meter = LossMeter(accelerator.device)
    with progress(config.steps, step, main) as advance:
        while step < config.steps:
            players.step(dataset, step, meter)
            step += 1

            # ---- once in a while: read the losses (the only sync), evaluate, log, save
            last = step == config.steps
            due_eval = last or step % config.eval_every == 0
            due_save = last or step % config.save_every == 0
            if not (due_eval or due_save or step % config.log_every == 0):
                continue
            means, bad = meter.read(world)
            if bad is not None:
                parts = range(config.accumulation)
                pictures = {
                    f"images_{i}": players.micro_batch(dataset, bad, i).images for i in parts
                }
                file = folder.save_bad_batch(bad, rank, pictures)
                raise NonFiniteLoss(
                    f"a loss is not finite at step {bad}; its pictures are in {file}. "
                    "Lower --lr or a loss weight, and repeat the command."
                )
            if due_eval and judge is not None:
                scores = judge(average)
                means |= scores
                if scores["eval_mse"] < best:
                    best = scores["eval_mse"]
                    save_weights(config, average, step, config.output / "best.safetensors", scores)
            if due_eval and sheet is not None:
                sheet(average).save(folder.samples / f"step-{step:08d}.png")
            if main:
                folder.log(step, {"lr": config.lr_at(step - 1)} | means)
            if tracker:
                accelerator.log(means, step)
            if main and due_save:
                folder.save(step, players.state() | {"best": best, "scores": scores})
            shown = ("loss", "mse", "eval_mse")
            advance(step, **{name: means[name] for name in shown if name in means})

    # ---- the end: one file that stands alone
    if main:
        save_weights(config, average, step, config.output / "encoder.safetensors", scores)
        console.print(f"written: {config.output / 'encoder.safetensors'}")
    accelerator.end_training()
    return scores


def held_out(
    config: EncoderTrainConfig, generator: Generator
) -> Callable[[Encoder], dict[str, float]]:
    """A function that measures an encoder on `eval_images` held-out faces."""
    assert config.eval_data is not None
    device = generator.w_avg.device
    source = open_dataset(config.eval_data, generator.resolution)
    images = first_pictures(source, config.eval_images)
    metrics = image_metrics(config.lpips_net, config.lpips_weights, config.eval_lpips, device)

    def judge(encoder: Encoder) -> dict[str, float]:
        def reconstruct(x: Tensor) -> Tensor:
            return generator.synthesis(encoder(x))

        scores = evaluate(images, reconstruct, metrics, config.batch_size, device)
        return {f"eval_{name}": value for name, value in scores.items()}

    return judge


def sample_sheet(
    config: EncoderTrainConfig, generator: Generator, dataset: Pictures
) -> Callable[[Encoder], Image.Image]:
    """A function that draws input | reconstruction | anime of 12 pictures, held-out ones if any."""
    device = generator.w_avg.device
    if config.eval_data is not None:
        dataset = open_dataset(config.eval_data, generator.resolution)
    images = first_pictures(dataset, 12).to(device)
    swapped = None
    if config.anime_generator is not None:
        anime = checkpoint.load(checkpoint.resolve(config.anime_generator), "generator").to(device)
        swapped = frozen(SwappedSynthesis(generator, anime, config.swap_resolution))

    @torch.no_grad()
    def draw_sheet(encoder: Encoder) -> Image.Image:
        ws = encoder(images)
        made = [generator.synthesis(ws)] if swapped is None else [*swapped(ws, both=True)]
        columns = torch.stack([images, *made], dim=1)  # (N, 2 or 3, 3, R, R)
        return grid(columns.flatten(0, 1), columns=4 * columns.shape[1])

    return draw_sheet


def save_weights(
    config: EncoderTrainConfig, encoder: Encoder, step: int, path: Path, scores: dict[str, float]
) -> None:
    seen = step * config.batch_size * config.accumulation
    provenance = {
        "data": Path(config.data).name,
        "licence": config.data_license,
        "steps": str(step),
        "images_seen_per_process": str(seen),
        "face_generator": Path(config.face_generator).name,
        "trained_with": "train_encoder.py",
    } | {k: f"{v:.5g}" for k, v in scores.items()}
    checkpoint.save(path, encoder, provenance=provenance)
