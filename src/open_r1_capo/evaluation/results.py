"""From scored problems to numbers: accuracies, standard errors, the TEST mean, and the two files that report them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from open_r1_capo.runs.run import write_atomically


def problem_error(means: Sequence[float]) -> float | None:
    """Standard error over problems and samples: the standard deviation (n − 1) of the problems' accuracies over √n.

    Another set of such problems would differ by this. None for a single problem.
    """
    n, mean = len(means), sum(means) / len(means)
    return math.sqrt(sum((m - mean) ** 2 for m in means) / (n - 1) / n) if n > 1 else None


def sample_error(means: Sequence[float], samples: int) -> float | None:
    """Standard error over samples alone: √(Σ p(1 − p) / (samples − 1)) / n of the problems' accuracies p.

    Another evaluation of the same problems would differ by this. None for one answer per problem.
    """
    if samples < 2:
        return None
    return math.sqrt(sum(m * (1 - m) for m in means) / (samples - 1)) / len(means)


def summarise(problems: Sequence[dict], samples: int, max_tokens: int) -> dict:
    """Reduce a test set to its row of the table.

    A problem has `accuracy` (None: the gold answer could not be parsed) and `tokens` of each answer; answers of
    `max_tokens` tokens were cut off.
    """
    means = [problem["accuracy"] for problem in problems if problem["accuracy"] is not None]
    tokens = [count for problem in problems for count in problem["tokens"]]
    return {
        "accuracy": sum(means) / len(means) if means else None,
        "stderr": problem_error(means) if means else None,
        "stderr_samples": sample_error(means, samples) if means else None,
        "n": len(means),
        "samples": samples,
        "excluded": len(problems) - len(means),
        "tokens": sum(tokens),
        "mean_tokens": sum(tokens) / len(tokens) if tokens else 0.0,
        "cut_off": sum(count >= max_tokens for count in tokens) / len(tokens) if tokens else 0.0,
    }


def test_mean(rows: dict[str, dict], missing: Sequence[str]) -> dict:
    """Average the test sets with equal weights; their errors are independent. `missing` are titles of absent sets."""
    scored = [row for row in rows.values() if row["accuracy"] is not None]
    errors = [row["stderr"] for row in scored]
    return {
        "accuracy": sum(row["accuracy"] for row in scored) / len(scored) if scored else None,
        "stderr": None if not scored or None in errors else math.sqrt(sum(e * e for e in errors)) / len(scored),
        "over": len(scored),
        "missing": list(missing),
    }


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def table(results: dict) -> list[str]:
    """The lines of a Markdown table of what results.json holds, with remarks on what was left out."""
    lines = [
        f"# {results['model']['name']}",
        "",
        "| test set | accuracy % | ± problems | ± samples | problems | samples | tokens an answer | cut off % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["tasks"].values():
        cells = [_percent(row[key]) for key in ("accuracy", "stderr", "stderr_samples")]
        cells += [str(row["n"]), str(row["samples"]), f"{row['mean_tokens']:.0f}", _percent(row["cut_off"])]
        lines.append(f"| {row['title']} | " + " | ".join(cells) + " |")
    test = results["test"]
    lines.append(f"| **TEST** | **{_percent(test['accuracy'])}** | {_percent(test['stderr'])} | | | | | |")
    missing = f"; missing: {', '.join(test['missing'])}" if test["missing"] else ""
    lines += ["", f"TEST is the mean over {test['over']} test sets{missing}."]
    for row in results["tasks"].values():
        if row["excluded"]:
            lines.append(f"{row['title']}: {row['excluded']} problems left out, their gold answer cannot be parsed.")
    if results["settings"]["limit"]:
        lines.append(f"Only {results['settings']['limit']} problems a set were evaluated: not a result to compare.")
    errors = "± problems: standard error over problems and samples. ± samples: over samples alone, the problems fixed."
    return [*lines, "", errors]


def write(results: dict, folder: Path) -> None:
    """Write results.json, and results.md: the table with everything that determines it below."""
    write_atomically(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    facts = {key: results[key] for key in ("model", "settings", "data", "versions", "commit")}
    lines = [*table(results), "", "```json", json.dumps(facts, indent=1), "```"]
    write_atomically(folder / "results.md", "\n".join(lines) + "\n")
