"""The report and the figures, from the files of a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from open_r1_capo import report
from open_r1_capo.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "capo_aggressive" / "lab" / "seed0"
    folder.mkdir(parents=True)
    rows = [
        {
            "step": i, "reward": 0.1 * (i % 4), "completions": 96 * i, "accepted_tokens": 900 * i, "grad_norm": 0.0,
            "entropy": 0.3, "capo/rejected_frac": 0.01 * i, "capo/scaled_frac": 0.0, "capo/measured_kl": 1e-3 * i,
            "capo/step_scale": 1.0, "capo/policy_shift/max": 0.0,
            **({"accuracy": 0.2 + 0.01 * i} if i % 5 == 0 else {}),
        }
        for i in range(1, 21)
    ]  # fmt: skip
    del rows[3]["reward"]  # a step on completions of an earlier one
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 21, "rew')
    (folder / "config.yaml").write_text("recipe: capo_aggressive\nscale: lab\nseed: 0\nenvironment: {}\n")
    settings = {"recipe": "capo_aggressive", "scale": "lab", "seed": 0}
    accuracy = {"accuracy": 0.2, "standard_error": 0.01, "n": 500}
    summary = report.summarise(settings, RunFolder(folder).read_metrics(), accuracy, accuracy, 12.0)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_summary(run_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["steps"] == 20
    assert summary["completions"] == 1920
    assert (summary["accuracy_best"], summary["accuracy_best_step"]) == (pytest.approx(0.4), 20)
    assert summary["rejected_frac"] == {"mean": pytest.approx(0.105), "max": 0.2, "min": 0.01}
    assert len(summary["reward_windows"]) == 2


def test_a_collapse_is_said(run_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    assert "collapsed" not in "\n".join(report.summary_lines(RunFolder(run_folder)))
    summary["accuracy_after"]["accuracy"] = 0.01
    (run_folder / "summary.json").write_text(json.dumps(summary))
    assert "the policy collapsed" in "\n".join(report.summary_lines(RunFolder(run_folder)))


def test_report_again_with_evaluations(run_folder, capsys):
    assert report.main([str(run_folder)]) == 0
    assert "held-out accuracy  0.200 ± 0.010 before" in capsys.readouterr().out
    plain = (run_folder / "report.html").read_text()
    assert "TEST, mean of" not in plain
    lines = [
        {"step": s, "completions": 96 * s, "accepted_tokens": 900 * s, "test": 0.5, "test_stderr": 0.01, "over": 8}
        for s in (20, 0, 10)
    ]
    (run_folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.main([str(run_folder)]) == 0
    page = (run_folder / "report.html").read_text()
    assert "TEST, mean of 8 test sets" in page
    assert "training accepted tokens" in page


def test_unfinished_run(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert report.main([]) == 2


def test_figures(run_folder, tmp_path):
    command = [sys.executable, str(ROOT / "eval" / "figures.py"), "--out", str(tmp_path / "out")]
    (run_folder / "metrics.jsonl").write_text(
        "".join(line + "\n" for line in (run_folder / "metrics.jsonl").read_text().splitlines()[:-1])
    )
    done = subprocess.run([*command, str(run_folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| capo_aggressive (lab) | 1 | 0.200 | 0.400 | 0.200 | 10.50% | 20.00% | 2.0e-02 |" in done.stdout
    assert (tmp_path / "out" / "runs.png").stat().st_size > 10_000
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not a run folder" in done.stderr
