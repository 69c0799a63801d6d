"""Freezing, swapping and blending of blocks, on known cases and to the bit.

pytest tests/test_blocks.py
"""

import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from generators.blocks import (
    SwappedSynthesis,
    blend,
    freeze_discriminator,
    freeze_generator,
    main,
    swap,
    swap_grid,
)
from generators.checkpoint import save
from generators.images import open_image
from generators.latents import StyleLimit

RESOLUTIONS = (4, 8, 16)


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --------------------------------------------------------------------------- freezing


@pytest.mark.parametrize("below", RESOLUTIONS)
def test_freeze_generator_trains_late_blocks_only(face, below):
    trainable = freeze_generator(face, below)
    late = tuple(f"synthesis.b{r}." for r in RESOLUTIONS if r >= below)
    expected = {
        name
        for name, _ in face.named_parameters()
        if name.startswith(late) and name != "synthesis.b4.const"
    }
    assert set(trainable) == expected
    assert {n for n, p in face.named_parameters() if p.requires_grad} == expected


def test_frozen_tensors_do_not_move_and_free_ones_do(face):
    before = copy.deepcopy(face.state_dict())
    trainable = freeze_generator(face, below=8)
    optimiser = torch.optim.SGD([p for p in face.parameters() if p.requires_grad], lr=1.0)
    face(torch.randn(2, face.z_dim)).square().mean().backward()
    optimiser.step()
    moved = {name for name, tensor in face.state_dict().items() if not tensor.equal(before[name])}
    assert moved == set(trainable)


def test_freezing_again_undoes_the_first(face):
    freeze_generator(face, 16)
    again = freeze_generator(face, 8)
    assert any(name.startswith("synthesis.b8.") for name in again)


@pytest.mark.parametrize("blocks, fixed", [(0, ()), (1, ("b16.",)), (2, ("b16.", "b8."))])
def test_freeze_discriminator_starts_at_the_image(discriminator, blocks, fixed):
    trainable = freeze_discriminator(discriminator, blocks)
    assert "b4.out.weight" in trainable
    for name, parameter in discriminator.named_parameters():
        assert parameter.requires_grad == (name in trainable) == (not name.startswith(fixed or " "))


def test_names_of_a_shared_prefix_are_told_apart(generator_from_seed, tiny_config):
    wide = replace(tiny_config, resolution=128, widths=(2,) * 6)
    trainable = freeze_generator(generator_from_seed(1, wide), below=64)
    assert {name.split(".")[1] for name in trainable} == {"b64", "b128"}


@pytest.mark.parametrize("wrong", [0, 2, 12, 32, -8])
def test_invalid_resolutions_list_the_valid_ones(face, anime, wrong):
    for call in (
        lambda: freeze_generator(face, wrong),
        lambda: swap(face, anime, wrong),
        lambda: blend(face, anime, wrong, 1.0),
        lambda: SwappedSynthesis(face, anime, wrong),
    ):
        with pytest.raises(ValueError, match="choose one of 4, 8, 16"):
            call()


@pytest.mark.parametrize("wrong", [-1, 3])
def test_invalid_number_of_blocks(discriminator, wrong):
    with pytest.raises(ValueError, match="0 to 2"):
        freeze_discriminator(discriminator, wrong)


# ------------------------------------------------------------------- swapping, blending


@pytest.mark.parametrize("swap_resolution", RESOLUTIONS)
def test_swap_takes_each_tensor_from_its_side(face, anime, swap_resolution):
    before = copy.deepcopy((face.state_dict(), anime.state_dict()))
    late = tuple(f"synthesis.b{r}." for r in RESOLUTIONS if r >= swap_resolution)
    swapped = swap(face, anime, swap_resolution).state_dict()
    for name, tensor in swapped.items():
        source = anime if name.startswith(late) else face
        assert torch.equal(tensor, source.state_dict()[name]), name
    for tensor in swapped.values():
        tensor.zero_()  # a copy, not a view
    assert same(face.state_dict(), before[0]) and same(anime.state_dict(), before[1])


@pytest.mark.parametrize("width", [0.0, 1e-9])
@pytest.mark.parametrize("swap_resolution", RESOLUTIONS)
def test_a_blend_without_width_is_a_swap(face, anime, swap_resolution, width):
    blended = blend(face, anime, swap_resolution, width)
    assert same(blended.state_dict(), swap(face, anime, swap_resolution).state_dict())


def test_blend_has_the_stated_shares(face, anime):
    blended = blend(face, anime, 8, width=0.7)
    for resolution, doublings in ((4, -0.5), (8, 0.5), (16, 1.5)):
        share = torch.sigmoid(torch.tensor(doublings / 0.7))
        name = f"synthesis.b{resolution}.conv1.weight"
        a, b = face.state_dict()[name], anime.state_dict()[name]
        torch.testing.assert_close(blended.state_dict()[name], (1 - share) * a + share * b)
    assert torch.equal(blended.w_avg, face.w_avg)
    assert torch.equal(blended.mapping.fc0.weight, face.mapping.fc0.weight)


def test_identical_generators_give_themselves(face):
    twin = copy.deepcopy(face)
    assert same(swap(face, twin, 8).state_dict(), face.state_dict())
    assert same(blend(face, twin, 8, 0.9).state_dict(), face.state_dict())


@pytest.mark.parametrize("width", [-0.1, float("nan"), float("inf")])
def test_blend_refuses_a_senseless_width(face, anime, width):
    with pytest.raises(ValueError, match="0 or more doublings"):
        blend(face, anime, 8, width)


@pytest.mark.parametrize("change", [{"widths": (8, 6, 2)}, {"conv_clamp": 256.0}, {"z_dim": 4}])
def test_pairs_of_different_architecture_are_refused(
    face, generator_from_seed, tiny_config, change
):
    other = generator_from_seed(2, replace(tiny_config, **change))
    for function in (swap, SwappedSynthesis):
        with pytest.raises(ValueError, match=f"differ .*{next(iter(change))}"):
            function(face, other, 8)


def test_the_spelling_of_the_channels_does_not_matter(generator_from_seed, tiny_config):
    by_rule = replace(tiny_config, widths=(), channel_base=32, channel_max=6)
    by_hand = replace(tiny_config, widths=(6, 4, 2))
    swap(generator_from_seed(1, by_rule), generator_from_seed(2, by_hand), 8)


# ---------------------------------------------------------------------- one synthesis


@pytest.mark.parametrize("noise_mode", ["const", "none"])
@pytest.mark.parametrize("swap_resolution", RESOLUTIONS)
def test_swapped_synthesis_equals_swap_to_the_bit(face, anime, ws, swap_resolution, noise_mode):
    synthesis = SwappedSynthesis(face, anime, swap_resolution, style_limit=math.inf)
    reconstruction, drawn = synthesis(ws, noise_mode, both=True)
    assert drawn.shape == (3, 3, 16, 16)
    assert torch.equal(drawn, swap(face, anime, swap_resolution).synthesis(ws, noise_mode))
    assert torch.equal(reconstruction, face.synthesis(ws, noise_mode))
    assert torch.equal(drawn, synthesis(ws, noise_mode))
    assert not torch.equal(drawn, reconstruction)


def test_only_the_late_blocks_of_anime_see_limited_styles(face, anime, ws):
    ws = 10 * ws
    limited = StyleLimit(face, 8, 0.5)(ws)
    assert not torch.equal(limited, ws)
    reconstruction, drawn = SwappedSynthesis(face, anime, 8, style_limit=0.5)(ws, both=True)
    assert torch.equal(reconstruction, face.synthesis(ws))
    trunk = face.synthesis.run_blocks([4], None, None, ws)
    assert torch.equal(drawn, anime.synthesis.run_blocks([8, 16], *trunk, limited)[1])


@pytest.mark.parametrize("both", [False, True])
def test_the_shared_trunk_is_computed_once(face, anime, ws, both):
    synthesis = SwappedSynthesis(face, anime, 16)
    calls: Counter[str] = Counter()
    for side, part in (("face", synthesis.face), ("anime", synthesis.tail("anime"))):
        for name, block in part.named_children():
            block.register_forward_hook(lambda *_, key=f"{side}.{name}": calls.update([key]))
    synthesis(ws, both=both)
    expected = {"face.b4": 1, "face.b8": 1, "anime.b16": 1}
    assert calls == (expected | {"face.b16": 1} if both else expected)


def test_gradients_reach_ws_from_both_images(face, anime, ws):
    ws.requires_grad_()
    reconstruction, drawn = SwappedSynthesis(face, anime, 8)(ws, both=True)
    (from_drawn,) = torch.autograd.grad(drawn.sum(), ws, retain_graph=True)
    (from_both,) = torch.autograd.grad((reconstruction + drawn).sum(), ws)
    (alone,) = torch.autograd.grad(face.synthesis(ws).sum(), ws)
    torch.testing.assert_close(from_both, from_drawn + alone, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- grids


@torch.no_grad()
def test_swap_grid_grows_by_one_block_a_column(face, anime, ws):
    pictures = swap_grid(face, anime, ws)
    assert pictures.shape == (3, 4, 3, 16, 16)
    assert torch.equal(pictures[:, 0], face.synthesis(ws).clamp(-1, 1))
    for n, resolution in enumerate((16, 8, 4), 1):
        drawn = swap(face, anime, resolution).synthesis(ws).clamp(-1, 1)
        assert torch.equal(pictures[:, n], drawn)
        assert not torch.equal(pictures[:, n], pictures[:, n - 1])


@torch.no_grad()
def test_swap_grid_blends(face, anime, ws):
    pictures = swap_grid(face, anime, ws, "blend", width=0.7)
    drawn = blend(face, anime, 8, 0.7).synthesis(ws).clamp(-1, 1)
    assert torch.equal(pictures[:, 2], drawn)
    assert torch.equal(swap_grid(face, anime, ws, "blend", 0.0), swap_grid(face, anime, ws))


@pytest.fixture
def command(tmp_path, face, anime):
    """Runs `python -m generators.blocks face anime --grid out/grid.png OPTIONS`: its exit code."""
    files = []
    for name, module in (("face", face), ("anime", anime)):
        files.append(str(tmp_path / f"{name}.safetensors"))
        save(files[-1], module)

    def run(*options: object) -> int:
        return main([*files, "--grid", str(tmp_path / "out" / "grid.png"), *map(str, options)])

    return run


@pytest.fixture
def drawn(command, tmp_path):
    """The same: the picture."""

    def run(*options: object) -> Image.Image:
        assert command(*options, "--overwrite") == 0
        return open_image(tmp_path / "out" / "grid.png")

    return run


def test_the_command_draws_faces_from_a_seed(drawn):
    picture = drawn("--faces", 2, "--size", 32)
    assert picture.width == 4 * 32 and 64 < picture.height < 96
    assert drawn("--faces", 2, "--size", 32).tobytes() == picture.tobytes()
    for options in (("--seed", 1), ("--truncation", 1), ("--mode", "blend", "--width", 1)):
        other = drawn("--faces", 2, "--size", 32, *options)
        assert other.size == picture.size and other.tobytes() != picture.tobytes()


def test_the_command_takes_latents(drawn, tmp_path, face, ws):
    save_file({"ws": ws}, tmp_path / "all.safetensors")
    save_file({"ws": ws[1]}, tmp_path / "one.safetensors")
    rows = drawn("--latents", tmp_path / "all.safetensors", "--size", 16)
    one = drawn("--latents", tmp_path / "one.safetensors", "--size", 16)
    assert rows.height - one.height == 2 * 16
    top = one.height - 16
    assert one.crop((0, top, 64, top + 16)).tobytes() == (
        rows.crop((0, top + 16, 64, top + 32)).tobytes()
    )


@pytest.mark.parametrize(
    "tensors, complaint",
    [
        ({"w": torch.zeros(6, 8)}, "needs a tensor `ws` of shape (N, 6, 8), and has none"),
        ({"ws": torch.zeros(2, 5, 8)}, "(N, 6, 8), and has one of shape (2, 5, 8)"),
        ({"ws": torch.zeros(0, 6, 8)}, "(N, 6, 8), and has one of shape (0, 6, 8)"),
        ({"ws": torch.full((6, 8), torch.nan)}, "ws has values that are not finite"),
    ],
)
def test_foreign_latents_are_one_sentence(command, tmp_path, capsys, tensors, complaint):
    save_file(tensors, tmp_path / "latents.safetensors")
    assert command("--latents", tmp_path / "latents.safetensors") == 2
    assert not (tmp_path / "out").exists()
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("--faces", 0),
        ("--size", 1_000_000),
        ("--mode", "blend", "--width", -1),
        ("--truncation", "nan"),
    ],
)
def test_the_command_refuses_what_it_cannot_draw(command, capsys, options):
    with pytest.raises(SystemExit) as exit:
        command(*options)
    assert exit.value.code == 2 and " must be " in capsys.readouterr().err


def test_the_command_replaces_no_picture_unasked(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "grid.png").write_text("mine")
    assert command("--faces", 1) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "grid.png").read_text() == "mine"
    assert command("--faces", 1, "--overwrite") == 0
