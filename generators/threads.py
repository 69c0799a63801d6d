"""How many threads of the CPU a run uses.

    count = use_threads(config.threads, pixels=batch_size * resolution**2)

Small networks on small batches are fastest with one thread: an operation is over before a second
one has woken up. On a busy machine it is worse, since threads that wait for one another spin on
what others need: a 64x64 synthesis took six to nine times as long with two spinning threads, 1.4 to
2 times with two that sleep (benchmarks/LOG.md). So the packages ask for sleeping threads before
torch is loaded (`generators/__init__.py`), and small work gets one.
"""

import os

import torch

SMALL = 1 << 18  # pixels of one batch up to which one thread is fastest: 64 pictures of 64 x 64


def available() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_threads(asked: int, pixels: int) -> int:
    """Sets torch's threads for batches of that many pixels in all; the count, for other libraries.

    asked: 0 for this module's choice. ValueError below 0.
    """
    if asked < 0:
        raise ValueError(f"--threads is {asked}; give 1 or more, or 0 for what fits the work.")
    count = asked or (1 if pixels <= SMALL else available())
    torch.set_num_threads(count)
    return count
