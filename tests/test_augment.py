"""Augmentation: each transform against a case worked out by hand, gradients, and ADA's controller.

pytest tests/test_augment.py

Shape letters: B batch, R resolution.
"""

import math

import pytest
import torch
from torch import Tensor

from generators.augment import (
    DOWN,
    UP,
    AdaConfig,
    AdaController,
    Sample,
    ada_augment,
    colour_matrix,
    compose,
    diff_augment,
    draw_colour,
    draw_geometry,
    recolour,
    rotating,
    scaling,
    shifting,
    warp,
)

CPU = torch.device("cpu")
SIZE = 12


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def noise() -> Tensor:
    """(2, 3, 12, 12): as hard to resample as pictures get."""
    return torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64, generator=rng()) * 2 - 1


@pytest.fixture
def waves() -> Tensor:
    """(1, 1, 64, 64), smooth enough to know what lies between the pixels."""
    return wave(*centred(64))


def centred(size: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return at[None], at[:, None]


def wave(x: Tensor, y: Tensor) -> Tensor:
    return (torch.cos(x / 5 + 0.3) * torch.sin(y / 7 + 0.2) + 0.3 * torch.sin((x + y) / 4))[
        None, None
    ]


# ------------------------------------------------------------------------ DiffAugment


def test_diff_augment_draws_for_each_picture_and_repeats_itself(noise):
    same = noise[:1].expand(4, -1, -1, -1)
    once, again = diff_augment(same, rng(1)), diff_augment(same, rng(1))
    assert once.shape == same.shape and torch.equal(once, again)
    assert not any(torch.equal(once[0], other) for other in once[1:])
    assert not torch.equal(once, diff_augment(same, rng(2)))


def test_diff_augment_cuts_out_and_moves_but_keeps_the_gradient(noise):
    x = noise.clone().requires_grad_(True)
    diff_augment(x, rng(1)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad != 0).any()
    black = (diff_augment(noise, rng(1)) == 0).all(dim=1).flatten(1).double().mean(1)
    assert ((black > 1 / 16) & (black < 0.6)).all()  # a quarter of the cut at least


# ------------------------------------------------------------------------ ADA: identity


@pytest.mark.parametrize("p", [0, 0.0, torch.zeros(())])
def test_nothing_changes_at_p_0(noise, p):
    assert torch.equal(ada_augment(noise, p, rng()), noise)
    assert torch.equal(ada_augment(noise.float(), p, rng()), noise.float())


def test_with_all_groups_off_nothing_changes_at_p_1(noise):
    config = AdaConfig(blit=False, geometric=False, colour=False)
    assert torch.equal(ada_augment(noise, 1.0, rng(), config), noise)


def test_pictures_without_a_transform_stay_bit_by_bit(noise):
    many = noise[:1].expand(64, -1, -1, -1).float()
    same = (ada_augment(many, 0.05, rng()) == many).flatten(1).all(1)
    assert 0.35 < same.double().mean() < 0.85  # 0.95^11 (0.975 + …) is about 0.6


def test_the_filters_undo_each_other():
    up, down = numbers(*UP, *UP[::-1]), numbers(*DOWN, *DOWN[::-1])
    products = [float(up[2 * k :] @ down[: 12 - 2 * k]) for k in range(6)]
    assert products == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-11)
    assert float(up.sum()) == pytest.approx(math.sqrt(2), abs=1e-11)


# ------------------------------------------------------------------------ ADA: geometry


@pytest.mark.parametrize(
    "matrix, expected",
    [
        (scaling(numbers(1, 1), numbers(1, 1)), lambda x: x),
        (scaling(numbers(-1, -1), numbers(1, 1)), lambda x: x.flip(3)),
        (rotating(numbers(math.pi / 2, math.pi / 2)), lambda x: x.rot90(1, (2, 3))),
        (rotating(numbers(math.pi, -math.pi)), lambda x: x.flip(2, 3)),
        # the pixel from 3 to the right and 2 above; beyond the edge, the picture mirrored
        (
            shifting(numbers(3, 3), numbers(-2, -2)),
            lambda x: x[:, :, [2, 1, *range(10)]][..., [*range(3, 12), 10, 9, 8]],
        ),
        # several widths away: the mirrored picture repeats every 22 pixels
        (shifting(numbers(44, -66), numbers(-22, 220)), lambda x: x),
    ],
)
def test_mirroring_quarter_turns_and_whole_pixels_are_exact(noise, matrix, expected):
    assert torch.allclose(warp(noise, matrix), expected(noise), atol=1e-9)


@pytest.mark.parametrize(
    "matrix, source",
    [
        (shifting(numbers(0.5), numbers(-0.25)), lambda x, y: (x + 0.5, y - 0.25)),
        (scaling(numbers(0.8), numbers(1.25)), lambda x, y: (0.8 * x, 1.25 * y)),
        (
            rotating(numbers(math.pi / 6)),
            lambda x, y: (x * math.sqrt(0.75) - y / 2, x / 2 + y * math.sqrt(0.75)),
        ),
    ],
)
def test_between_the_pixels_it_finds_what_is_there(waves, matrix, source):
    expected = wave(*source(*centred(64)))
    inner = slice(16, 48)  # the rest sees the mirrored border
    error = (warp(waves, matrix) - expected)[..., inner, inner].abs().max()
    assert error < 0.01


def test_a_sharp_picture_stays_sharp_under_a_turn():
    x, y = centred(64)
    grating = torch.cos(x * (math.pi / 2) + 0 * y)[None, None]  # half the highest frequency
    turned = warp(grating, rotating(numbers(math.radians(30))))
    back = warp(turned, rotating(numbers(math.radians(-30))))
    inner = slice(20, 44)
    kept = (back * grating)[..., inner, inner].sum() / grating[..., inner, inner].square().sum()
    assert 0.85 < kept < 1  # plain bilinear sampling keeps 0.67


def test_shrinking_does_not_alias():
    """A grating beyond what the smaller picture can hold comes out grey, not as a false pattern."""
    x, y = centred(64)
    grating = torch.cos(x * (0.95 * math.pi) + 0 * y)[None, None]
    small = warp(grating, scaling(numbers(1.5), numbers(1.5)))
    assert small[..., 24:40, 24:40].abs().max() < 0.1  # plain bilinear sampling: 0.5


def test_composition_applies_the_last_matrix_first():
    both = compose(rotating(numbers(math.pi / 2)), shifting(numbers(2), numbers(0)))
    assert torch.allclose(both @ numbers(1, 0, 1), numbers(0, 3, 1), atol=1e-12)


def test_geometry_is_drawn_with_the_paper_s_frequencies():
    count, p = 4000, 0.5

    def share(hits: Tensor) -> float:
        return float(hits.double().mean())

    def within(chance: float) -> object:  # four standard deviations of a binomial
        return pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / count))

    blit = draw_geometry(count, 64, p, rng(1), AdaConfig(geometric=False), CPU)
    linear = blit[:, :2, :2]
    assert share(linear.det() < 0) == within(p / 2)  # half of the mirror's draws mirror
    assert share(linear[:, 0, 0].abs() < 0.5) == within(p / 2)  # 90° or 270°
    assert torch.allclose(blit, blit.round(), atol=1e-4) and blit[:, :2, 2].abs().max() < 8.01

    general = draw_geometry(count, 64, p, rng(2), AdaConfig(blit=False), CPU)
    linear, shift = general[:, :2, :2], general[:, :2, 2]
    assert share((shift == 0).all(1)) == within(1 - p)
    assert share((linear.det() - 1).abs() < 1e-5) == within(1 - p)  # isotropic scaling alone
    turned = linear[:, 0, 1].abs() > 1e-6
    assert share(turned) == within(p)  # by either of the rotations
    log_scale = linear.det().log2()[(linear.det() - 1).abs() > 1e-5] / 2
    assert float(log_scale.std()) == pytest.approx(0.2, rel=0.1)

    everything = draw_geometry(count, 64, 1.0, rng(3), AdaConfig(), CPU)
    assert not (everything == torch.eye(3)).all(2).all(1).any()


# -------------------------------------------------------------------------- ADA: colour


def colours(
    brightness: float = 0, contrast: float = 1, luma: float = 1, hue: float = 0,
    saturation: float = 1,
) -> Tensor:  # fmt: skip
    return colour_matrix(*map(numbers, (brightness, contrast, luma, hue, saturation)))


@pytest.mark.parametrize(
    "matrix, expected",
    [
        (colours(), [0.1, 0.2, 0.6]),
        (colours(brightness=0.2), [0.3, 0.4, 0.8]),
        (colours(contrast=2), [0.2, 0.4, 1.2]),
        (colours(brightness=0.2, contrast=2), [0.6, 0.8, 1.6]),  # brightness first
        (colours(luma=-1), [-0.5, -0.4, 0.0]),  # the luma 0.3 gets -0.3, the chroma stays
        (colours(brightness=0.1, luma=-1), [-0.6, -0.5, -0.1]),
        (colours(hue=2 * math.pi / 3), [0.6, 0.1, 0.2]),  # a third of the circle: R -> G -> B
        (colours(saturation=0), [0.3, 0.3, 0.3]),
        (colours(saturation=2), [-0.1, 0.1, 0.9]),
    ],
)
def test_each_colour_transform(matrix, expected):
    x = numbers(0.1, 0.2, 0.6).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert torch.allclose(recolour(x, matrix), numbers(*expected).view(1, 3, 1, 1), atol=1e-12)


def test_hue_keeps_luma_and_the_distance_to_grey(noise):
    turned = recolour(noise, colours(hue=1.0).expand(2, -1, -1))
    luma = noise.mean(1, keepdim=True)
    assert torch.allclose(turned.mean(1, keepdim=True), luma)
    assert torch.allclose((turned - luma).square().sum(1), (noise - luma).square().sum(1))


def test_colours_can_be_undone(noise):
    matrix = draw_colour(2, 1.0, rng(5), AdaConfig(), CPU).double()
    inverse = matrix[:, :, :3].inverse()
    undo = torch.cat([inverse, -inverse @ matrix[:, :, 3:]], dim=2)
    assert torch.allclose(recolour(recolour(noise, matrix), undo), noise)


def test_colours_are_drawn_with_the_paper_s_strengths():
    count, p = 4000, 0.5
    matrix = draw_colour(count, p, rng(4), AdaConfig(), CPU)
    grey = matrix[:, :, :3].sum(2)[:, 0]  # contrast, or minus contrast where the luma flips
    assert float((grey < 0).double().mean()) == pytest.approx(p / 2, abs=4 * 0.5 / math.sqrt(count))
    octaves = grey.abs().log2()
    assert float((octaves.abs() < 1e-5).double().mean()) == pytest.approx(1 - p, abs=0.035)
    assert float(octaves[octaves.abs() > 1e-5].std()) == pytest.approx(0.5, rel=0.1)
    brightness = matrix[:, 0, 3] / grey
    assert float((brightness == 0).double().mean()) == pytest.approx(1 - p, abs=0.035)
    assert float(brightness[brightness != 0].std()) == pytest.approx(0.2, rel=0.1)
    chroma = matrix[:, :, :3].det().abs() / grey.abs() ** 3  # saturation squared
    saturation = chroma.log2() / 2
    assert float(saturation[saturation.abs() > 1e-4].std()) == pytest.approx(1, rel=0.1)


# --------------------------------------------------------------------- ADA: as a whole


def test_gradients_first_and_second():
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64, generator=rng()).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: ada_augment(x, 1.0, rng(3)), x, fast_mode=True)
    x = torch.rand(1, 1, 3, 3, dtype=torch.float64, generator=rng()).requires_grad_(True)
    grid = torch.rand(1, 4, 2, 2, dtype=torch.float64, generator=rng(1)) * 2 - 1
    assert torch.autograd.gradgradcheck(lambda x: Sample.apply(x, grid).pow(3), x)


def test_r1_through_the_augmentation_is_finite_and_reaches_the_discriminator(noise):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Softplus(), torch.nn.Flatten())
    x = noise.float().requires_grad_(True)
    (gradient,) = torch.autograd.grad(
        net(ada_augment(x, torch.ones(()), rng())).sum(), x, create_graph=True
    )
    gradient.square().sum().backward()
    weight = net[0].weight.grad
    assert weight is not None and weight.isfinite().all() and (weight != 0).any()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad != 0).any()


def test_draws_belong_to_the_picture_and_the_seed(noise):
    same = noise[:1].expand(4, -1, -1, -1)
    once = ada_augment(same, 0.9, rng(1))
    assert torch.equal(once, ada_augment(same, torch.tensor(0.9), rng(1)))
    assert not torch.equal(once, ada_augment(same, 0.9, rng(2)))
    assert not any(torch.equal(once[0], other) for other in once[1:])


@pytest.mark.parametrize("batch, size", [(1, 4), (1, 33), (3, 64)])
def test_sizes_layouts_and_autocast(batch, size):
    x = torch.rand(batch, 3, size, size, generator=rng())
    plain = ada_augment(x, 1.0, rng(1))
    assert plain.shape == x.shape and plain.isfinite().all()
    last = x.to(memory_format=torch.channels_last)
    assert torch.allclose(ada_augment(last, 1.0, rng(1)), plain, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ada_augment(x, 1.0, rng(1)), plain)
        half = ada_augment(x.bfloat16(), 1.0, rng(1))
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), plain, atol=0.1)


# -------------------------------------------------------------------------- controller


def watch(controller: AdaController, logits: Tensor, updates: int) -> float:
    for _ in range(updates):
        controller.observe(logits)
        controller.observe(logits)
        controller.update()
    return float(controller.p)


def test_p_rises_with_overfitting_falls_without_and_stays_within_0_and_1():
    sure, unsure = torch.ones(5, 2), torch.tensor([[1.0, -1.0]] * 4 + [[1.0, 1.0]])  # r_t 1, 0.2
    controller = AdaController(target=0.6, images_to_full=100)
    assert watch(controller, unsure, 1) == 0
    assert watch(controller, sure, 3) == pytest.approx(0.3)  # 10 pictures each, of 100
    logged = controller.p
    assert watch(controller, unsure, 1) == pytest.approx(0.2)
    assert float(logged) == pytest.approx(0.3)  # what was logged stays
    assert watch(controller, sure, 20) == 1
    assert watch(controller, unsure, 20) == 0


def test_p_looks_at_signs_and_not_at_sizes():
    controller = AdaController(target=0.6, images_to_full=100)
    assert watch(controller, torch.tensor([[100.0], [-0.1]]), 1) == 0  # r_t 0
    assert watch(controller, torch.tensor([[0.1], [0.1]]), 1) > 0  # r_t 1


def test_an_update_without_pictures_changes_nothing():
    controller = AdaController(images_to_full=100)
    watch(controller, torch.ones(5, 1), 1)
    controller.update()
    assert float(controller.p) == pytest.approx(0.1)


def test_a_controller_that_is_loaded_goes_on_as_if_never_stopped():
    first, second = AdaController(images_to_full=100), AdaController(images_to_full=100)
    watch(first, torch.ones(5, 1), 2)
    first.observe(-torch.ones(30, 1))  # in the middle of an interval
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.observe(torch.ones(5, 1))
        controller.update()
    assert float(first.p) == float(second.p) == 0  # 35 pictures down from 0.2


def test_it_hands_the_augmentation_its_p(noise):
    controller = AdaController(images_to_full=10)
    assert torch.equal(ada_augment(noise, controller.p, rng()), noise)
    watch(controller, torch.ones(5, 1), 1)
    assert not torch.equal(ada_augment(noise, controller.p, rng()), noise)
