"""The metric of w+, measured against the Jacobian itself.

pytest tests/test_curvature.py
"""

import pytest
import torch
from safetensors.torch import save_file

from generators import checkpoint
from generators.curvature import Curvature, curvature_of, main, measure
from generators.stylegan2 import Generator


def dense(curvature: Curvature) -> torch.Tensor:
    """What it stands for, as a matrix."""
    size = curvature.basis.shape[1]
    low = (curvature.basis.T * (curvature.values - curvature.rest)) @ curvature.basis
    return low + curvature.rest * torch.eye(size)


def test_it_is_the_metric_of_the_synthesis(face):
    face.mapping.get_submodule("fc1").weight.zero_()  # every z gives one w, hence one Jacobian
    ws = face.map(torch.zeros(1, face.z_dim))[0]
    jacobian = torch.autograd.functional.jacobian(lambda w: face.synthesis(w[None]), ws)
    exact = jacobian.reshape(-1, 48).T @ jacobian.reshape(-1, 48)
    exact /= torch.linalg.eigvalsh(exact)[-1]
    curvature = measure(face, probes=4000, rank=48)
    assert (dense(curvature) - exact).norm() < 0.1 * exact.norm()
    rows = curvature.basis
    torch.testing.assert_close(rows @ rows.T, torch.eye(48), atol=1e-4, rtol=0)
    assert curvature.values[0] == 1 and (curvature.values.diff() <= 0).all()


def test_it_is_measured_at_given_latents(face, ws):
    other = 5 * ws
    exact = sum(
        j.reshape(-1, 48).T @ j.reshape(-1, 48)
        for j in (
            torch.autograd.functional.jacobian(lambda x: face.synthesis(x[None]), w) for w in other
        )
    )
    exact /= torch.linalg.eigvalsh(exact)[-1]
    error = [
        (dense(measure(face, probes=4000, rank=48, latents=given)) - exact).norm() / exact.norm()
        for given in (other, None)
    ]
    assert error[0] < 0.1 and error[1] > 0.3


@pytest.mark.parametrize("rank", [20, 48])
def test_offsets_undo_it(face, rank):
    curvature = measure(face, probes=400, rank=rank)
    assert curvature.size == (48 if rank == 48 else 20 + 48)  # others of weight are searched, too
    root = curvature.offsets(torch.eye(curvature.size)).flatten(1)
    damped = dense(curvature) + curvature.config.damping * torch.eye(48)
    torch.testing.assert_close(torch.linalg.inv(root.T @ root), damped, atol=1e-4, rtol=1e-3)


def test_less_damping_makes_flat_directions_faster(face):
    usual, less = (measure(face, probes=400, rank=48, damping=d) for d in (1e-3, 1e-5))
    assert torch.equal(usual.basis, less.basis)
    steep, flat = torch.eye(48)[[0]], torch.eye(48)[[-1]]  # moved along, in u
    gain = [float(less.offsets(u).norm() / usual.offsets(u).norm()) for u in (steep, flat)]
    ratio = float(((usual.values[-1] + 1e-3) / (usual.values[-1] + 1e-5)).sqrt())
    assert gain[0] == pytest.approx(1, abs=1e-3) and gain[1] == pytest.approx(ratio, rel=1e-3)


def test_of_one_w_is_the_metric_of_equal_layers(face):
    curvature = measure(face, probes=400, rank=48)
    same = torch.eye(8).repeat(1, 6)  # (D, L D): one w to every layer
    expected = same @ dense(curvature) @ same.T
    found = dense(curvature.of_one_w())
    torch.testing.assert_close(
        found, expected / torch.linalg.eigvalsh(expected)[-1], atol=1e-4, rtol=0
    )


def test_the_seed_decides(face):
    a, b = (measure(face, probes=40, rank=8, seed=s).values for s in (0, 0))
    assert torch.equal(a, b)
    assert not torch.equal(a, measure(face, probes=40, rank=8, seed=1).values)
    with pytest.raises(ValueError, match="probe"):
        measure(face, probes=0)


def test_command_writes_a_checkpoint(face, tmp_path, capsys):
    source, target = str(tmp_path / "face.safetensors"), tmp_path / "curvature.safetensors"
    checkpoint.save(source, face, provenance={"licence": "mine"})
    assert main([source, str(target), "--probes", "40", "--rank", "8"]) == 0
    loaded = curvature_of("other", target)
    assert loaded is not None and loaded.basis.shape == (8, 48)
    assert checkpoint.read_metadata(target)["provenance"]["licence"] == "mine"

    latents = tmp_path / "ws.safetensors"
    save_file({"ws": torch.randn(3, 6, 8)}, latents)
    options = ["--latents", str(latents), "--probes", "40", "--rank", "8", "--damping", "1e-4"]
    assert main([source, str(target), *options]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([source, str(target), *options, "--overwrite"]) == 0
    at_photos = curvature_of("other", target)
    assert at_photos is not None and not torch.equal(at_photos.basis, loaded.basis)
    assert (loaded.config.damping, at_photos.config.damping) == (1e-3, 1e-4)
    with pytest.raises(SystemExit, match="2"):
        main([source, str(target), "--damping", "0"])
    assert "--damping must be above 0" in " ".join(capsys.readouterr().err.split())
    assert checkpoint.read_metadata(target)["provenance"]["at"] == "3 latents of photos"

    for replaced in (source, str(latents)):
        assert main([source, replaced, *options, "--overwrite"]) == 2
        assert "is an input" in capsys.readouterr().err
    assert main([str(tmp_path / "none.safetensors"), str(target), "--overwrite"]) == 2


def test_curvature_that_is_not_finite_is_refused_when_loaded(face, tmp_path):
    curvature = measure(face, probes=8, rank=4)
    curvature.values[0] = torch.nan
    checkpoint.save(tmp_path / "c.safetensors", curvature)
    with pytest.raises(ValueError, match="values has values that are not finite"):
        curvature_of("other", tmp_path / "c.safetensors")


def test_the_bundled_one_is_of_the_bundled_face():
    curvature, face = curvature_of("face64"), checkpoint.resolve("face64")
    assert curvature is not None
    generator = checkpoint.load(face, Generator)
    assert curvature.basis.shape == (2000, generator.num_ws * generator.w_dim)
    assert curvature_of("mine.safetensors") is None
