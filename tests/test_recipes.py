"""Recipes of two generators: what they are at their ends, and the files of each command.

pytest tests/test_recipes.py
"""

import math
import resource

import pytest
import torch
from pictures import photo
from safetensors.torch import save_file

from encoder import recipes
from encoder.losses import LossSet
from encoder.model import Encoder, EncoderConfig
from encoder.search import Search
from generators.blocks import SwappedSynthesis, swap
from generators.checkpoint import save
from generators.dcgan import DcganConfig, DcganGenerator
from generators.images import open_image, to_pil, to_tensor
from generators.superres import SuperResolution, SuperResolutionConfig

Z, W = Search(steps=12, space="z", candidates=4), Search(steps=12, space="w+")


@pytest.fixture
def losses() -> LossSet:
    return LossSet({"mse": 1.0})


@pytest.fixture
def models(tmp_path, face, anime) -> list[str]:
    """The options that name three tiny networks."""
    torch.manual_seed(5)
    shape = EncoderConfig(resolution=16, num_ws=6, w_dim=8, width=16, depth=1)
    encoder = Encoder(shape).eval()
    with torch.no_grad():
        encoder.to_offsets.mul_(20)  # offsets large enough to be seen
    networks = {"face-generator": face, "anime-generator": anime, "encoder": encoder}
    options = ["--no-align"]
    for name, network in networks.items():
        save(tmp_path / "models" / f"{name}.safetensors", network)
        options += [f"--{name}", str(tmp_path / "models" / f"{name}.safetensors")]
    return options


@pytest.fixture
def run(models, capsys):
    """Command and options -> exit code and what was printed."""

    def call(command: str, *options: object) -> tuple[int, str]:
        try:
            code = recipes.main([command, *models, *map(str, options)])
        except SystemExit as stopped:  # tyro's, for values that cannot be
            code = int(str(stopped.code))
        return code, " ".join(capsys.readouterr().err.split())

    return call


@pytest.fixture
def picture(tmp_path):
    photo(1).save(tmp_path / "me.png")
    return tmp_path / "me.png"


def close(image: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for rounding, within [-1, 1]."""
    return torch.allclose(image.clamp(-1, 1), other.clamp(-1, 1), atol=1e-5)


# ------------------------------------------------------------------------------- cross-domain


def test_swapping_no_block_is_the_face_generator_and_all_blocks_the_fine_tune(face, anime, ws):
    assert torch.equal(recipes.last_blocks(face, anime, 0)(ws), face.synthesis(ws))
    assert torch.equal(recipes.last_blocks(face, anime, 3)(ws), anime.synthesis(ws))
    one = recipes.last_blocks(face, anime, 1)(ws)
    assert close(one, swap(face, anime, 16).synthesis(ws))
    for n in (-1, 4):
        with pytest.raises(ValueError, match="3 blocks"):
            recipes.last_blocks(face, anime, n)


def test_cross_domain_searches_each_stage_for_the_one_before(face, anime, losses):
    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(7))
    target = face(z).clamp(-1, 1)
    made = recipes.cross_domain(
        face, anime, target, (0, 1, 3), losses=losses, face_search=Z, anime_search=W
    )
    ws = face.map(made.z)
    assert close(made.reconstruction, face.synthesis(ws))
    assert close(made.swapped[0], made.reconstruction)
    assert close(made.swapped[1], swap(face, anime, 16).synthesis(ws))
    assert close(made.swapped[2], anime.synthesis(ws))
    for i in range(3):
        assert close(made.final[i], anime.synthesis(made.ws[i]))
    blind = recipes.cross_domain(
        face,
        anime,
        target,
        (3,),
        losses=losses,
        face_search=Search(0, "z", candidates=1),
        anime_search=Search(0),
    )
    found, guessed = (losses(x.reconstruction, target)[0] for x in (made, blind))
    assert (found < guessed).all()
    start = losses(anime.synthesis(ws), made.swapped[1])[0]  # where the second search starts
    assert (losses(made.final[1], made.swapped[1])[0] < start).all()
    assert close(blind.final[0], blind.swapped[0])  # all blocks: it starts where it wants to go


def test_cross_domain_in_w_gives_one_w_to_all_layers(face, anime, losses, ws):
    target = face.synthesis(ws[:1]).clamp(-1, 1)
    search = Search(steps=2, space="w")
    made = recipes.cross_domain(
        face, anime, target, (1,), losses=losses, face_search=Z, anime_search=search
    )
    assert made.ws.shape == (1, 1, 6, 8)
    assert torch.equal(made.ws, made.ws[:, :, :1].expand(-1, -1, 6, -1))


def test_cross_domain_writes_a_sheet_and_the_final_pictures(run, picture, tmp_path):
    out = tmp_path / "out"
    options = ["--steps", 2, "--candidates", 2, "--size", 20, "--last-blocks", 1, 2]
    code, said = run("cross-domain", "--input", picture, "--output", out, *options)
    assert code == 0 and "1 of 1 pictures done" in said
    names = {"me_sheet.png", "me_n1.png", "me_n2.png", "manifest.jsonl"}
    assert {file.name for file in out.iterdir()} == names
    sheet = open_image(out / "me_sheet.png")
    assert sheet.width == 3 * 20 and sheet.height > 2 * 20  # and a line of labels
    assert open_image(out / "me_n1.png").size == (16, 16)


# -------------------------------------------------------------------------------- concatenate


def test_concatenate_at_its_ends_is_one_of_the_generators(face, anime, ws):
    coarse, fine = ws[:2], ws[1:]
    made = recipes.concatenate(face, anime, coarse, fine, (0, 6))
    assert close(made[0], anime.synthesis(fine)) and close(made[1], face.synthesis(coarse))


@pytest.mark.parametrize(("split", "resolution"), [(2, 8), (3, 16), (4, 16)])
def test_concatenate_swaps_the_blocks_whose_layers_are_all_fine(face, anime, ws, split, resolution):
    coarse, fine = ws[:2], ws[1:]
    (made,) = recipes.concatenate(face, anime, coarse, fine, (split,))
    mixed = torch.cat([coarse[:, :split], fine[:, split:]], dim=1)
    assert close(made, swap(face, anime, resolution).synthesis(mixed))


def test_concatenate_refuses_a_split_outside(face, anime, ws):
    for split in (-1, 7):
        with pytest.raises(ValueError, match="0 to 6"):
            recipes.concatenate(face, anime, ws, ws, (split,))


@pytest.mark.parametrize("other", [False, True])
def test_concatenate_writes_a_sheet_with_a_column_per_split(run, picture, tmp_path, other):
    out = tmp_path / "out"
    options = ["--steps", 2, "--size", 20, "--splits", 2, 4]
    if other:
        photo(2).save(tmp_path / "other.png")
        options += ["--fine", tmp_path / "other.png"]
    assert run("concatenate", "--input", picture, "--output", out, *options)[0] == 0
    names = {file.name for file in out.iterdir()}
    assert names == {"me_sheet.png", "me_split2.png", "me_split4.png", "manifest.jsonl"}
    assert open_image(out / "me_sheet.png").width == (6 if other else 5) * 20


# -------------------------------------------------------------------------------- interpolate


@pytest.mark.parametrize("space", ["z", "w+"])
def test_an_interpolation_passes_through_its_keys(face, ws, space):
    keys = ws if space == "w+" else torch.randn(3, 8)
    draw = face.synthesis if space == "w+" else face
    film = recipes.interpolate(keys, 5, draw)
    assert film.shape == (9, 3, 16, 16)
    assert close(film[[0, 4, 8]], draw(keys))
    assert not close(film[2], draw(keys)[0]) and not close(film[2], draw(keys)[1])


def test_the_middle_is_the_mean_in_w_and_keeps_its_length_in_z(ws):
    seen = []

    def draw(latents: torch.Tensor) -> torch.Tensor:
        seen.append(latents)
        return torch.zeros(len(latents), 3, 4, 4)

    recipes.interpolate(ws[:2], 3, draw)
    torch.testing.assert_close(seen[0][1], ws[:2].mean(dim=0))
    z = torch.eye(2, 8)
    recipes.interpolate(z, 3, draw)
    torch.testing.assert_close(seen[1][1], z.sum(dim=0) / 2**0.5)


def test_a_loop_comes_back_without_a_frame_twice(face, ws):
    film = recipes.interpolate(ws[:2], 4, face.synthesis, loop=True)
    assert len(film) == 6
    assert torch.equal(film[4:], film[1:3].flip(0))
    assert not close(film[5], film[0])


def test_one_latent_is_no_interpolation(face, ws):
    for keys, frames in ((ws[:1], 5), (ws, 1)):
        with pytest.raises(ValueError, match="two"):
            recipes.interpolate(keys, frames, face.synthesis)


def test_latents_files_become_a_film_whose_ends_are_their_pictures(run, face, anime, ws, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file({"ws": ws[0].clone()}, files[0])
    save_file({"ws": ws[1:].clone()}, files[1])  # two keys
    for option, synthesis in ((), face.synthesis), (("--anime",), SwappedSynthesis(face, anime, 8)):
        film = tmp_path / "film.png"
        options = ["--output", film, "--frames", 2, "--swap-resolution", 8, *option]
        assert run("interpolate", "--input", *files, *options, "--overwrite")[0] == 0
        sheet = to_tensor(open_image(film))  # two by two, the last place empty
        shown = torch.stack([sheet[:, :16, :16], sheet[:, :16, 16:], sheet[:, 16:, :16]])
        expected = torch.stack([to_tensor(to_pil(image)) for image in synthesis(ws)])
        assert (shown - expected).abs().max() <= 2.1 / 255


def test_pictures_become_an_enlarged_film_that_loops(run, picture, tmp_path):
    photo(2).save(tmp_path / "you.png")
    save(tmp_path / "sr.safetensors", SuperResolution(SuperResolutionConfig(width=4, blocks=1)))
    film = tmp_path / "new" / "film.png"
    options = ["--refine-steps", 2, "--frames", 4, "--loop", "--size", 24]
    options += ["--superres", tmp_path / "sr.safetensors", "--output", film]
    code, said = run("interpolate", "--input", picture, tmp_path / "you.png", *options)
    assert code == 0, said
    assert open_image(film).size == (3 * 24, 2 * 24)  # six frames, none twice


def test_latents_of_a_dcgan(tmp_path, capsys):
    generator = DcganGenerator(DcganConfig(resolution=8, z_dim=6, width=4)).eval()
    save(tmp_path / "dcgan.safetensors", generator)
    z = torch.randn(2, 6)
    save_file({"z": z}, tmp_path / "z.safetensors")
    film = tmp_path / "film.png"
    options = ["--output", film, "--frames", 2, "--face-generator", tmp_path / "dcgan.safetensors"]
    command = ["interpolate", "--input", tmp_path / "z.safetensors", *options]
    assert recipes.main([*map(str, command)]) == 0
    shown = to_tensor(open_image(film))
    with torch.no_grad():
        expected = torch.cat(list(generator(z)), dim=-1)
    assert (shown - expected).abs().max() <= 2.1 / 255
    assert recipes.main([*map(str, command), "--anime", "--overwrite"]) == 2
    assert "DCGAN" in capsys.readouterr().err


# ------------------------------------------------------------------------------ users' errors


@pytest.mark.parametrize("command", ["cross-domain", "concatenate", "interpolate"])
def test_a_missing_file_is_one_sentence(run, tmp_path, command):
    output = tmp_path / ("film.gif" if command == "interpolate" else "out")
    code, said = run(command, "--input", tmp_path / "none.png", "--output", output)
    assert code == 2 and "none.png" in said and "Traceback" not in said
    assert not output.exists()


def test_what_does_not_fit_is_said(run, picture, ws, tmp_path):
    save_file({"ws": ws[:, :4].clone()}, tmp_path / "short.safetensors")
    save_file({"z": torch.randn(8)}, tmp_path / "z.safetensors")
    film = ["--output", tmp_path / "film.gif"]
    for files, words in (
        (["short.safetensors", "z.safetensors"], "`ws`"),
        (["me.png", "z.safetensors"], "one space"),
        (["me.png"], "two"),
    ):
        inputs = [tmp_path / name for name in files]
        code, said = run("interpolate", "--input", *inputs, *film, "--refine-steps", 1)
        assert code == 2 and words in said
    code, said = run("interpolate", "--input", picture, picture, "--output", tmp_path / "film.avi")
    assert code == 2 and ".mp4" in said
    options = ["--splits", 2, "--steps", 1]
    code, said = run("concatenate", "--input", picture, "--output", picture, *options)
    assert code == 2 and "is not a folder" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["interpolate", "--fps", 0], "--fps"),
        (["interpolate", "--fps", -3], "--fps"),
        (["interpolate", "--frames", 1], "--frames"),
        (["interpolate", "--size", 1_000_000], "--size"),
        (["interpolate", "--device", "meta"], "device meta"),
        (["cross-domain", "--size", 1_000_000], "--size"),
        (["cross-domain", "--last-blocks", 1, 9], "3 blocks"),
        (["cross-domain", "--device", "cuda:9"], "device cuda:9"),
        (["concatenate", "--splits", 7], "0 to 6"),
        (["concatenate", "--steps", -1], "steps"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(
    run, picture, tmp_path, options, words
):
    output = tmp_path / ("film.gif" if options[0] == "interpolate" else "out")
    code, said = run(options[0], "--input", picture, "--output", output, *options[1:])
    assert code == 2 and words in said and not output.exists()


def test_latents_that_are_not_finite_become_no_film(run, ws, tmp_path):
    save_file({"ws": ws * math.nan}, tmp_path / "nan.safetensors")
    film = tmp_path / "film.gif"
    code, said = run("interpolate", "--input", tmp_path / "nan.safetensors", "--output", film)
    assert code == 2 and "finite" in said and not film.exists()


# ------------------------------------------------------------------------------- existing files


QUICK = ["--steps", 1, "--candidates", 1, "--last-blocks", 1, "--size", 16]


def test_a_broken_picture_leaves_no_neighbour_undone(run, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a", "c"):
        photo(1).save(folder / f"{name}.png")
    (folder / "b.png").write_bytes(b"no picture")
    code, said = run("cross-domain", "--input", folder, "--output", out, *QUICK)
    assert code == 1 and "b.png" in said and "2 of 3 pictures done" in said
    names = {f"{name}_{end}.png" for name in "ac" for end in ("sheet", "n1")}
    assert {file.name for file in out.iterdir()} == names | {"manifest.jsonl"}
    code, said = run("cross-domain", "--input", folder, "--output", out, *QUICK)
    assert code == 1 and "2 of 3 pictures are finished already" in said


@pytest.mark.parametrize("command", ["cross-domain", "concatenate"])
def test_pictures_are_replaced_only_when_told(run, picture, tmp_path, command):
    out, mine = tmp_path / "out", tmp_path / "out" / "me_sheet.png"
    out.mkdir()
    mine.write_text("mine")
    options = ["--steps", 1, "--last-blocks" if command == "cross-domain" else "--splits", 1]
    code, said = run(command, "--input", picture, "--output", out, *options)
    assert code == 2 and "me_sheet.png exists" in said and mine.read_text() == "mine"
    assert run(command, "--input", picture, "--output", out, *options, "--overwrite")[0] == 0
    assert mine.read_bytes()[:4] != b"mine"


@pytest.mark.parametrize("name", ["film.mp4", "film.gif", "film.png"])
def test_a_film_is_replaced_only_when_told(run, ws, tmp_path, name):
    save_file({"ws": ws}, tmp_path / "ws.safetensors")
    film = tmp_path / name
    film.write_text("mine")
    options = ["--input", tmp_path / "ws.safetensors", "--output", film, "--frames", 2]
    code, said = run("interpolate", *options)
    assert code == 2 and f"{name} exists" in said and film.read_text() == "mine"
    code, said = run("interpolate", *options, "--overwrite")
    assert code == 0 and film.read_bytes()[:4] != b"mine"


@pytest.mark.parametrize("name", ["film.mp4", "film.gif", "film.png"])
def test_a_film_for_which_there_is_no_room_is_one_sentence(run, ws, tmp_path, name):
    save_file({"ws": ws}, tmp_path / "ws.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        options = ["--input", tmp_path / "ws.safetensors", "--output", tmp_path / name]
        code, said = run("interpolate", *options, "--frames", 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "File too large" in said and name in said
    assert not [file for file in tmp_path.iterdir() if file.name.startswith((".", "film"))]


def test_a_film_below_a_file_is_refused_before_anything_is_loaded(run, picture, ws, tmp_path):
    save_file({"ws": ws}, tmp_path / "ws.safetensors")
    options = ["--input", tmp_path / "ws.safetensors", "--face-generator", "nowhere"]
    code, said = run("interpolate", *options, "--output", picture / "film.gif")
    assert code == 2 and "is not a folder" in said
