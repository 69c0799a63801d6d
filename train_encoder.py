"""Train an encoder that predicts a StyleGAN2 generator's w+ latent from one look at a face.

    accelerate launch train_encoder.py --data faces/ --output runs/encoder64

All of it is `encoder.train`.
"""

import sys

from encoder.train import main

if __name__ == "__main__":
    sys.exit(main())
