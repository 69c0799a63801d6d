"""Drawings that keep what a network sees in the photo of the same latents.

    f = feature_network("tf_efficientnet_lite0", "wheel", levels=(3, 4))     # or an encoder's file
    loss = constancy(f, drawings, source.synthesis(ws))                      # (B,)

DTN (Taigman et al. 2017, arXiv:1611.02200, eq. 3) asks that f(x) and f(g(f(x))) agree, f being the
encoder that the translation begins with. DIAT-A (Li et al. 2016, arXiv:1610.05586) takes the
features of the discriminator instead, as they are at that step. Both look at a picture's content by
position, so they hold pose and outline; what f sees of a photo's texture they hold as well.

Shape letters: B batch, C channels, H W of a map, R resolution.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from generators import checkpoint
from generators.command import printable
from generators.features import FeaturePyramid, fold_batch_norms, perceptual_distance
from generators.runs import frozen
from generators.stylegan2 import Generator, SynthesisNetwork
from generators.tensors import load_state

BACKBONE = "backbone."  # of a file's tensors, and the network's name in its config


def constancy(
    f: Callable[[Tensor], Sequence[Tensor]],  # pictures (B, 3, R, R) -> maps (B, C_i, H_i, W_i)
    drawings: Tensor,  # (B, 3, R, R) in [-1, 1]
    photos: Tensor,  # of the same latents
) -> Tensor:
    """d(f(photo), f(drawing)), (B,), >= 0; gradients reach the drawings only. d is the squared
    distance of channel-normalised maps, so that it does not depend on the scale of f: at most 4 a
    level. The paper has a plain squared distance."""
    with torch.no_grad():
        wanted = f(photos.detach())
    return perceptual_distance(f(drawings), wanted)


def feature_network(
    network: str,  # a timm network, or a bundled name or file of an encoder, whose backbone it is
    weights: str | None,  # of a timm network, as FeaturePyramid takes them
    levels: Sequence[int],  # level i has about R / 2^(i+1) pixels a side
) -> FeaturePyramid:
    """f, frozen. ValueError for what is neither, and for levels that it has not."""
    import timm  # as in `generators.features`

    if timm.is_model(network):
        with known_levels(network, levels):
            return FeaturePyramid(network, weights, levels)
    file = checkpoint.resolve(network)
    name = checkpoint.read_metadata(file)["config"].get("backbone")
    tensors = {
        key.removeprefix(BACKBONE): value
        for key, value in checkpoint.read_tensors(file).items()
        if key.startswith(BACKBONE)
    }
    if not tensors or not isinstance(name, str):
        raise ValueError(
            f"{printable(network)} has no backbone of timm's; give an encoder, or the name of a "
            "timm network."
        )
    with known_levels(network, levels):
        pyramid = FeaturePyramid(name, "random", levels, fold_batch_norm=False)
    deepest = pyramid.net.state_dict().keys()  # without what lies behind the last of the levels
    state = {key: value for key, value in tensors.items() if key in deepest}
    load_state(pyramid.net, state, f"the backbone in {printable(network)} is not timm's {name}")
    fold_batch_norms(pyramid.net)
    return pyramid


@contextmanager
def known_levels(network: str, levels: Sequence[int]) -> Iterator[None]:
    """timm's complaint about a level as a sentence."""
    try:
        yield
    except IndexError as error:
        raise ValueError(
            f"{printable(network)} has no level {max(levels)}; give lower --constancy-levels."
        ) from error


def photo_source(source: str, generator: Generator) -> SynthesisNetwork:
    """What draws the photo of a generator's latents, frozen; ValueError unless it fits."""
    face = checkpoint.load(checkpoint.resolve(source), Generator)
    ours, theirs = ((g.num_ws, g.w_dim, g.resolution) for g in (generator, face))
    if ours != theirs:
        raise ValueError(
            f"--source {printable(source)} draws {theirs[2]}² pixels from {theirs[0]} x "
            f"{theirs[1]} latents, the drawings have {ours[2]}² from {ours[0]} x {ours[1]}; give "
            "the generator of photos that the fine-tune began with."
        )
    return frozen(face).synthesis
