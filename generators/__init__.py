"""StyleGAN2 and all that is done to its weights: build, convert, swap, train.

Knows nothing of encoders.
"""

import os

# Before torch is loaded, here or by whoever imports this first: OpenMP's threads sleep while they
# wait, as spinning they take the processor from others and from one another, see generators.threads
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")  # the same for Intel's and LLVM's OpenMP
