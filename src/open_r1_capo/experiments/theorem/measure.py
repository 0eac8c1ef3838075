"""Draw instances, check every claim on them, and count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from open_r1_capo.experiments.theorem import claims, mdp
from open_r1_capo.experiments.theorem.claims import Claims, Taken
from open_r1_capo.experiments.theorem.families import Family, Proposals, propose
from open_r1_capo.experiments.theorem.recheck import Recheck, derivatives
from open_r1_capo.experiments.theorem.selection import VARIANTS, Batch, Selection, Variant, accepts, choose, mean_step

CHUNK = 500  # instances at a time
MEASURABLE = 1e-10  # a ratio of smaller numbers is rounding


@dataclass
class Outcome:
    """A claim on instances of one family."""

    family: Family
    claim: str
    variant: str | None  # None: the claim is of any step
    used: Tensor  # (n,)
    allowed: Tensor  # (n,)
    violated: Tensor  # (n,), bool
    recheck: dict[str, float] | None = None  # of the worst violation


@dataclass
class Found:
    """What all families gave."""

    outcomes: list[Outcome] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)  # identity → largest relative error
    rows: list[dict[str, Any]] = field(default_factory=list)  # of each chunk: tensors for the tables and the figure


def run(families: Iterable[Family], instances: int, seed: int) -> Found:
    """Check `instances` problems, spread evenly over the families."""
    found, families = Found(), list(families)
    for place, family in enumerate(families):
        generator = torch.Generator().manual_seed(1000 * seed + place)
        count = -(-instances // len(families))
        for size in [CHUNK] * (count // CHUNK) + [count % CHUNK] * (count % CHUNK > 0):
            check(found, family, size, generator)
    return found


def check(found: Found, family: Family, count: int, generator: torch.Generator) -> None:
    """Check one chunk of a family."""
    problem, weight = family.draw(count, generator)
    values = mdp.evaluate(problem, family.horizon, weight)
    proposals = propose(problem, family.horizon, values, weight, generator)
    batch = Batch.of(problem, family.horizon, weight, proposals.steps)
    taken = Taken.of(batch, batch.steps.mean(1))
    way = mdp.segment(problem, family.horizon, values, weight, taken.step)
    for name, error in claims.identities(batch, taken, way).items():
        found.errors[name] = max(found.errors.get(name, 0.0), float(error.max()))
    checked = claims.expansions(batch, taken, way) | claims.reach(batch) | claims.aggregation(batch, VARIANTS[0])
    if family.horizon:
        checked |= claims.finite_horizon(batch, taken)
    record(found, family, batch, checked)
    for outcome in found.outcomes[-len(checked) :]:
        if outcome.claim == "66, H of J" and outcome.violated.any():
            outcome.recheck = expanded_again(batch, taken, outcome)
    row = {"family": family, "best": claims.best_share(batch), "radius": batch.radius, "variants": {}}
    row["discount"] = problem.discount
    row["hessians"] = mdp.norm(batch.objective_hessian - batch.surrogate_hessian) / mdp.norm(batch.objective_hessian)
    for variant in VARIANTS:
        row["variants"][variant.name] = conclude(found, family, batch, variant)
    row["bounds"] = symmetric_bounds(batch, proposals)
    found.rows.append(row)


def record(found: Found, family: Family, batch: Batch, checked: Claims, variant: Variant | None = None) -> None:
    """Keep the numbers of some claims."""
    for name, (used, allowed) in checked.items():
        bad = claims.violated(batch, used, allowed)
        found.outcomes.append(Outcome(family, name, variant.name if variant else None, used, allowed, bad))


def conclude(found: Found, family: Family, batch: Batch, variant: Variant) -> dict[str, Tensor]:
    """Select as one variant of the theorem does, take the aggregated step, and check what it promises."""
    selection = choose(batch, variant)
    some = selection.some
    part, chosen = batch.at(some), selection.at(some)
    taken = Taken.of(part, chosen.step)
    checked = claims.conclusions(part, variant, chosen, taken)
    record(found, family, part, checked, variant)
    for outcome in found.outcomes[-len(checked) :]:
        if outcome.violated.any() and outcome.claim in ("82", "gain ≥ 0"):
            outcome.recheck = again(part, chosen, taken, variant, outcome)
    penalty = part.penalty * chosen.max_policy_shift.sqrt()
    gain = taken.gain(part)
    return {
        "instances": some,
        "radius": part.radius,
        "omega": chosen.omega,
        "penalty": penalty,
        "gain": gain,
        "below": claims.violated(part, chosen.omega, gain),
        "accepted": chosen.accepted.sum(1),
    }


def expanded_again(batch: Batch, taken: Taken, outcome: Outcome) -> dict[str, float]:
    """|L_π(π') − J − m_H| with H = ∇²J by the second computation, where the first misses its bound most."""
    i = int((outcome.used - outcome.allowed).argmax())
    second, weight = Recheck.of(batch.problem.at(i), batch.horizon), batch.weight[i].numpy()
    move = taken.step[i].view(weight.shape).numpy()
    slope, curved = derivatives(lambda t: second.objective(weight + t * move))
    missed = second.surrogate(weight, weight + move) - second.objective(weight) - slope - curved / 2
    used, allowed = float(outcome.used[i]), float(outcome.allowed[i])
    return {"index": i, "excess": used - allowed, "used": used, "used_again": abs(missed), "allowed": allowed}


def again(batch: Batch, chosen: Selection, taken: Taken, variant: Variant, outcome: Outcome) -> dict[str, Any]:
    """A violation by the second computation: the gain, and whether every accepted step passed Eq. 69."""
    i = int((outcome.used - outcome.allowed).masked_fill(~outcome.violated, -torch.inf).argmax())
    problem = batch.problem.at(i)
    second = Recheck.of(problem, batch.horizon)
    weight = batch.weight[i].numpy()
    gain = second.objective(weight + taken.step[i].view(weight.shape).numpy()) - second.objective(weight)
    bound = chosen.omega[i] + variant.margin * chosen.curvature[i] * batch.radius[i].square()
    passed = []
    for step in batch.steps[i][chosen.accepted[i]]:
        move = step.view(weight.shape).numpy()
        slope, _ = derivatives(lambda t, move=move: second.objective(weight + t * move))
        if variant.objective:
            _, curved = derivatives(lambda t, move=move: second.objective(weight + t * move))
        else:
            _, curved = derivatives(lambda t, move=move: second.surrogate(weight, weight + t * move))
        passed.append(bool(slope + curved / 2 >= float(bound) - 1e-6))
    return {
        "index": i,
        "excess": float((outcome.used - outcome.allowed)[i]),
        "gain": float(taken.gain(batch)[i]),
        "gain_again": gain,
        "omega": float(chosen.omega[i]),
        "penalty": float(batch.penalty[i] * chosen.max_policy_shift[i].sqrt()),
        "curvature": float(chosen.curvature[i]),
        "radius": float(batch.radius[i]),
        "accepted": len(passed),
        "accepted_again": sum(passed),
        "reward": problem.reward.tolist() if problem.reward.numel() <= 6 else None,
        "logits": (problem.features @ batch.weight[i].T).tolist() if problem.reward.numel() <= 6 else None,
        "step": taken.step[i].tolist() if problem.reward.numel() <= 6 else None,
    }


def symmetric_bounds(batch: Batch, proposals: Proposals) -> dict[str, dict[str, Tensor]]:
    """The experiments' bounds −δ_H < m_H < δ_H beside the theorem's m_H ≥ δ_H, with the same δ_H and δ_F.

    δ_H is the median of |m_H|, δ_F the upper quartile of m_F; H is the surrogate's, as CAPO models it.
    """
    shift, policy = batch.objective_shift(batch.steps, batch.surrogate_hessian), batch.policy_shift(batch.steps)
    max_policy, bound = policy.quantile(0.75, dim=1), shift.abs().quantile(0.5, dim=1)
    inside, own = policy <= max_policy[:, None], proposals.own_shift
    arms = {
        "all": torch.ones_like(inside),
        "symmetric": inside & (shift.abs() < bound[:, None]),
        "own": inside & (own.abs() < own.abs().quantile(0.5, dim=1)[:, None]),
        "lower": accepts(shift, policy, bound, max_policy),
    }
    arms["both"] = arms["symmetric"] & arms["lower"]
    result = {}
    for name, mask in arms.items():
        step = mean_step(batch.steps, mask)
        gain = Taken.of(batch, step).gain(batch)
        falls = claims.violated(batch, -gain, torch.zeros_like(gain))
        result[name] = {"accepted": mask, "shift": shift, "own": own, "falls": falls}
    return result


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Instances, violations, and the median and worst used / allowed of a claim, over families."""
    used, allowed, bad = (
        torch.cat([getattr(one, name) for one in outcomes]) for name in ("used", "allowed", "violated")
    )
    ratio = (used / allowed)[allowed > MEASURABLE]
    where = [one.family.name for one in outcomes if one.violated.any()]
    return {
        "instances": len(used),
        "violated": int(bad.sum()),
        "median": float(ratio.median()) if len(ratio) else None,
        "worst": float(ratio.max()) if len(ratio) else None,
        "where": list(dict.fromkeys(where)),
    }
