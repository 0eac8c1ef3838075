"""Any runs against each other: what is drawn and tabled of them, and what happens to those that cannot be read."""

import json
from pathlib import Path

import numpy as np
import pytest

import synthetic_runs
from open_r1_capo.experiments import spec as experiments
from open_r1_capo.experiments.figures import draw as figures
from open_r1_capo.runs.run import SUMMARY


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two seeds of CAPO and one of GRPO in an otherwise empty working directory; only fig9 could be drawn of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "FIGURES", {"fig9": figures.FIGURES["fig9"]})
    experiment = experiments.load("fig9", seeds=2)
    grpo, capo = experiment.arms
    found = [(capo, 2), (capo, 3), (grpo, 2)]
    for arm, seed in found:
        synthetic_runs.write_run(experiment.folder(arm, seed), arm, seed)
    return [experiment.folder(arm, seed) for arm, seed in found]


def rewards_of(folder):
    return [json.loads(line)["reward"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_seeds_are_one_line_and_what_has_ended_is_tabled(folders, capsys):
    odd = dict.fromkeys(SUMMARY) | {"accuracy_best": 0.5, "measured_kl": {"max": "x"}}
    (folders[0] / "summary.json").write_text(json.dumps(odd))
    (folders[1] / "summary.json").write_text('{"accuracy_best": 0.')
    assert figures.main([*map(str, folders), "--smooth", "off", "--out", "out"]) == 0
    assert "| capo_aggressive (lab) | 1 | – | 0.500 | – | – | – | – |" in capsys.readouterr().out
    assert {path.name for path in Path("out").iterdir()} == {"runs.png", "runs.svg", "runs.md", "runs.json"}
    numbers = json.loads(Path("out/runs.json").read_text())
    assert [panel["key"] for panel in numbers["panels"]] == [
        "reward", "capo/rejected_frac", "capo/batch_policy_shift", "capo/measured_kl"
    ]  # fmt: skip
    arm, other = numbers["panels"][0]["arms"]
    rewards = np.array([rewards_of(folder) for folder in folders[:2]])
    assert np.allclose(arm["mean"], rewards.mean(0), rtol=1e-3)
    assert np.allclose(arm["se"], rewards.std(0, ddof=1) / np.sqrt(2), rtol=1e-3, atol=1e-6)
    assert (arm["n"], other["label"], other["n"]) == (2, "grpo_aggressive (lab)", 1)
    assert numbers["summaries"]["capo_aggressive (lab)"][0]["accuracy_best"] == 0.5


def test_a_run_without_a_step_is_refused_if_named_and_left_out_of_all(folders, capsys):
    run, empty = folders[0], Path("outputs/capo_aggressive/lab/seed0")
    empty.mkdir(parents=True)
    for _ in range(2):
        assert figures.main([str(run), str(empty), "--out", "named"]) == 2
        assert f"{empty} is not a run folder" in capsys.readouterr().err
        assert not Path("named").exists()
        assert figures.main(["--all", str(run), str(empty), "--out", "all"]) == 0
        assert {"runs.png", "fig9.png"} <= {path.name for path in Path("all").iterdir()}
        assert f"warning: runs: {empty} has no step yet and is left out" in capsys.readouterr().err
        (empty / "metrics.jsonl").touch()


def test_a_run_that_is_refused_stops_no_figure(folders, capsys):
    text = (folders[2] / "metrics.jsonl").read_text()
    path = Path("outputs/capo_aggressive/lab/seed0/metrics.jsonl")
    path.parent.mkdir(parents=True)
    path.write_text(text.replace('"reward": 0', '"reward": "x", "y": 0', 1))
    assert figures.main(["--all", str(path.parent), "--out", "out"]) == 2
    assert f"error: runs is not drawn: {path}:1 has 'x' for reward, which is no number" in capsys.readouterr().err
    assert Path("out/fig9.png").is_file()
    path.write_text(text.replace("completions", "completed", 1))  # a step without a place on the axis
    assert figures.main([str(path.parent), "--out", "out"]) == 0
    assert json.loads(Path("out/runs.json").read_text())["panels"][0]["arms"][0]["x"][0] == 2 * 96
