"""Token records, `<run>/tokens/*.json.gz`: what became of every token of a few steps.

    {"step", "lr", "taken_lr", "measured_kl", "rejected",
     "completions": [{"prompt", "text", "reward", "advantage", "tokens": [...], "prob": [...], …}]}

Every list of a completion has one entry for each of its tokens that takes part. Numbers have four significant digits;
one that is not finite is null, and so is a list of what was not measured. On several ranks, the records are of rank 0.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# what a notable record was kept for, in the record itself: the first step that was taken, then the largest values
NOTABLE = {"first": "taken_lr", "most_rejected": "rejected", "largest_kl": "measured_kl"}
REASONS = {"over_policy": 1, "over_objective": 2, "non_finite": 4, "other": 8}  # bits of the column `reason`
# columns of a completion: one number or null a token. Every record has the required ones; readers may require more
REQUIRED = ("policy_shift", "objective_shift", "weight", "reason")
TOKEN_COLUMNS = (*REQUIRED, "prob", "prob_after", "entropy", "gradient_norm", "kl", "kl_head")


def read_record(path: Path, required: Sequence[str] = REQUIRED) -> dict[str, Any]:
    """Read a token record whose completions have the `required` columns.

    Raises:
        ValueError: it cannot be read, or is no such record; the message says what is wrong with it.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(str(error)) from None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("it has no step")
    if not isinstance(record.get("completions"), list):
        raise ValueError("it has no completions")
    for completion in record["completions"]:
        tokens = completion.get("tokens") if isinstance(completion, dict) else None
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise ValueError("a completion has no tokens")
        if "advantage" not in completion or not isinstance(completion["advantage"], int | float | None):
            raise ValueError("a completion has no advantage")
        for key in TOKEN_COLUMNS:
            column = completion.get(key)
            if (column is None and key in required) or (column is not None and not _fits(column, len(tokens))):
                raise ValueError(f"{key} does not have a value for every token")
    return record


def _fits(column: Any, length: int) -> bool:
    right_length = isinstance(column, list) and len(column) == length
    return right_length and all(isinstance(value, int | float | None) for value in column)
