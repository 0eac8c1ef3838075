"""The theorem's constants at the steps of a real run."""

import json

import pytest
import torch

from open_r1_capo.experiments.theorem import constants
from open_r1_capo.training.run import command


@pytest.mark.parametrize("sign", [1, -1])
def test_operator_norm(sign):
    """The largest absolute eigenvalue, whatever its sign, and never above it."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(torch.linspace(-1, 3, 30, dtype=torch.float64) * sign) @ basis.T
    start = torch.ones(30, dtype=torch.float64)
    few, many = (constants.operator_norm(lambda v: matrix @ v, start, n) for n in (2, 300))
    assert few < 3
    assert many == pytest.approx(3, rel=1e-6)
    assert constants.operator_norm(lambda v: 0 * v, start, 5) == 0


def test_curvature_product():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2, dtype=torch.float64)
    parameters, x = list(layer.parameters()), torch.randn(5, 3, dtype=torch.float64)

    def value(weight=layer.weight, bias=layer.bias):
        return (x @ weight.T + bias).tanh().pow(3).sum()

    shapes = [p.shape for p in parameters]

    def of_vector(vector):
        weight, bias = vector.split([6, 2])
        return value(weight.view(shapes[0]), bias)

    place = constants.flat(parameters).detach()
    hessian = torch.autograd.functional.hessian(of_vector, place)
    vector = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(constants.curvature_product(value, parameters)(vector), hessian @ vector)
    constants.move_to(parameters, place + vector)
    torch.testing.assert_close(constants.flat(parameters).detach(), place + vector)


def test_the_steps_of_a_run(tmp_path, lab_policy, capsys):
    settings = [
        "max_steps=2", "save_steps=1", "completions_per_step=16", "num_generations=4", "max_completion_length=16",
        "evaluation.problems=0", "learning_rate=1e-3", f"output_root={tmp_path}", f"model_name_or_path={lab_policy}",
    ]  # fmt: skip
    assert command("grpo_aggressive", settings) == 0
    run = tmp_path / "grpo_aggressive" / "lab" / "seed0"
    assert constants.main([str(run), "--iterations", "3", "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "theorem_steps.json").read_text())["steps"]
    assert (row["step"], row["length"] <= 16) == (2, True)
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert row["kl"] == pytest.approx(logged["capo/measured_kl"], rel=1e-2)
    assert row["change"] == pytest.approx(logged["capo/measured_objective"], rel=1e-2)
    assert row["slope"] > 0
    assert row["norm_along"] >= row["norm"] > 0
    assert abs(row["curved"]) <= row["margin"] * 1.5  # three iterations find M from below
    assert row["share"] < row["bound"]
    assert "gᵀΔθ" in (tmp_path / "theorem_steps.md").read_text()
    capsys.readouterr()
    assert constants.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
