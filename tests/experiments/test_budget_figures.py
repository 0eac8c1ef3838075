"""The figures of KL budgets, against the files by hand."""

import numpy as np
import pytest

import synthetic_runs
from open_r1_capo.experiments import spec as experiments
from open_r1_capo.experiments.figures import __main__ as figures
from open_r1_capo.experiments.figures import budgets, curves, equal


@pytest.fixture
def runs_of(monkeypatch, tmp_path):
    """Make up the runs of an experiment, of some of its arms; gives it and its figure's data."""
    monkeypatch.chdir(tmp_path)

    def make(name, keep=lambda arm: True, seeds=2):
        experiment, entry = experiments.load(name, seeds=seeds), figures.FIGURES[name.removesuffix("_batch")]
        for arm, seed in experiment.runs():
            if keep(arm):
                synthetic_runs.write_run(experiment.folder(arm, seed), arm, seed)
        return experiment, curves.load(experiment, entry.keys, entry.partial)

    return make


def test_the_guarantee_counts_every_step(runs_of):
    """A KL budget's own budget where there is one, else the step rule's."""
    experiment, data = runs_of("guarantee")
    found = budgets.guarantee(data).numbers["rules"]
    arm = experiment.arms[0]
    rows = [row for seed in experiment.seeds for row in synthetic_runs.metrics(arm, seed)]
    multiples = np.array([row["budget/kl"] / row["budget/nats"] for row in rows])
    assert found[arm.label] == {
        "steps": 200, "largest": pytest.approx(multiples.max()), "over": int((multiples > 1.5).sum())
    }  # fmt: skip


def test_a_step_rule_is_held_to_its_own_delta(runs_of):
    _, data = runs_of("guarantee")
    run = data.lines[0].runs[0]
    run.columns["budget/nats"][:] = np.nan
    run.columns["capo/skipped_step"][3] = 1
    run.settings["capo"]["step_policy_shift"] = 2e-4
    kept = np.delete(run.columns["capo/measured_kl"], 3)
    assert budgets.of_budget(run) == pytest.approx(kept / 2e-4)


def test_first_guesses_of_a_known_curvature(runs_of):
    """The curvature c = KL / α² doubles every step: the secant is right, and so is a prediction that doubles too."""
    _, data = runs_of("first_guess", seeds=1)
    run, c = data.lines[0].runs[0], 2.0 ** np.arange(100)
    alpha = run.columns["budget/alpha"]
    run.columns["budget/kl"] = c * alpha**2
    run.columns["capo/batch_policy_shift"] = 0.1 * c * np.append(1e-7, alpha[:-1]) ** 2
    hits = {name: hit.mean() for name, hit in budgets.guesses_of(run).items()}
    assert hits == {"the step before": 0, "running average": 0, "secant": 1, "predicted change": 1}


def test_equal_tuning_by_hand():
    """Counts, best values and the relative accuracies of a setting."""
    one = equal.Setting("GRPO", "lab")
    one.knobs["rate"] = {1e-4: [0.90, 0.92], 4e-4: [0.95, 0.95], 1.6e-3: [0.1, 0.3]}
    one.knobs["share"] = {0.001: [0.94], 0.003: [0.96], 0.01: [0.89]}
    assert one.best("rate") == (4e-4, pytest.approx(0.95))
    assert one.best("share") == (0.003, 0.96)
    assert one.within("share", 0.05) == (2, 3)
    assert one.within("rate", 0.05) == (2, 3)
    assert one.relative("share") == pytest.approx([0.94 / 0.95, 0.96 / 0.95, 0.89 / 0.95])
    text = equal.summary([one])
    assert "Of all 3 budgets, 2 within 0.02 and 2 within 0.05 of the best rate" in text
    assert "Of all 3 rates, 1 within 0.02 and 2 within 0.05" in text


def test_equal_tuning_sorts_runs_into_settings(runs_of):
    """What has not been run is left out; a batch is a setting of its own."""
    experiment, data = runs_of("equal_tuning", keep=lambda arm: arm.recipe.startswith("grpo"))
    _, batch = runs_of("equal_tuning_batch", keep=lambda arm: arm.value("completions_per_step") == 48)
    found = equal.collect([data, batch])
    assert [(one.method, one.place) for one in found] == [
        ("GRPO", "lab"), ("GRPO", "lab, 48 a step"), ("REINFORCE", "lab, 48 a step")
    ]  # fmt: skip
    lab = found[0]
    assert sorted(lab.knobs["rate"]) == [5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3]
    assert sorted(lab.knobs["share"]) == [0.001, 0.003, 0.01, 0.03, 0.1]
    arm = next(arm for arm in experiment.arms if arm.value("learning_rate") == 4e-4)
    last = [np.mean([row["reward"] for row in synthetic_runs.metrics(arm, seed)[-10:]]) for seed in experiment.seeds]
    assert lab.knobs["rate"][4e-4] == pytest.approx(last)
    assert lab.lengths == [14.0] * 20  # ten budgets, two seeds
    assert "κ = 0.003, unchanged" in equal.equal_tuning([data, batch]).table
