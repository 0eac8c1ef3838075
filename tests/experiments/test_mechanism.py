"""What rejected tokens are, and the same step under other rules."""

import gzip
import json
import math

import pytest
import torch

import oracle
import pages
from open_r1_capo.capo import Mask
from open_r1_capo.experiments import counterfactual, mechanism
from open_r1_capo.experiments.counterfactual import (
    ARMS,
    Counterfactual,
    compare,
    gradient_split,
    masked_method,
    shuffled,
)
from open_r1_capo.settings.recipes import compose_recipe, known_recipes
from open_r1_capo.tasks.lab import task
from open_r1_capo.training.build import build
from open_r1_capo.training.run import command


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sum_of_some_tokens_gradients(seed):
    """Two micro-batches against dense gradients by autograd."""
    batches, chosen = [], []
    mine, others = (torch.zeros(11, 7, dtype=torch.float64) for _ in range(2))
    alone = 0.0
    for part in range(2):
        batch, weight = oracle.random_batch(seed=2 * seed + part)
        rows = torch.rand(len(batch), generator=torch.Generator().manual_seed(seed)) < 0.3
        for i in range(len(batch)):
            gradient = oracle.token_gradient(weight, batch, i)
            (mine if rows[i] else others).add_(gradient)
            alone += float(gradient.norm()) * bool(rows[i])
        batches.append(batch)
        chosen.append(rows)
    found = gradient_split(batches, chosen)
    assert found["tokens"] == sum(int(rows.sum()) for rows in chosen) > 0
    assert found["norm"] == pytest.approx(float(mine.norm()), rel=1e-6)
    assert found["other_norm"] == pytest.approx(float(others.norm()), rel=1e-6)
    assert found["cosine"] == pytest.approx(float((mine * others).sum() / mine.norm() / others.norm()), rel=1e-6)
    assert found["coherence"] == pytest.approx(float(mine.norm()) / alone, rel=1e-6)
    nothing = gradient_split(batches, [torch.zeros_like(rows) for rows in chosen])
    assert (nothing["norm"], nothing["cosine"], nothing["coherence"]) == (0, None, None)


def test_a_random_set_of_the_same_size():
    shifts = torch.linspace(0, 2, 40)
    moving = torch.arange(40) % 4 != 0
    selection = Mask(1.5).judge(shifts * moving, torch.zeros(40))
    found = shuffled(selection, moving, torch.Generator().manual_seed(0))
    assert (found.weight == 0).sum() == (selection.weight == 0).sum() > 3
    assert not torch.equal(found.weight, selection.weight)
    assert (found.weight[~moving] == 1).all()


def token(**changes):
    base = {"prob": 0.9, "entropy": 0.1, "gradient_norm": 1.0, "kl": 1.0, "advantage": 1.0, "position": 0.5}
    return base | {"rejected": False, "word": False} | changes


def test_groups_of_tokens():
    odd = token(
        rejected=True, prob=0.05, entropy=2.0, gradient_norm=6.0, kl=12.0, advantage=-1.0, position=1.0, word=True
    )
    steps = [[odd, *[token() for _ in range(3)]], [token(kl=None)]]
    found = mechanism.describe(steps)
    assert found["rejected"] == {
        "tokens": 1, "share": 1 / 5, "prob": 0.05, "unlikely": 1, "entropy": 2.0, "positive": 0, "position": 1.0,
        "word": 1, "kl_share": 12 / 15, "gradient_share": 6 / 10,
    }  # fmt: skip
    assert found["kept"]["tokens"] == 4
    assert found["kept"]["kl_share"] == 3 / 15
    assert found["random"]["tokens"] == 1
    assert mechanism.describe([[token()]])["rejected"]["prob"] is None
    assert "–" in mechanism.table(["a"], [[None]])


def test_tokens_of_a_record():
    completion = {
        "advantage": -0.5, "tokens": ["sum ", "=", "b4"], "prob": [0.1, 0.2, 0.3], "entropy": [1.0] * 3, "kl": None,
        "gradient_norm": [1.0] * 3, "policy_shift": [0.5, 2.0, None], "objective_shift": [0.0, 0.0, 0.0],
        "weight": [1.0, 1.0, 0.0],
    }  # fmt: skip
    record = {"completions": [completion, completion | {"advantage": 0.0}]}
    assert [t["rejected"] for t in mechanism.tokens_of(record)] == [False, False, True]
    found = mechanism.tokens_of(record, (1.0, math.inf))
    assert [t["rejected"] for t in found] == [False, True, True]
    assert [t["position"] for t in found] == [0, 0.5, 1]
    assert [t["word"] for t in found] == [True, False, False]


@pytest.fixture(scope="module")
def run(tmp_path_factory, lab_policy):
    """A short GRPO run with two checkpoints to go on from, and the record of every step."""
    root = tmp_path_factory.mktemp("mechanism")
    settings = [
        "max_steps=3", "save_steps=1", "completions_per_step=32", "num_generations=4", "max_completion_length=16",
        "evaluation.problems=0", "learning_rate=1e-3", "token_records=all", f"output_root={root}",
        f"model_name_or_path={lab_policy}",
    ]  # fmt: skip
    assert command("grpo_aggressive", settings) == 0
    return root / "grpo_aggressive" / "lab" / "seed0"


def test_the_step_is_taken_again(run, tmp_path, monkeypatch):
    """The arm `none` is the run's own step; the mask rejects, the random set is as large, scaling rejects nothing."""
    recipe, compose = "capo_aggressive", counterfactual.compose_recipe

    def tighter(name, overrides):
        return compose(name, [*overrides, *(["capo.max_policy_shift=1e-3"] if name == recipe else [])])

    monkeypatch.setattr(counterfactual, "compose_recipe", tighter)
    options = ["--records", str(run), "--run", str(run), "--problems", "4", "--samples", "1", "--out", str(tmp_path)]
    assert mechanism.main([*options, "--bounds", "1e-3", "inf"]) == 0
    found = json.loads((tmp_path / "mechanism.json").read_text())
    assert found["tokens"]["steps"] == 3
    assert found["tokens"]["rejected"]["tokens"] == found["tokens"]["random"]["tokens"] > 0
    rows = found["steps"]["checkpoints"]
    assert [(row["step"], row["agrees"]) for row in rows] == [(2, True), (3, True)]
    for row in rows:
        arms = row["arms"]
        assert arms.keys() == ARMS.keys()
        assert arms["none"]["rejected_frac"] == arms["scale"]["rejected_frac"] == 0
        assert arms["mask"]["rejected_frac"] == arms["random"]["rejected_frac"] > 0
        assert arms["mask"]["measured_kl"] != arms["random"]["measured_kl"] != arms["none"]["measured_kl"]
        assert row["gradient"]["mask"]["tokens"] == row["gradient"]["random"]["tokens"] > 0
    change = [row["arms"]["mask"]["measured_kl"] - row["arms"]["none"]["measured_kl"] for row in rows]
    mask = found["steps"]["arms"]["mask"]["measured_kl"]
    assert mask["change"] == pytest.approx(sum(change) / 2)
    assert mask["change_error"] == pytest.approx(abs(change[0] - change[1]) / 2)
    assert compare(rows[:1])["mask"]["measured_kl"]["error"] == 0
    assert "step taken with" in (tmp_path / "mechanism.md").read_text()


@pytest.mark.parametrize(("recipe", "bound"), [("grpo_planned", "capo"), ("reinforce_aggressive", "reincapo")])
def test_an_arm_changes_the_rule_and_nothing_else(recipe, bound, tmp_path, monkeypatch):
    """The thresholds of the run's own method; a planned run stays planned under every rule."""
    settings = compose_recipe(recipe, [f"model_name_or_path={tmp_path}"])
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    taken = {}
    monkeypatch.setattr(counterfactual, "build", lambda settings: taken.update(settings) or build(settings))
    monkeypatch.setattr(counterfactual, "make_trainer", lambda *args, **kwargs: None)
    monkeypatch.setattr(counterfactual, "load_tokenizer", lambda model: None)
    monkeypatch.setattr(counterfactual, "load_dataset", lambda *args: None)
    for arm, mode in (("none", "observe"), ("mask", "mask"), ("scale", "scale")):
        Counterfactual(tmp_path, problems=1)._trainer(arm)
        capo = taken["capo"]
        rule = {} if arm == "none" else compose_recipe(f"{bound}{'_scale' * (arm == 'scale')}_aggressive", [])["capo"]
        assert capo["mode"] == mode
        assert capo.get("max_policy_shift") == rule.get("max_policy_shift")
        assert capo.get("max_objective_shift") == rule.get("max_objective_shift")
        same = ("step_policy_shift", "absent_rows", "step_feedback")
        assert [capo.get(name) for name in same] == [settings["capo"].get(name) for name in same]


def test_what_cannot_be_used(run, tmp_path, capsys):
    for arguments, message in (
        (["--run", str(tmp_path)], "it has no readable config.yaml of a run"),
        (["--records", str(tmp_path)], "has no record of every step: train it with token_records=all"),
    ):
        assert mechanism.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stopped:
        mechanism.main([])
    assert stopped.value.code == 2
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "step1.json.gz").write_bytes(gzip.compress(b"{")[:-4])
    assert mechanism.main(["--records", str(tmp_path)]) == 2
    assert "step1.json.gz cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        mechanism.main(["--run", str(run), "--problems", "0"])
    assert stopped.value.code == 2
    assert "--problems and --samples are at least 1" in capsys.readouterr().err
    with pytest.raises(counterfactual.ConfigError, match="capo.mode=observe"):
        config = (run / "config.yaml").read_text().replace("mode: observe", "mode: mask")
        (tmp_path / "config.yaml").write_text(config)
        Counterfactual(tmp_path)
    (tmp_path / "config.yaml").write_text("recipe: something else")
    assert mechanism.main(["--run", str(tmp_path)]) == 2


def test_records_that_cannot_be_used(tmp_path, capsys):
    """One sentence each, whatever is wrong; what was not finite when it was recorded is left out of a mean."""
    record = pages.make_record(1)
    pages.write_record(tmp_path, "step1", record)
    path = tmp_path / "tokens" / "step1.json.gz"
    whole, arguments = path.read_bytes(), ["--records", str(tmp_path), "--out", str(tmp_path / "out")]
    odd = {
        "corrupted": whole[:40] + bytes(40) + whole[80:],
        "cut": whole[:-9],
        "a list": gzip.compress(b"[1]"),
        "nothing": gzip.compress(b'{"step": 1}'),
    }
    for name in ("prob", "weight", "advantage"):
        lacks = {**record, "completions": [{k: v for k, v in record["completions"][0].items() if k != name}]}
        odd[name] = gzip.compress(json.dumps(lacks).encode())
    texts = {**record, "completions": [record["completions"][0] | {"entropy": ["x"] * 20}]}
    odd["text"] = gzip.compress(json.dumps(texts).encode())
    for name, content in odd.items():
        path.write_bytes(content)
        assert mechanism.main(arguments) == 2, name
        assert f"error: {path} cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    record["completions"][0] |= {"prob": [None] * 20, "entropy": [None] * 20}
    pages.write_record(tmp_path, "step1", record)
    assert mechanism.main(arguments) == 0
    (tmp_path / "file").touch()
    assert mechanism.main([*arguments[:-1], str(tmp_path / "file")]) == 2
    assert f"error: {tmp_path / 'file'} cannot be written (File exists)" in capsys.readouterr().err


def test_a_step_is_measured_on_the_problems_of_its_own_run(tmp_path):
    settings = compose_recipe("grpo_aggressive", ["data.variant=subtraction", "seed=3"])
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    assert Counterfactual(tmp_path, problems=5).problems == task.problems("train", 5, seed=3, variant="subtraction")


@pytest.mark.parametrize("recipe", known_recipes())
def test_the_base_method_is_told_by_what_defines_it(recipe):
    start = "drcapo" if recipe.startswith("dr") else "reincapo" if recipe.startswith("rein") else "capo"
    assert masked_method(compose_recipe(recipe, [])) == start
