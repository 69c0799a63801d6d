"""Train a StyleGAN2 generator from scratch on small compute, or fine-tune one with frozen blocks.

    accelerate launch -m generators.train --data faces.parquet --output runs/face64 \\
        --reconstruction-weight 1
    accelerate launch -m generators.train --data anime.parquet --output runs/anime64 \\
        --images 20000 --init face64 --init-discriminator runs/face64/discriminator.safetensors \\
        --freeze-generator-below 16

Resume is the same command. The end of a run writes RUN/generator.safetensors (the moving average)
and RUN/discriminator.safetensors. On CPU, `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647`
in the environment makes training several times faster: the allocator then keeps its pages.

The networks and their steps are in `generators.players`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from PIL import Image
from rich.console import Console

from generators import checkpoint
from generators.data import Pictures, first_pictures, open_dataset, start_at
from generators.images import grid
from generators.players import (
    R1_INTERVAL,
    GanTrainConfig,
    Players,
    discriminator_step,
    draw_step,
    generator_step,
    set_up,
)
from generators.runs import (
    LossMeter,
    NonFiniteLoss,
    RunFolder,
    progress,
    step_generator,
    update_ema,
)
from generators.stylegan2 import Generator
from generators.warmup import VariationalEncoder

console = Console()
CHANGEABLE = ("output", "images", "log_every", "sample_every", "save_every")


def train(config: GanTrainConfig, cpu: bool = False) -> None:
    """Runs or resumes the training described by `config`; returns when `images` have been seen.

    Raises ValueError for a wrong set-up and NonFiniteLoss, with the batch saved, when a loss is
    not finite.
    """
    # ---- set-up: networks, optimisers, data, the run folder
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[GradScalerKwargs(init_scale=2**10)])
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    main = accelerator.is_main_process
    players = set_up(config, accelerator)
    generator, average = players.generator, players.average
    dataset = open_dataset(config.data, generator.resolution)
    folder = RunFolder(config.output)
    if main:
        folder.prepare(dataclasses.asdict(config), CHANGEABLE)
    accelerator.wait_for_everyone()

    # ---- resume: weights, then optimisers, then the step; nothing random is carried over
    step = resume(folder, players, accelerator)
    start_at(dataset, step * config.batch_size, rank, world, config.seed)
    if main:
        folder.rewind_metrics(step)
        console.print(f"{device}, {world} process(es); starting at step {step}")

    batch = config.batch_size * world
    total = -(-config.images // batch)
    meter = LossMeter(device)
    with progress(total, step, main) as advance:
        while step < total:
            # ---- one step of the generator, then of the discriminator if it plays already
            draw = draw_step(config, dataset, generator.z_dim, step, accelerator)
            weight = config.adversarial_weight_at(step * batch)
            logs, fake = generator_step(config, players, draw, weight, accelerator)
            if fake is not None:
                penalise = step % R1_INTERVAL == 0
                logs |= discriminator_step(config, players, draw, fake, penalise, accelerator)
            meter.add(step, logs)

            # ---- moving average, with ramp-up (Karras et al. 2020 ADA: 5 % of the pictures seen)
            step += 1
            half_life = min(config.ema_images, 0.05 * step * batch)
            update_ema(average, generator, 0.5 ** (batch / max(half_life, 1e-8)))

            # ---- once in a while: log (the only sync), sample, save
            to_log, to_sample, to_save = (
                step % every == 0 or step == total
                for every in (config.log_every, config.sample_every, config.save_every)
            )
            if to_log or to_save:  # nothing that is not finite gets into a checkpoint
                means, bad = meter.read(world)
                if bad is not None:
                    start_at(dataset, bad * config.batch_size, rank, world, config.seed)
                    draw = draw_step(config, dataset, generator.z_dim, bad, accelerator)
                    file = folder.save_bad_batch(bad, rank, {"real": draw.real, "z": draw.z})
                    raise NonFiniteLoss(
                        f"A loss is not finite at step {bad}; its batch is in {file}. Lower a "
                        "learning rate or a loss weight, and begin a new run."
                    )
                if main:
                    folder.log(step, {"images": step * batch} | means)
                advance(step, **{name: means[name] for name in ("l1", "g", "d") if name in means})
            if main and to_sample:
                sheet = sample_sheet(average, players.variational, dataset, config.seed)
                sheet.save(folder.samples / f"step-{step:08d}.png")
            if main and to_save:
                save(folder, step, players, accelerator)

    # ---- the end: two files that stand alone
    if main:
        provenance = {
            "data": Path(config.data).name,
            "licence": config.data_license,
            "images_seen": str(step * batch),
            "trained_with": "generators.train",
        }
        for name, module in (("generator", average), ("discriminator", players.discriminator)):
            path = config.output / f"{name}.safetensors"
            checkpoint.save(path, module, provenance=provenance)
            console.print(f"written: {path}")
    accelerator.end_training()


def save(folder: RunFolder, step: int, players: Players, accelerator: Accelerator) -> None:
    """Writes all that the next steps depend on."""
    state: dict[str, Any] = {name: module.state_dict() for name, module in players.saved.items()}
    state["optimisers"] = {name: o.state_dict() for name, o in players.optimisers.items()}
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    folder.save(step, state)


def resume(folder: RunFolder, players: Players, accelerator: Accelerator) -> int:
    """Loads the newest checkpoint, if there is one; returns the step to go on with."""
    state = folder.resume(accelerator.device)
    if state is None:
        return 0
    for name, module in players.saved.items():
        module.load_state_dict(state[name])
    for name, optimiser in players.optimisers.items():
        optimiser.load_state_dict(state["optimisers"][name])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state["step"]


@torch.no_grad()
def sample_sheet(
    average: Generator, variational: VariationalEncoder | None, dataset: Pictures, seed: int
) -> Image.Image:
    """With a variational encoder 6 photos beside their reconstructions; then 36 samples at
    truncation 0.8. The photos and the draws are always the same."""
    device, rows = average.w_avg.device, []
    if variational is not None:
        photos = first_pictures(dataset, 6).to(device)
        again = average(variational.eval()(photos)[0])
        variational.train()
        rows.append(torch.stack([photos, again], dim=1).flatten(0, 1))
    rng = step_generator(seed, 0, "samples")
    z = torch.randn(36, average.z_dim, generator=rng).to(device)
    rows.append(average(z, truncation=0.8))
    return grid(torch.cat(rows), columns=12)


def main() -> None:
    try:
        config = tyro.cli(GanTrainConfig, description=__doc__)
        train(config)
    except (ValueError, NonFiniteLoss) as error:
        console.print(f"[red]{error}[/red]")
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None


if __name__ == "__main__":
    main()
