"""Train a generator from scratch, fine-tune one with frozen blocks, train super-resolution or a
CycleGAN.

    # small compute: decoder of a variational autoencoder first, then a projected discriminator
    accelerate launch -m generators.train stylegan2 --data faces.parquet --output runs/face64 \\
        --reconstruction-weight 1 --reconstruction-images 32000 --warmup-images 32000 \\
        --images 80000
    # photos to drawings: the same generator, its first blocks frozen
    accelerate launch -m generators.train stylegan2 --data anime.parquet --output runs/anime64 \\
        --init face64 --freeze-generator-below 16 --reconstruction-weight 1 --adversarial-weight 0
    # StyleGAN2-ADA, for a GPU and days
    accelerate launch -m generators.train stylegan2 --data faces.parquet --output runs/face256 \\
        --images 25000000 --batch-size 32 --resolution 256 --latent-dim 512 --mapping-layers 8 \\
        --channel-base 16384 --channel-max 512 --discriminator residual --augment ada \\
        --path-length-weight 2 --style-mixing 0.9
    accelerate launch -m generators.train dcgan --data faces.parquet --output runs/d
    # the baseline for translation, photos to drawings and back
    accelerate launch -m generators.train cyclegan --data faces.parquet --drawings anime.parquet \\
        --output runs/c
    accelerate launch -m generators.train superres --output runs/superres \\
        --data faces.parquet@256 anime.parquet@96

Resume is the same command; Ctrl-C and SIGTERM leave a checkpoint. The end of a run writes
RUN/generator.safetensors (the moving average) and RUN/discriminator.safetensors, for a CycleGAN
RUN/inverse.safetensors; with --eval-data
also RUN/best.safetensors (the average of lowest KID) and RUN/scores.json (the truncation curve,
precision and recall of both). On CPU,
`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647` in the environment may make training faster:
the allocator then keeps its pages.

Options: `generators.options`; networks: `generators.networks`; what a step does: `generators.gan`,
`generators.cycles`, `generators.steps`.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from accelerate import Accelerator
from tyro.conf import subcommand

from generators.command import command
from generators.cycles import CycleganTraining
from generators.gan import DcganTraining, StyleGan2Training
from generators.loop import Training, make_accelerator, run
from generators.options import (
    CycleganOptions,
    DcganOptions,
    GeneratorOptions,
    StyleGan2Options,
    SuperresOptions,
)
from generators.steps import SuperresTraining

Options = (
    Annotated[StyleGan2Options, subcommand("stylegan2")]
    | Annotated[DcganOptions, subcommand("dcgan")]
    | Annotated[SuperresOptions, subcommand("superres")]
    | Annotated[CycleganOptions, subcommand("cyclegan")]
)


def train(config: GeneratorOptions, cpu: bool = False) -> None:
    """Runs or resumes the training described by `config`; returns when `images` have been seen.

    Raises ValueError for a wrong set-up, and what `generators.loop.run` raises.
    """
    trainings: dict[type, Callable[[Any, Accelerator], Training]] = {
        StyleGan2Options: StyleGan2Training,
        DcganOptions: DcganTraining,
        SuperresOptions: SuperresTraining,
        CycleganOptions: CycleganTraining,
    }
    run(trainings[type(config)](config, make_accelerator(config, cpu)))


def main(argv: Sequence[str] | None = None) -> int:
    return command(Options, train, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
