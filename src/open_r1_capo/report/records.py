"""Token records of a run, made to fit on a page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from open_r1_capo.report.panels import number
from open_r1_capo.runs.records import TOKEN_COLUMNS, read_record
from open_r1_capo.runs.run import Run

LABELS = {"first": "first step", "most_rejected": "most tokens rejected", "largest_kl": "largest measured KL"}
MOST = 8  # records on a page
WHOLE = ("step", "lr", "taken_lr", "measured_kl")


def read_records(run: Run, interesting: list[int]) -> tuple[list[dict[str, Any]], list[str]]:
    """Read at most MOST records in the order of their steps, and notes on those that are missing.

    Labelled records come first, then those of the `interesting` steps in their order.
    """
    paths = sorted(run.records_folder.glob("*.json.gz"))
    ranks = {step: rank for rank, step in enumerate(interesting)}

    def order(path: Path) -> tuple[bool, float, float]:
        return _name(path) not in LABELS, ranks.get(_step(path), len(ranks)), _step(path)

    records: dict[int, dict[str, Any]] = {}
    notes = []
    for path in sorted(paths, key=order):
        if len(records) == MOST:
            break
        try:
            record = read_record(path)
        except ValueError as error:
            notes.append(f"tokens/{path.name} cannot be read ({error}).")
            continue
        whole = {key: number(record.get(key)) for key in WHOLE} | {"completions": record["completions"], "labels": []}
        known = records.setdefault(record["step"], whole)
        known["labels"] += [LABELS[_name(path)]] if _name(path) in LABELS else []
    if len(paths) > MOST:
        notes.append(f"{len(paths)} records were kept; at most {MOST} of them are on this page.")
    return [records[step] for step in sorted(records)], notes


def fit(records: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Keep what fits into `budget` bytes of JSON: of each record the completions with the most rejected tokens.

    Ties are broken by the largest shift; `of` is the number of completions that there were.
    """
    fitted = []
    for left, record in zip(range(len(records), 0, -1), records, strict=True):
        share = budget // left  # what an earlier record leaves is shared by the later ones
        whole = {key: record[key] for key in (*WHOLE, "labels")}
        kept, size = [], len(json.dumps(whole)) + 100
        for position, completion in sorted(enumerate(record["completions"]), key=lambda item: _rank(item[1])):
            clean = _clean(completion) | {"position": position}
            length = len(json.dumps(clean)) + 2
            if size + length > share:
                break
            kept.append(clean)
            size += length
        fitted.append(whole | {"completions": kept, "of": len(record["completions"])})
        budget -= size
    return fitted


def _rank(completion: dict[str, Any]) -> tuple[int, float]:
    rejected = sum(1 for weight in completion["weight"] if weight == 0)
    shifts = [v for v in completion["policy_shift"] if number(v) is not None]
    return -rejected, -max(shifts, default=0.0)


def _clean(completion: dict[str, Any]) -> dict[str, Any]:
    """Only what the page shows; a number that is not finite becomes null."""
    columns = {key: [number(v) for v in completion[key]] for key in TOKEN_COLUMNS if completion.get(key) is not None}
    scalars = {key: number(completion.get(key)) for key in ("reward", "advantage")}
    return {"prompt": str(completion.get("prompt", "")), "tokens": completion["tokens"], **scalars, **columns}


def _name(path: Path) -> str:
    return path.name.removesuffix(".json.gz")


def _step(path: Path) -> float:
    """The step that a file is named after; others come last."""
    digits = _name(path).removeprefix("step")
    return int(digits) if digits.isdecimal() else math.inf
