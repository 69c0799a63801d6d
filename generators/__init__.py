"""StyleGAN2 and all that is done to its weights: build, convert, swap, train.

Knows nothing of encoders.
"""
