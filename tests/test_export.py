"""Exported networks give torch's results at any batch size; a file that does not is not kept.

pytest tests/test_export.py
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from encoder.export import FILES, compare, export_networks, main, write_model
from encoder.graphs import encoder_model, mtcnn_model, synthesis_model
from encoder.model import Encoder, EncoderConfig
from generators import checkpoint, convert
from generators.blocks import SwappedSynthesis
from generators.stylegan2 import Generator, GeneratorConfig

GOLDEN = Path(__file__).parent / "golden"
onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")


@pytest.fixture(scope="module")
def tiny_encoder() -> Encoder:
    torch.manual_seed(5)
    config = EncoderConfig("test_efficientnet", 16, 6, 8, width=16, heads=2, depth=1, most_tokens=2)
    return Encoder(config).eval().requires_grad_(False)


def run(model, **inputs: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def drawn(network: SwappedSynthesis, ws: torch.Tensor, **how) -> list[np.ndarray]:
    """Torch's anime and reconstruction."""
    reconstruction, anime = network(ws, both=True, **how)
    return [x.clamp(-1, 1).numpy() for x in (anime, reconstruction)]


@pytest.mark.parametrize("limit", [1.5, float("inf")])
@pytest.mark.parametrize("swap", [4, 8, 16])
def test_a_synthesis_is_torchs_at_any_batch_and_swap(face, anime, ws, swap, limit) -> None:
    network = SwappedSynthesis(face, anime, 8, limit)
    model = synthesis_model(network, swap_resolution=swap)
    onnx.checker.check_model(model, full_check=True)
    for batch in (ws[:1], ws):
        wanted = drawn(network, batch, swap_resolution=swap)
        for got, right in zip(run(model, ws=batch.numpy()), wanted, strict=True):
            np.testing.assert_allclose(got, right, atol=1e-5)


def test_colours_can_be_an_input(face, anime, ws) -> None:
    network = SwappedSynthesis(face, anime, 8)
    model = synthesis_model(network, both=False, colours=True)
    made = [run(model, ws=ws.numpy(), colours=np.array(x, np.float32))[0] for x in (0, 0.7)]
    np.testing.assert_allclose(made[0], drawn(network, ws)[0], atol=1e-5)
    np.testing.assert_allclose(made[1], drawn(network, ws, colours=0.7)[0], atol=1e-5)
    assert np.abs(made[1] - made[0]).max() > 1e-3


def test_a_clamp_is_kept(generator_from_seed, tiny_config, ws) -> None:
    face, anime = (generator_from_seed(s, replace(tiny_config, conv_clamp=0.3)) for s in (1, 2))
    network = SwappedSynthesis(face, anime, 8)
    model = synthesis_model(network)
    assert sum(node.op_type == "Clip" for node in model.graph.node) > 2
    for got, right in zip(run(model, ws=ws.numpy()), drawn(network, ws), strict=True):
        np.testing.assert_allclose(got, right, atol=1e-5)


def test_half_precision_does_not_overflow(face, anime, ws) -> None:
    """Styles of thousands, as trained networks have them, whose sums would be beyond 65504."""
    with torch.no_grad():
        for generator in (face, anime):
            for name, parameter in generator.synthesis.named_parameters():
                if "conv" in name and name.endswith("affine.bias"):
                    parameter.mul_(3e4)
    network = SwappedSynthesis(face, anime, 8)
    for got, right in zip(
        run(synthesis_model(network, "fp16"), ws=ws.numpy()), drawn(network, ws), strict=True
    ):
        mse = np.square(got - right).mean() / np.ptp(right) ** 2
        assert -10 * np.log10(mse) > 45, "styles are to be normalised before half precision"


@pytest.mark.parametrize("dtype", ["fp16", "mixed"])
def test_half_of_the_weights_is_half_of_the_file(generator_from_seed, dtype) -> None:
    shape = GeneratorConfig(16, 32, 32, 2, widths=(64, 64, 64))
    network = SwappedSynthesis(generator_from_seed(1, shape), generator_from_seed(2, shape), 8)
    sizes = [len(synthesis_model(network, d).SerializeToString()) for d in ("fp32", dtype)]
    assert sizes[1] < 0.55 * sizes[0]


def rosinality_file(path: Path, resolution: int, width: int) -> Path:
    """A checkpoint of rosinality's code of another size than the golden one, of random weights."""
    golden = torch.load(GOLDEN / "rosinality_tiny32.pt", weights_only=True)

    def like(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn([width if side == 24 else side for side in tensor.shape])

    state = {key: value if key.endswith("kernel") else like(value)
             for key, value in golden["g_ema"].items()}  # fmt: skip
    for block in range(3, resolution.bit_length() - 3):  # 8 pixels are block 0, 32 block 2
        for kind, first, count in (("convs", 2 * block, 2), ("to_rgbs", block, 1)):
            for i in range(count):
                for key in [k for k in state if k.startswith(f"{kind}.{i}.")]:
                    new = key.replace(f"{kind}.{i}.", f"{kind}.{first + i}.", 1)
                    state[new] = state[key] if key.endswith("kernel") else like(state[key])
    for i in range(2 * (resolution.bit_length() - 3) + 1):
        side = 4 << (i + 1) // 2
        state[f"noises.noise_{i}"] = torch.randn(1, 1, side, side)
    torch.save({"g_ema": state, "latent_avg": torch.randn(width)}, path)
    return path


def test_a_converted_network_of_256_pixels_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    generators = []
    for name in ("face", "anime"):
        source = rosinality_file(tmp_path / f"{name}.pt", 256, 6)
        target = tmp_path / f"{name}.safetensors"
        assert convert.main([str(source), str(target)]) == 0
        generators.append(checkpoint.load(target, Generator).requires_grad_(False))
    network = SwappedSynthesis(*generators, 32)
    ws = torch.randn(2, 14, 6)
    with torch.no_grad():
        spans = [float(x.max() - x.min()) for x in network(ws, both=True)]
    assert min(spans) > 0.1
    for got, right in zip(run(synthesis_model(network), ws=ws.numpy()), drawn(network, ws),
                          strict=True):  # fmt: skip
        assert got.shape == (2, 3, 256, 256)
        np.testing.assert_allclose(got, right, atol=2e-4)


def test_mtcnns_networks_take_any_number_and_size() -> None:
    facenet = pytest.importorskip("facenet_pytorch")
    for net, sides in ((facenet.PNet(), ((12, 12), (31, 50))), (facenet.ONet(), ((48, 48),))):
        model = mtcnn_model(net)
        for height, width in sides:
            x = torch.randn(3, 3, height, width)
            with torch.no_grad():
                wanted = net(x)
            for got, right in zip(run(model, pictures=x.numpy()), wanted, strict=True):
                np.testing.assert_allclose(got, right.numpy(), atol=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_encoder) -> tuple[Path, list]:
    """A whole export of tiny networks: torch's exporter takes seconds, so it is done once."""
    from conftest import make_generator

    folder = tmp_path_factory.mktemp("onnx")
    made = {"face": {"licence": "CC BY 4.0", "data": "none"}}
    rows = export_networks(folder, make_generator(1), make_generator(2), tiny_encoder, 8,
                           origin=made)  # fmt: skip
    return folder, rows


def test_an_export_is_six_files_with_config_and_licence(exported) -> None:
    folder, rows = exported
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert [row.file for row in rows] == list(FILES)
    assert max(row.error for row in rows) <= 1e-4
    session = ort.InferenceSession(folder / "synthesis.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["generator"])["resolution"] == 16
    assert json.loads(about["encoder"])["num_ws"] == 6
    assert "CC BY 4.0" in about["licence"] and about["swap_resolution"] == "8"
    assert [x.name for x in session.get_inputs()] == ["ws"]
    assert [x.name for x in session.get_outputs()] == ["anime", "reconstruction"]


def test_the_translator_is_the_encoder_and_the_synthesis(exported) -> None:
    folder, _ = exported
    images = 2 * np.random.default_rng(0).random((5, 3, 16, 16), np.float32) - 1

    def session(name: str):
        return ort.InferenceSession(folder / name, providers=["CPUExecutionProvider"])

    [ws] = session("encoder.onnx").run(None, {"images": images})
    anime, _ = session("synthesis.onnx").run(None, {"ws": ws})
    [whole] = session("translator.onnx").run(None, {"images": images})
    np.testing.assert_allclose(whole, anime, atol=1e-5)


def test_nothing_is_replaced_unasked(exported, tiny_encoder, face, anime) -> None:
    folder, _ = exported
    with pytest.raises(ValueError, match=r"encoder\.onnx exists"):
        export_networks(folder, face, anime, tiny_encoder, 8)


def test_a_file_that_differs_is_not_kept(tmp_path: Path, face, anime, ws) -> None:
    right, wrong = SwappedSynthesis(face, anime, 8), SwappedSynthesis(anime, face, 8)
    target = tmp_path / "synthesis.onnx"
    model = synthesis_model(wrong, both=False)
    with pytest.raises(ValueError, match=r"synthesis\.onnx gives other results than torch"):
        write_model(target, model, lambda x: right(x).clamp(-1, 1), [ws[:1], ws], "fp32")
    assert list(tmp_path.iterdir()) == []
    row = write_model(target, model, lambda x: wrong(x).clamp(-1, 1), [ws[:1], ws], "fp32")
    assert row.file == "synthesis.onnx" and row.error < 1e-4 and target.is_file()
    with pytest.raises(ValueError, match="other results"):
        compare(target, lambda x: wrong(x).clamp(-1, 1) + float("nan"), [ws], "fp32")


def test_an_option_that_cannot_be_is_a_sentence(tmp_path: Path, capsys) -> None:
    assert main(["--output", str(tmp_path), "--encoder", "face64"]) == 2
    assert "kind 'generator'" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["--output", str(tmp_path / "file")]) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_fixed_batch_size_is_not_exported(tiny_encoder) -> None:
    [image] = encoder_model(tiny_encoder).graph.input
    assert image.type.tensor_type.shape.dim[0].dim_param
