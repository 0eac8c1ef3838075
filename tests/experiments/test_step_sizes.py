"""Our tables of the steps' sizes and of what they cost, against the files by hand."""

import numpy as np
import pytest

import synthetic_runs
from open_r1_capo.experiments import spec as experiments
from open_r1_capo.experiments.figures import __main__ as figures
from open_r1_capo.experiments.figures import budgets, curves, stability, tables


def runs_of(name, monkeypatch, tmp_path):
    """The experiment with made-up runs, in an otherwise empty working directory, and its figure's data."""
    monkeypatch.chdir(tmp_path)
    experiment = experiments.load(name, seeds=2)
    synthetic_runs.write_experiment(experiment)
    return experiment, curves.load(experiment, figures.FIGURES[name].keys)


def test_means_over_stages_and_seeds(monkeypatch, tmp_path):
    experiment, data = runs_of("step_sizes", monkeypatch, tmp_path)
    arm = experiment.arms[0]
    rows = [synthetic_runs.metrics(arm, seed) for seed in experiment.seeds]
    found = stability.step_sizes(data).numbers["arms"][", ".join((arm.label, *arm.overrides))]
    norms, kls = (np.array([[row[key] for row in one] for one in rows]) for key in ("grad_norm", "capo/measured_kl"))
    assert found["gradient norm"] == pytest.approx(
        [norms[:, 1:10].mean(), norms[:, 10:20].mean(), norms[:, 20:].mean()]
    )
    assert found["KL"] == pytest.approx([kls[:, 1:10].mean(), kls[:, 10:20].mean(), kls[:, 20:].mean()])
    assert found["largest KL"] == pytest.approx(kls.max())


def test_the_largest_kl_of_a_method(monkeypatch, tmp_path):
    experiment, data = runs_of("stability_grid", monkeypatch, tmp_path)
    rates = [arm for arm in experiment.arms if arm.label == "GRPO planned"]
    rows = [row for arm in rates for seed in experiment.seeds for row in synthetic_runs.metrics(arm, seed)]
    largest = stability.rates_table(data)[1]["methods"]["GRPO planned"]["largest_kl"]
    assert largest == pytest.approx(max(row["capo/measured_kl"] for row in rows))


def test_the_costs_of_a_grids_arms_stay_apart(monkeypatch, tmp_path):
    _, data = runs_of("stability_cost", monkeypatch, tmp_path)
    found = tables.efficiency(data).numbers["arms"]
    assert len(found) == len(data.lines) == 17
    assert list(found)[:2] == ["GRPO", "GRPO planned, learning_rate=0.0001"]


def test_what_became_of_a_budget(monkeypatch, tmp_path):
    experiment, data = runs_of("no_rate", monkeypatch, tmp_path)
    rows = [row for seed in experiment.seeds for row in synthetic_runs.metrics(experiment.arms[0], seed)]
    found = budgets.budgets(data).numbers["arms"]["GRPO"]
    shares = [row["budget/kl"] / row["budget/nats"] for row in rows]
    assert found["largest"] == pytest.approx(max(shares))
    assert found["over"] == sum(share > 1.5 for share in shares)
    assert (found["steps"], found["taken_back"], found["passes"]) == (200, 4, 2.0)
    assert found["second_half"][1] == pytest.approx(np.mean([row["reward"] for row in rows[150:]]))
