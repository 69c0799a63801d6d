"""Photos and films to anime faces: a picture, a film, a folder or a glob in, as many results out.

    python infer.py --input photos/ --output out/
    python infer.py --input me.jpg --output out/ --save anime,grid,latents --refine-steps 50
    python infer.py --input me.jpg --output out/ --size 256       # enlarged by super-resolution
    python infer.py --input clip.mp4 --output out/ --layout side-by-side
    python infer.py --input webcam:0 --output out/                # until Ctrl-C
    accelerate launch infer.py --input photos/ --output out/      # each process takes its share

Writes OUT/sub/name.png for photos/sub/name.jpg, OUT/sub/name.mp4 for films (see `encoder.video`; a
GIF of several frames is one), and OUT/manifest.jsonl with one line per picture or film.
Where several pictures share a stem, the whole name is kept: a.jpg.png, a.png.png. The same command
goes on where it stopped. Exit code 0, 1 where pictures failed (they are listed, the others are
done), 2 where nothing could be done.
"""

import sys
from collections.abc import Sequence

from encoder.options import InferConfig
from generators.command import command


def run(config: InferConfig) -> int:
    """Translates this process's share of the pictures; the main process reports on all."""
    from encoder.pictures import translate_all  # and with it torch, for which --help need not wait

    return translate_all(config)


def main(argv: Sequence[str] | None = None) -> int:
    return command(InferConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
