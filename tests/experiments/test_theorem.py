"""The theorem's experiment: exact quantities against oracles, and claims that fail where they must."""

import json
import math

import numpy as np
import pytest
import torch

from open_r1_capo.capo import Mask, TokenBatch, curvature
from open_r1_capo.experiments.theorem import __main__ as command
from open_r1_capo.experiments.theorem import claims, families, mdp, measure, report, selection
from open_r1_capo.experiments.theorem.families import FAMILIES, Family
from open_r1_capo.experiments.theorem.mdp import Problem
from open_r1_capo.experiments.theorem.recheck import Recheck, derivatives
from open_r1_capo.experiments.theorem.selection import VARIANTS, Batch, Selection, Variant

DOUBLE = torch.float64


def drawn(family, count=4, seed=0):
    return family.draw(count, torch.Generator().manual_seed(seed))


def batch_of(family, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    problem, weight = family.draw(count, generator)
    values = mdp.evaluate(problem, family.horizon, weight)
    proposals = families.propose(problem, family.horizon, values, weight, generator)
    return Batch.of(problem, family.horizon, weight, proposals.steps)


def two_arms(steps):
    """Rewards 1 and 0, both arms equally likely: J is the sigmoid of the logits' difference, and H = 0."""
    tensors = ([[1.0]], [[[[1.0], [1.0]]]], [[[1.0, 0.0]]], [[[1.0]]], [1.0])
    problem = Problem(*(torch.tensor(tensor, dtype=DOUBLE) for tensor in tensors))
    return Batch.of(problem, 1, torch.zeros(1, 2, 1, dtype=DOUBLE), torch.tensor([steps], dtype=DOUBLE))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_values_against_enumeration_and_iteration(family):
    problem, weight = drawn(family)
    other = weight + 0.3
    other[:, 0] -= 1
    values = mdp.evaluate(problem, family.horizon, weight)
    surrogate = mdp.surrogate(problem, values, other)
    for i in range(len(weight)):
        second = Recheck.of(problem.at(i), family.horizon)
        assert float(values.objective[i]) == pytest.approx(second.objective(weight[i].numpy()), rel=1e-10, abs=1e-12)
        expected = second.surrogate(weight[i].numpy(), other[i].numpy())
        assert float(surrogate[i]) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_closed_forms_against_autograd(family):
    problem, weight = drawn(family)
    values = mdp.evaluate(problem, family.horizon, weight)
    gradient, fisher = mdp.gradient(problem, values, weight), mdp.fisher(problem, values, weight)
    away = weight + 0.2 * torch.arange(weight[0].numel(), dtype=DOUBLE).view(weight[0].shape)  # not only at θ itself
    surrogate = mdp.surrogate_hessian(problem, values, away)
    second_order = torch.autograd.functional.hessian
    for i in range(len(weight)):
        one, here = problem.at(i), mdp.Values(*(part[i] for part in values))
        shape = weight[i].shape

        def kl(vector, one=one, here=here, i=i, shape=shape):
            return mdp.average(here, mdp.state_kl(one, weight[i], vector.view(shape)))

        def gain(vector, one=one, here=here, shape=shape):
            return mdp.surrogate(one, here, vector.view(shape))

        def objective(vector, one=one, shape=shape):
            return mdp.objective(one, family.horizon, vector.view(shape))

        start = weight[i].flatten().requires_grad_()
        torch.testing.assert_close(gradient[i], torch.autograd.grad(objective(start), start)[0])
        torch.testing.assert_close(fisher[i], second_order(kl, start.detach()))
        torch.testing.assert_close(surrogate[i], second_order(gain, away[i].flatten()))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_hessian_against_differences(family):
    """Also guards against forward mode through linalg.solve, which is wrong under vmap."""
    problem, weight = drawn(family)
    hessian = mdp.objective_hessian(problem, family.horizon, weight)
    move = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    curved = mdp.quadratic(move.flatten(1), hessian)
    for i in range(len(weight)):
        second, here, step = Recheck.of(problem.at(i), family.horizon), weight[i].numpy(), move[i].numpy()
        _, expected = derivatives(lambda t, s=second, w=here, d=step: s.objective(w + t * d))
        assert float(curved[i]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_the_kl_of_a_tiny_step():
    """1e-17 nats, lost in a difference of entropies."""
    problem, weight = drawn(FAMILIES[2])
    values = mdp.evaluate(problem, 0, weight)
    step = 1e-8 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    kl = mdp.average(values, mdp.state_kl(problem, weight, weight + step))
    expected = mdp.quadratic(step.flatten(1), mdp.fisher(problem, values, weight)) / 2
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=0)


def test_quadrature():
    points, shares = mdp.gauss_legendre(12)
    expected, weights = np.polynomial.legendre.leggauss(12)
    np.testing.assert_allclose(points.numpy(), (expected + 1) / 2, atol=1e-14)
    np.testing.assert_allclose(shares.numpy(), weights / 2, atol=1e-14)


def test_tokens_are_a_tree():
    """Every text has one way to it, and only whole texts are rewarded."""
    family = FAMILIES[-1]
    problem, weight = drawn(family)
    values = mdp.evaluate(problem, family.horizon, weight)
    for t in range(family.horizon):
        there = values.visits[:, t] > 0
        assert (there.sum(1) == 2**t).all()
        assert (there.nonzero()[:, 1] >= 2**t - 1).all()
    assert problem.reward[:, :7].count_nonzero() == 0
    assert set(problem.reward[:, 7:].unique().tolist()) == {0.0, 1.0}


def test_which_hessian_it_is():
    """∇²J and the surrogate's Hessian are the same for one step, and different for several."""
    one, several = batch_of(FAMILIES[1]), batch_of(FAMILIES[-1])
    torch.testing.assert_close(one.objective_hessian, one.surrogate_hessian)
    assert (mdp.norm(several.objective_hessian - several.surrogate_hessian) > 1e-3).all()


def test_selection_is_the_masks():
    batch, variant = batch_of(FAMILIES[4], 30), VARIANTS[0]
    chosen = selection.choose(batch, variant)
    shift = batch.objective_shift(batch.steps, batch.surrogate_hessian)
    bounds = chosen.omega + variant.margin * chosen.curvature * batch.radius**2
    assert 5 < len(chosen.some) < 31
    for i in chosen.some.tolist():
        rule = Mask(float(chosen.max_policy_shift[i]), math.inf, float(bounds[i]))
        weight = rule.judge(batch.policy_shift(batch.steps)[i], shift[i]).weight
        assert torch.equal(weight.bool(), chosen.accepted[i])
        torch.testing.assert_close(chosen.step[i], batch.steps[i][weight.bool()].mean(0))


def test_a_subsets_own_shift_is_the_models():
    """Σ of `curvature.objective_shift` over the tokens of a trajectory."""
    family, generator = FAMILIES[5], torch.Generator().manual_seed(2)
    problem, weight = family.draw(1, generator)
    values = mdp.evaluate(problem, family.horizon, weight)
    state, action, factor = families.sample(problem, family.horizon, values, weight, generator)
    steps = torch.randn(1, families.CANDIDATES, weight[0].numel(), generator=generator, dtype=DOUBLE)
    found = families.own_shift(problem, weight, steps, state, action, factor)
    probs = mdp.log_policy(problem, weight).exp()[0]
    for k in range(3):
        features = problem.features[0, state[0, k]]
        ids = torch.arange(family.actions).expand(len(features), -1)
        tokens = TokenBatch(features, ids, probs[state[0, k]], action[0, k], factor[0, k])
        z = features @ steps[0, k].view(weight[0].shape).T
        expected = curvature.objective_shift(tokens, z, 1.0).sum()
        torch.testing.assert_close(found[0, k], expected)


@pytest.fixture(scope="module")
def found():
    return measure.run(FAMILIES, 140, seed=3)


def test_what_holds_and_what_does_not(found):
    content = report.numbers(found, FAMILIES, 3)
    fails = {name for name, one in content["steps"].items() if one["violated"]}
    assert fails == {"66, H of J"}
    assert content["steps"]["66, H of J"]["where"] == [family.name for family in FAMILIES[2:]]
    assert max(content["identities"].values()) < 1e-6
    assert not any(ends["80"]["violated"] for ends in content["conclusions"].values())
    sure = content["conclusions"][VARIANTS[-1].name]  # the one reading that neglects nothing
    assert sure["gain ≥ ω"]["violated"] == sure["82"]["violated"] == 0 < sure["82"]["instances"]
    assert all(row["accepted"] <= row["best"] + 1e-9 <= row["bound"] + 1e-8 for row in content["reach"])
    assert content["bounds"]["both"]["accepted"] == 0 < content["bounds"]["symmetric"]["negative"]


def test_violations_are_computed_twice(found):
    examples = report.counterexamples(found)
    assert {one["claim"] for one in examples} >= {"82", "66, H of J"}
    for one in examples:
        if one["claim"] == "66, H of J":
            assert one["used"] == pytest.approx(one["used_again"], rel=1e-3)
            assert one["used"] > one["allowed"]
        else:
            assert one["gain"] == pytest.approx(one["gain_again"], abs=1e-9)
            assert one["accepted"] == one["accepted_again"] > 0


def test_a_broken_inequality_is_detected(monkeypatch):
    """An ε, and with it a C, that is far below the largest advantage."""
    bound = Batch.advantage_bound.fget
    monkeypatch.setattr(Batch, "advantage_bound", property(lambda self: bound(self) / 1e4))
    found = measure.run(FAMILIES[2:], 100, seed=3)
    steps = report.numbers(found, FAMILIES[2:], 3)["steps"]
    broken = {"65", "65, C / 2", "100", "102, first", "102, second", "104", "reach (ours)"}
    assert {name for name, one in steps.items() if one["violated"]} == {*broken, "66, H of J"}


def test_half_is_enough_and_less_is_not():
    """Opposite steps along an eigenvector: m_H of the mean is ½ M r² below the mean of m_H, and no steps do worse."""
    batch = batch_of(FAMILIES[4], 50)
    top = torch.linalg.eigh(batch.surrogate_hessian)
    sign = top.eigenvalues[:, -1] >= top.eigenvalues.abs().amax(1) - 1e-12  # M is the largest eigenvalue itself
    vector = top.eigenvectors[..., -1]
    parts = (batch.gradient, batch.objective_hessian, batch.surrogate_hessian, batch.fisher)
    opposite = Batch(batch.problem, 2, batch.weight, batch.values, torch.stack([vector, -vector], 1), *parts)
    opposite = opposite.at(sign.nonzero()[:, 0])
    assert len(opposite.weight) > 5
    checked = claims.aggregation(opposite, VARIANTS[0])
    used, allowed = checked["79, with ½ M r² (ours)"]
    torch.testing.assert_close(used, allowed)
    assert not claims.violated(opposite, used, allowed).any()
    assert claims.violated(opposite, used, 0.98 * allowed).all()


def test_without_the_cubic_term_eq_82_is_wrong():
    """Two arms, one step: J can rise by ½ at most, but the accepted step promises ω = 1."""
    batch = two_arms([[2.2, -2.2]])
    gain = claims.Taken.of(batch, batch.steps[:, 0]).gain(batch)
    assert float(gain) == pytest.approx(1 / (1 + math.exp(-4.4)) - 0.5)
    chosen = selection.select(batch, VARIANTS[0], torch.tensor([1e-3], dtype=DOUBLE))  # H = 0: any M > 0 will do
    assert chosen.accepted.all()
    assert float(chosen.omega) == pytest.approx(4.4 / 4 - 0.5e-3 * 2 * 2.2**2)
    used, allowed = claims.conclusions(batch, VARIANTS[0], chosen, claims.Taken.of(batch, chosen.step))["82"]
    assert (float(allowed), bool(claims.violated(batch, used, allowed))) == (0, True)
    assert not selection.choose(batch, VARIANTS[-1]).accepted.any()  # M along the step: it is too long


def test_no_step_reaches_further():
    """Advantages ±ε and a step along the natural gradient: Cauchy–Schwarz is an equality."""
    used, allowed = claims.reach(two_arms([[0.1, -0.1]]))["reach (ours)"]
    torch.testing.assert_close(used, allowed)
    assert selection.largest_share(1 / 3, 0) == pytest.approx(1)
    assert selection.largest_share(1.0, 2) > 1 > selection.largest_share(1.0, 3)
    assert selection.largest_share(1.0, 1) == math.inf
    assert selection.largest_share(1.0, 1024) == pytest.approx(math.sqrt(3) / 1024, rel=1e-3)


def test_nothing_to_accept():
    """No reward, no gradient: every table is still written."""
    batch = batch_of(Family("discounted", 3, 2, 0))
    flat = Batch.of(batch.problem._replace(reward=0 * batch.problem.reward), 0, batch.weight, batch.steps)
    chosen = selection.choose(flat, Variant("", True, 1.0, True))
    assert isinstance(chosen, Selection)
    assert len(chosen.some) == 0


def test_the_command(tmp_path, capsys):
    assert command.main(["--instances", "7", "--seed", "5", "--out", str(tmp_path / "a")]) == 0
    assert command.main(["--instances", "7", "--seed", "5", "--out", str(tmp_path / "b")]) == 0
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"theorem.json", "theorem.md", "theorem.png", "theorem.svg"}
    first, again = ((tmp_path / name / "theorem.json").read_text() for name in "ab")
    assert first == again
    assert json.loads(first)["instances"] == 7
    assert (tmp_path / "a" / "theorem.md").read_text() in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert command.main(["--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        command.main(["--instances", "0"])
