"""Every command of the project by its name, from any folder:

gan-invert infer --input photos/ --output out/
python -m encoder                                     # lists them
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from generators.command import console, printable

COMMANDS = {
    "infer": ("encoder.infer", "photos to anime faces: a picture, a folder, a glob"),
    "live": ("encoder.live.command", "a page for the camera: your face as a drawing, in real time"),
    "invert": ("encoder.invert", "search the latents of pictures"),
    "edit": ("encoder.edit", "directions of a face to move along, and the styles of people mixed"),
    "recipes": ("encoder.recipes", "two generators together: cross-domain, concatenate, films"),
    "train-encoder": ("encoder.train", "train an encoder for a generator"),
    "one-w": ("encoder.one_w", "give a generator a w that holds all that an encoder finds"),
    "retouch": ("encoder.retouch.drawings", "photos drawn, and put right, for a style to learn"),
    "train-generator": ("generators.train", "train or fine-tune a generator, or super-resolution"),
    "cyclegan": ("generators.cyclegan", "faces to drawings by a CycleGAN: the baseline"),
    "prepare": ("encoder.prepare.dataset", "raw pictures to a data set of aligned faces"),
    "convert": ("generators.convert", "NVIDIA's .pkl and rosinality's .pt to .safetensors"),
    "web": ("encoder.web", "the same page without a server: a folder for any static host"),
    "export": ("encoder.export", "the networks as ONNX files, for other runtimes"),
    "checkpoint": ("generators.checkpoint", "store a network in half precision, for shipping"),
    "curvature": ("generators.curvature", "measure a generator's directions, for faster searches"),
    "grow": ("encoder.grow", "a generator, and what belongs to it, to twice the resolution"),
    "blocks": ("generators.blocks", "swap the blocks of two generators; grids of it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command of the first word with the others; the exit code."""
    word, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if word in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("gan-invert COMMAND …, where COMMAND --help has the options:\n")
        for name, (_, line) in COMMANDS.items():
            print(f"  {name:{width}}  {line}")
        return 0
    if word == "--version":
        try:
            print(version("amortized-gan-inversion"))
        except PackageNotFoundError:
            print("not installed")
        return 0
    if word not in COMMANDS:
        names = ", ".join(COMMANDS)
        console.print(f"There is no command {printable(word)}; choose from {names}.")
        return 2
    sys.argv = [f"gan-invert {word}", *rest]  # the name in the command's own --help
    return import_module(COMMANDS[word][0]).main(rest)  # imported only now


if __name__ == "__main__":
    sys.exit(main())
