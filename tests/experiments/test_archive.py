"""The archive of the experiments' rewards."""

import json
from pathlib import Path

import pytest

import synthetic_runs
from open_r1_capo.experiments import archive
from open_r1_capo.experiments import spec as experiments
from open_r1_capo.runs.run import SUMMARY


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A finished run of two iterations a batch, in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    experiment = experiments.load("fig8", seeds=1)
    arm = experiment.arms[0]
    rows = synthetic_runs.metrics(arm, 2)
    for row in rows[0::2]:
        del row["reward"]
    synthetic_runs.write_run(experiment.folder(arm, 2), arm, 2, rows)
    (experiment.folder(arm, 2) / "summary.json").write_text(json.dumps(dict.fromkeys(SUMMARY)))
    return experiment.folder(arm, 2)


def test_it_keeps_every_reward_of_what_has_ended(folder):
    assert archive.main(["all.json"]) == 0
    ((name, found),) = json.loads(Path("all.json").read_text()).items()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert name == "capo_aggressive/lab/seed2"
    assert found["commit"] == "c2"
    assert found["reward"] == pytest.approx([row["reward"] for row in rows if "reward" in row], abs=5e-4)
    assert found["largest_kl"] == pytest.approx(max(row["capo/measured_kl"] for row in rows), rel=1e-2)


def test_what_cannot_be_kept_or_written(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        archive.main([])
    assert stopped.value.code == 2
    assert archive.main(["nowhere/all.json"]) == 2
    assert "nowhere/all.json cannot be written" in capsys.readouterr().err
    (folder / "config.yaml").write_text("{broken")
    assert archive.main(["all.json"]) == 2
    assert f"{folder} is not a run folder" in capsys.readouterr().err
    (folder / "summary.json").unlink()
    assert archive.main(["all.json"]) == 2
    assert "no finished runs in outputs/experiments" in capsys.readouterr().err
    assert not Path("all.json").exists()


def test_runs_that_are_elsewhere_are_kept(folder, capsys):
    Path("all.json").write_text('{"other/lab/seed3": {"commit": "c", "reward": [0.5], "largest_kl": null}}\n')
    assert archive.main(["all.json"]) == 0
    found = json.loads(Path("all.json").read_text())
    assert sorted(found) == ["capo_aggressive/lab/seed2", "other/lab/seed3"]
    assert found["other/lab/seed3"]["reward"] == [0.5]
    Path("all.json").write_text("{broken")
    assert archive.main(["all.json"]) == 2
    assert "all.json is no archive of runs" in capsys.readouterr().err
    assert Path("all.json").read_text() == "{broken"
