"""Train a generator from scratch, fine-tune one with frozen blocks, or train super-resolution.

    # small compute: decoder of a variational autoencoder first, then a projected discriminator
    accelerate launch -m generators.train --data faces.parquet --output runs/face64 \\
        --reconstruction-weight 1 --reconstruction-images 32000 --warmup-images 32000 \\
        --images 80000
    # photos to drawings: the same generator, its first blocks frozen
    accelerate launch -m generators.train --data anime.parquet --output runs/anime64 \\
        --init face64 --freeze-generator-below 16 --reconstruction-weight 1 --adversarial-weight 0
    # StyleGAN2-ADA, for a GPU and days
    accelerate launch -m generators.train --data faces.parquet --output runs/face256 \\
        --images 25000000 --batch-size 32 --resolution 256 --latent-dim 512 --mapping-layers 8 \\
        --channel-base 16384 --channel-max 512 --discriminator residual --augment ada \\
        --path-length-weight 2 --style-mixing 0.9
    accelerate launch -m generators.train --architecture dcgan --data faces.parquet --output runs/d
    accelerate launch -m generators.train --architecture superres --output runs/superres \\
        --data faces.parquet@256 anime.parquet@96

Resume is the same command. The end of a run writes RUN/generator.safetensors (the moving average)
and RUN/discriminator.safetensors; with --eval-data also RUN/best.safetensors (the average of lowest
KID) and RUN/scores.json (the truncation curve, precision and recall of both). On CPU,
`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647` in the environment makes training several
times faster: the allocator then keeps its pages.

Networks: `generators.players`; what a step does: `generators.steps`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from rich.console import Console
from torch import nn

from generators import checkpoint
from generators.data import Pictures, open_dataset, start_at
from generators.monitor import Scores, sheet
from generators.players import GanTrainConfig, Players, resolution_of, set_up
from generators.runs import (
    LossMeter,
    NonFiniteLoss,
    RunFolder,
    progress,
    update_ema,
    write_atomically,
)
from generators.steps import STEPS, draw_step

console = Console()
CHANGEABLE = ("output", "images", "log_every", "sample_every", "save_every", "eval_every")
SHOWN = ("l1", "superres", "g", "d", "d_real", "d_fake", "ada_p")  # beside the progress bar


def train(config: GanTrainConfig, cpu: bool = False) -> None:
    """Runs or resumes the training described by `config`; returns when `images` have been seen.

    Raises ValueError for a wrong set-up and NonFiniteLoss, with the batch saved, when a loss is
    not finite.
    """
    # ---- set-up: data, networks, optimisers, the run folder
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[GradScalerKwargs(init_scale=2**10)])
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    main = accelerator.is_main_process
    resolution = resolution_of(config)
    datasets = [open_dataset(data, size) for data, size in config.sources(resolution)]
    players = set_up(config, accelerator, datasets[0])
    take_step = STEPS[config.architecture]
    folder = RunFolder(config.output)
    if main:
        folder.prepare(dataclasses.asdict(config), CHANGEABLE)
    accelerator.wait_for_everyone()

    # ---- resume: weights, then optimisers, then the step; nothing random is carried over
    step, best = resume(folder, players, accelerator)
    seek(datasets, config, step, rank, world)
    scores = Scores(config, resolution, device) if main and config.eval_data else None
    if main:
        folder.rewind_metrics(step)
        console.print(f"{device}, {world} process(es); starting at step {step}")

    batch = config.batch_size * world
    total = -(-config.images // batch)
    meter = LossMeter(device)
    with progress(total * batch, step * batch, main, "pictures") as advance:
        while step < total:
            # ---- one step of all players
            meter.add(step, take_step(config, players, datasets, step, accelerator))

            # ---- moving average; from scratch with ramp-up (Karras et al. 2020 ADA: 5 % of all)
            step += 1
            half_life = (
                config.ema_images if config.init else min(config.ema_images, 0.05 * step * batch)
            )
            update_ema(players.average, players.generator, 0.5 ** (batch / half_life))

            # ---- once in a while: log (the only sync), sample, score, save
            every = (config.log_every, config.sample_every, config.eval_every, config.save_every)
            to_log, to_sample, to_score, to_save = (step % n == 0 or step == total for n in every)
            means: dict[str, float] = {}
            if to_log or to_score or to_save:  # what is not finite gets into no checkpoint
                means, bad = meter.read(world)
                if bad is not None:
                    seek(datasets, config, bad, rank, world)
                    draw = draw_step(config, datasets, bad, accelerator)
                    file = folder.save_bad_batch(bad, rank, {"real": draw.real})
                    raise NonFiniteLoss(
                        f"A loss is not finite at step {bad}; its batch is in {file}. Lower a "
                        "learning rate or a loss weight, and begin a new run."
                    )
            if scores is not None and to_score:
                means |= scores(players.average)
                if means["kid"] < best:
                    best = means["kid"]
                    write_weights(config, "best", players.average, step * batch)
            if main and means:
                folder.log(step, {"images": step * batch} | means)
                advance(step * batch, **{k: means[k] for k in SHOWN if k in means})
            if main and to_sample:
                file = folder.samples / f"step-{step:08d}.png"
                sheet(players, datasets, config.seed).save(file)
            if main and to_save:
                save(folder, step, best, players, accelerator)

    # ---- the end: files that stand alone
    if main:
        write_weights(config, "generator", players.average, step * batch)
        if players.discriminator is not None:
            write_weights(config, "discriminator", players.discriminator, step * batch)
        if scores is not None:
            write_scores(config, scores)
    accelerator.end_training()


def seek(
    datasets: Sequence[Pictures], config: GanTrainConfig, step: int, rank: int, world: int
) -> None:
    """Puts streams where `step` begins; of several data sets each step takes the next in turn."""
    for i, dataset in enumerate(datasets):
        turns = max(0, -(-(step - i) // len(datasets)))
        start_at(dataset, turns * config.batch_size, rank, world, config.seed)


def write_weights(config: GanTrainConfig, name: str, network: nn.Module, images: int) -> None:
    """OUTPUT/NAME.safetensors, with where it comes from."""
    provenance = {
        "data": ", ".join(Path(data).name for data, _ in config.sources(0)),
        "licence": config.data_license,
        "images_seen": str(images),
        "trained_with": "generators.train",
    }
    path = config.output / f"{name}.safetensors"
    checkpoint.save(path, network, provenance=provenance)
    console.print(f"written: {path}")


def write_scores(config: GanTrainConfig, scores: Scores) -> None:
    """OUTPUT/scores.json: the last and the best weights, by truncation."""
    kind = "dcgan" if config.architecture == "dcgan" else "generator"
    report: dict[str, Any] = {
        "space": scores.space.name,
        "real": len(scores.real),
        "samples": config.eval_samples,
    }
    for name in ("generator", "best"):
        network = checkpoint.load(config.output / f"{name}.safetensors", kind)
        report[name] = scores.at_the_end(network.to(scores.device))
    path = config.output / "scores.json"
    write_atomically(path, lambda p: p.write_text(json.dumps(report, indent=1) + "\n"))
    console.print(f"written: {path}")


def save(
    folder: RunFolder, step: int, best: float, players: Players, accelerator: Accelerator
) -> None:
    """Writes all that the next steps depend on."""
    state: dict[str, Any] = {name: module.state_dict() for name, module in players.saved.items()}
    state["optimisers"] = {name: o.state_dict() for name, o in players.optimisers.items()}
    state["best"] = best
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    folder.save(step, state)


def resume(folder: RunFolder, players: Players, accelerator: Accelerator) -> tuple[int, float]:
    """Loads the newest checkpoint, if there is one; the step to go on with, and the best KID."""
    state = folder.resume(accelerator.device)
    if state is None:
        return 0, float("inf")
    for name, module in players.saved.items():
        module.load_state_dict(state[name])
    for name, optimiser in players.optimisers.items():
        optimiser.load_state_dict(state["optimisers"][name])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state["step"], state["best"]


def main() -> None:
    try:
        train(tyro.cli(GanTrainConfig, description=__doc__))
    except (ValueError, NonFiniteLoss) as error:
        console.print(f"[red]{error}[/red]")
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None


if __name__ == "__main__":
    main()
