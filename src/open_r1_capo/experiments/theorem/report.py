"""What was found, as numbers and as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from open_r1_capo.experiments.mechanism import table
from open_r1_capo.experiments.theorem.claims import CONCLUSIONS, TEXT
from open_r1_capo.experiments.theorem.families import Family
from open_r1_capo.experiments.theorem.measure import Found, summarise
from open_r1_capo.experiments.theorem.selection import VARIANTS, largest_share, penalty

BOUNDS = {
    "all": "all candidates",
    "symmetric": "−δ_H < m_H < δ_H",
    "own": "−δ_H < m_H < δ_H, m_H by the subset's own tokens",
    "lower": "m_H ≥ δ_H",
    "both": "the second and the fourth",
}
STEP_HEAD = ["Eq.", "claim, of any step", "instances", "violated", "median ratio", "worst ratio", "where"]
# of a real run: advantages of GRPO up to ε, δ_F and δ_H of CAPO in Table 4
PRACTICE = {"policy_shift": 1e-4, "objective_shift": 1e-2, "advantage": 1.0}


def numbers(found: Found, families: Sequence[Family], seed: int) -> dict[str, Any]:
    """Everything for theorem.json."""
    steps = {name: summarise([o for o in found.outcomes if o.claim == name]) for name in TEXT if _has(found, name)}
    ends = {
        variant.name: {
            name: summarise([o for o in found.outcomes if o.claim == name and o.variant == variant.name])
            for name in CONCLUSIONS
        }
        for variant in VARIANTS
    }
    drawn = sum(len(row["radius"]) for row in found.rows)
    return {
        "name": "theorem",
        "instances": drawn,
        "seed": seed,
        "families": [family.name for family in families],
        "identities": found.errors,
        "steps": steps,
        "conclusions": ends,
        "guaranteed": guaranteed(found),
        "reach": reach(found),
        "bounds": bounds(found),
        "hessians": hessians(found, families),
        "practice": practice(),
        "counterexamples": counterexamples(found),
    }


def _has(found: Found, name: str) -> bool:
    return any(outcome.claim == name for outcome in found.outcomes)


def reach(found: Found) -> list[dict[str, Any]]:
    """By γ and by T: the largest gᵀΔθ / (C √m_F) of any step, and the largest ω / (C √δ_F) that was accepted."""
    groups: dict[tuple[float, int], list[tuple[float, float]]] = {}
    for row in found.rows:
        horizon, accepted = row["family"].horizon, torch.zeros(len(row["radius"]), dtype=torch.float64)
        for taken in row["variants"].values():
            share = taken["omega"] / taken["penalty"]
            accepted[taken["instances"]] = torch.maximum(accepted[taken["instances"]], share)
        columns = (row["discount"].tolist(), row["best"].tolist(), accepted.tolist())
        for discount, best, share in zip(*columns, strict=True):
            groups.setdefault((discount, horizon), []).append((best, share))
    result = []
    for (discount, horizon), pairs in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])):
        best, accepted = (max(values) for values in zip(*pairs, strict=True))
        shares = {"bound": largest_share(discount, horizon), "best": best, "accepted": accepted}
        if horizon != 1:  # C is 0 there, so that every ω is enough
            result.append({"discount": discount, "horizon": horizon, "instances": len(pairs)} | shares)
    return result


def bounds(found: Found) -> dict[str, dict[str, float]]:
    """What the symmetric bounds accept, beside what the theorem's bound accepts with the same thresholds."""
    result = {}
    for arm in BOUNDS:
        parts = [row["bounds"][arm] for row in found.rows]
        mask, shift, own = (torch.cat([p[name].flatten() for p in parts]) for name in ("accepted", "shift", "own"))
        some = torch.cat([part["accepted"].any(1) for part in parts])
        falls = torch.cat([part["falls"] for part in parts])
        result[arm] = {
            "accepted": float(mask.double().mean()),
            "negative": float((shift < 0)[mask].double().mean()) if mask.any() else None,
            "hidden": float((own > 0)[mask & (shift < 0)].double().mean()) if (mask & (shift < 0)).any() else None,
            "falls": float(falls[some].double().mean()) if some.any() else None,
        }
    return result


def hessians(found: Found, families: Sequence[Family]) -> dict[str, float]:
    """The median of ‖∇²J − ∇²L_π‖ / ‖∇²J‖ of each family."""
    return {
        family.name: float(torch.cat([row["hessians"] for row in found.rows if row["family"] is family]).median())
        for family in families
        if any(row["family"] is family for row in found.rows)
    }


def practice() -> list[dict[str, float]]:
    """C √δ_F of lengths and discounts that are in use."""
    cases = [(0.9, 0), (0.99, 0), (0.999, 0), (1.0, 8), (1.0, 64), (1.0, 1024)]
    rows = []
    for discount, horizon in cases:
        c = penalty(discount, horizon) * PRACTICE["advantage"]
        needed = c * math.sqrt(PRACTICE["policy_shift"])
        top = PRACTICE["advantage"] / c  # √δ_F at which C √δ_F is the whole range of a reward in [0, 1]
        share = largest_share(discount, horizon)
        rows.append({"discount": discount, "horizon": horizon, "omega": needed, "share": share, "kl": top**2})
    return rows


def guaranteed(found: Found) -> dict[str, int]:
    """How often the theorem's condition ω ≥ C √δ_F was met where C > 0, and how often J fell then."""
    parts = [taken for row in found.rows if row["family"].horizon != 1 for taken in row["variants"].values()]
    omega, needed, gain = (torch.cat([part[name] for part in parts]) for name in ("omega", "penalty", "gain"))
    sure = omega >= needed
    return {"selections": len(gain), "guaranteed": int(sure.sum()), "fell": int((gain[sure] < 0).sum())}


def counterexamples(found: Found) -> list[dict[str, Any]]:
    """The worst violation of each claim and reading of the theorem, computed twice."""
    worst: dict[tuple[str, str | None], dict[str, Any]] = {}
    for outcome in found.outcomes:
        key = (outcome.claim, outcome.variant)
        if outcome.recheck and not worst.get(key, {}).get("excess", -1) > outcome.recheck["excess"]:
            names = {"claim": outcome.claim, "variant": outcome.variant, "family": outcome.family.name}
            worst[key] = names | outcome.recheck
    return list(worst.values())


def markdown(content: dict[str, Any]) -> str:
    """Every table of theorem.md."""
    parts = [
        f"**The theorem on {content['instances']} random problems, seed {content['seed']}**\n",
        "Ratio: what is used of what is allowed; 1 is tight, below 0 the bound was not needed.\n",
        table(STEP_HEAD, [_row(name, TEXT[name], one) for name, one in content["steps"].items()]),
    ]
    parts.append(_conclusions_table(content["conclusions"]))
    sure = content["guaranteed"]
    parts.append(
        f"Of {sure['selections']} selections of problems with C > 0, {sure['guaranteed']} have ω ≥ C √δ_F; "
        f"J fell after {sure['fell']} of these.\n"
    )
    errors = ", ".join(f"Eq. {name}: {error:.0e}" for name, error in content["identities"].items())
    parts += [f"Identities, largest relative error: {errors}.\n", _reach_table(content["reach"])]
    parts += [_bounds_table(content["bounds"]), _practice_table(content["practice"])]
    rows = content["hessians"].items()
    parts.append(table(["family", "‖∇²J − ∇²L_π‖ / ‖∇²J‖, median"], rows))
    return "\n".join([*parts, _counterexample_table(content["counterexamples"])])


def _conclusions_table(variants: dict[str, dict[str, Any]]) -> str:
    fails = [f"not {_absolute(text)}" for text in CONCLUSIONS.values()]
    head = ["accepted with", "instances", *fails, "ω / gain, median", "ω / gain, worst"]
    lines = []
    for variant, ends in variants.items():
        gain = ends["gain ≥ ω"]
        counts = [str(one["violated"]) for one in ends.values()]
        lines.append([variant, str(gain["instances"]), *counts, gain["median"], gain["worst"]])
    return table(head, lines)


def _row(equation: str, text: str, one: dict[str, Any]) -> list[Any]:
    where = ", ".join(one["where"]) or None
    cells = [_absolute(text), str(one["instances"]), str(one["violated"]), one["median"], one["worst"], where]
    return [equation.split(",")[0] if equation[0].isdigit() else "–", *cells]


def _absolute(text: str) -> str:
    return text.replace("|", "\\|")  # a bar would end the cell


def _reach_table(rows: list[dict[str, Any]]) -> str:
    head = ["", "bound", "best step of an instance", "largest accepted", "instances"]
    lines = [[_case(row), row["bound"], row["best"], row["accepted"], str(row["instances"])] for row in rows]
    return "ω / (C √δ_F); the guarantee of improvement asks for at least 1.\n\n" + table(head, lines)


def _case(row: dict[str, Any]) -> str:
    return f"T = {row['horizon']}" if row["horizon"] else f"γ = {row['discount']:g}"


def _bounds_table(arms: dict[str, dict[str, float]]) -> str:
    names = ("accepted", "negative", "hidden", "falls")
    head = ["bounds", "accepted", "of these m_H < 0", "of those, m_H > 0 by their own tokens", "J falls"]
    return table(head, [[BOUNDS[arm], *(values[name] for name in names)] for arm, values in arms.items()])


def _practice_table(rows: list[dict[str, float]]) -> str:
    case = f"δ_F = {PRACTICE['policy_shift']:g}, ε = {PRACTICE['advantage']:g}"
    head = [case, "C √δ_F", "in units of the paper's δ_H", "largest possible ω / (C √δ_F)", "δ_F with C √δ_F = ε"]
    size = PRACTICE["objective_shift"]
    return table(head, [[_case(r), r["omega"], r["omega"] / size, r["share"], r["kl"]] for r in rows])


def _counterexample_table(examples: list[dict[str, Any]]) -> str:
    lines = []
    for one in examples:
        if one["claim"] in CONCLUSIONS:
            text = f"gain {one['gain']:.6g}, again {one['gain_again']:.6g}; ω {one['omega']:.6g}"
            text += f", C √δ_F {one['penalty']:.3g}"
            text += f"; {one['accepted_again']} of {one['accepted']} accepted steps pass Eq. 69 again"
        else:
            text = f"missed by {one['used']:.6g}, again {one['used_again']:.6g}; allowed {one['allowed']:.3g}"
        lines.append([one["claim"], one["variant"], one["family"], text])
    return "The worst violation of each, computed twice.\n\n" + table(["claim", "accepted with", "family", ""], lines)
