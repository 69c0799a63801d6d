"""Train an encoder that predicts a StyleGAN2 generator's w+ latent from one look at a face.

    accelerate launch train_encoder.py --data faces/ --output runs/encoder64

One process or many, CPU or GPU, any precision that `accelerate launch` offers. Resume is the same
command.
"""

import dataclasses

import tyro
from rich.pretty import pprint

from encoder.players import EncoderTrainConfig
from encoder.train import console, train
from generators.runs import NonFiniteLoss


def main() -> None:
    try:
        config = tyro.cli(EncoderTrainConfig, description=__doc__)
        pprint(dataclasses.asdict(config), console=console, expand_all=False)
        train(config)
    except (ValueError, NonFiniteLoss) as error:
        console.print(f"[red]{error}[/red]")
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None


if __name__ == "__main__":
    main()
