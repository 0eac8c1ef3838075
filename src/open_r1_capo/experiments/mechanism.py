"""What rejected tokens are, what their gradients add up to, and what masking them does: `make mechanism`.

Two parts, each optional. RECORDS="<run folder> …" describes rejected, kept and random tokens from the token records of
runs with token_records=all. RUN=<run folder> takes the next step from every checkpoint of a run once more under other
rules (`open_r1_capo.experiments.counterfactual`); train it with `make train RECIPE=grpo_aggressive ARGS=save_steps=5`.

Writes OUT/mechanism.json and OUT/mechanism.md. Exit codes: 0 done; 2 the input cannot be used.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from open_r1_capo.experiments.counterfactual import STEP, Counterfactual, compare
from open_r1_capo.runs.exit import UserError, run_cli
from open_r1_capo.runs.records import REQUIRED, read_record
from open_r1_capo.runs.run import Run
from open_r1_capo.training.run import quiet

Token = dict[str, Any]
NEEDED = (*REQUIRED, "prob", "entropy", "gradient_norm")  # columns of a record
GROUPS = ("rejected", "kept", "random")
NAMES = {
    "share": "share of tokens",
    "prob": "probability, median",
    "unlikely": "share with probability < 0.1",
    "entropy": "entropy, mean (nats)",
    "positive": "share with A > 0",
    "word": "share that are words (of letters alone)",
    "position": "position in the completion, 0 to 1",
    "kl_share": "share of the step's KL",
    "gradient_share": "share of the summed gradient norms",
}


class RecordError(UserError, ValueError):
    """Token records that cannot be used."""


def tokens_of(record: dict[str, Any], bounds: tuple[float, float] | None = None) -> list[Token]:
    """The tokens of a step's record that have a gradient, one dictionary each, with `position` in [0, 1].

    The bounds δ_F and δ_H decide which tokens count as rejected; None takes the rejections that took place.
    """
    tokens = []
    for completion in record["completions"]:
        if not completion["advantage"]:
            continue
        count = len(completion["tokens"])
        for i in range(count):
            token = {name: completion[name][i] for name in ("prob", "entropy", "gradient_norm")}
            shifts = (completion["policy_shift"][i], completion["objective_shift"][i])
            token |= {
                "kl": completion["kl"][i] if completion.get("kl") else None,
                "advantage": completion["advantage"],
                "word": completion["tokens"][i].strip().isalpha(),
                "position": i / max(1, count - 1),
                "rejected": over(shifts, bounds) if bounds else completion["weight"][i] == 0,
            }
            tokens.append(token)
    return tokens


def over(shifts: tuple[float | None, float | None], bounds: tuple[float, float]) -> bool:
    """Whether Eq. 11 with δ_F and δ_H rejects a token with the shifts m_F and m_H; None stands for not finite."""
    if None in shifts:
        return True
    return shifts[0] > bounds[0] or abs(shifts[1]) >= bounds[1]


def describe(steps: Iterable[Sequence[Token]]) -> dict[str, dict[str, float | None]]:
    """The facts of rejected, kept and random tokens, the latter as many of each step as were rejected."""
    rng = random.Random(0)
    groups: dict[str, list[Token]] = {name: [] for name in GROUPS}
    everything = []
    for tokens in steps:
        rejected = [token for token in tokens if token["rejected"]]
        groups["rejected"] += rejected
        groups["kept"] += [token for token in tokens if not token["rejected"]]
        groups["random"] += rng.sample(list(tokens), len(rejected))
        everything += tokens
    return {name: facts(members, everything) for name, members in groups.items()}


def facts(members: Sequence[Token], everything: Sequence[Token]) -> dict[str, float | None]:
    """The numbers NAMES of one group of tokens (None: not measured), and `tokens`, how many there are."""
    count = len(members)
    if not count:
        return {"tokens": 0} | dict.fromkeys(NAMES)
    # null where a probability was not finite
    probs, entropies = ([t[name] for t in members if t[name] is not None] for name in ("prob", "entropy"))
    return {
        "tokens": count,
        "share": count / len(everything),
        "prob": statistics.median(probs) if probs else None,
        "unlikely": statistics.fmean(prob < 0.1 for prob in probs) if probs else None,
        "entropy": statistics.fmean(entropies) if entropies else None,
        "positive": sum(token["advantage"] > 0 for token in members) / count,
        "word": sum(token["word"] for token in members) / count,
        "position": statistics.fmean(token["position"] for token in members),
        "kl_share": _part(members, everything, "kl"),
        "gradient_share": _part(members, everything, "gradient_norm"),
    }


def _part(members: Sequence[Token], everything: Sequence[Token], name: str) -> float | None:
    """The members' share of a sum; unknown values are left out of both."""
    mine, whole = (sum(token[name] or 0.0 for token in tokens) for tokens in (members, everything))
    return mine / whole if whole else None


def read(run: Run) -> list[dict[str, Any]]:
    """The records of every step of a run, in order; a RecordError if there are none or one cannot be read."""
    records = []
    for path in run.records_folder.glob("step*.json.gz"):
        try:
            records.append(read_record(path, NEEDED))
        except ValueError as error:
            raise RecordError(f"{path} cannot be read ({error})") from None
    if not records:
        raise RecordError(f"{run.path} has no record of every step: train it with token_records=all")
    return sorted(records, key=lambda record: record["step"])


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers get three significant digits, None is a dash."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)


def steps_table(arms: dict[str, dict[str, dict[str, float]]]) -> str:
    """The arms of the counterfactual: mean, and ± standard error of the paired difference to `none`."""
    names = (*STEP, "reward")
    rows = [
        [arm, *(f"{v['mean']:.3g} ({v['change']:+.2g} ± {v['change_error']:.1g})" for v in map(values.get, names))]
        for arm, values in arms.items()
    ]
    return table(["step taken with", *names], rows)


def gradients_table(rows: Sequence[dict[str, Any]]) -> str:
    """The gradients of rejected and of random tokens, averaged over the checkpoints where any was rejected."""
    names = ("tokens", "norm", "other_norm", "cosine", "coherence")
    lines = []
    for arm, label in (("mask", "rejected"), ("random", "random")):
        parts = [row["gradient"][arm] for row in rows if row["gradient"][arm]["tokens"]]
        values = [[part[name] for part in parts if part[name] is not None] for name in names]
        lines.append([label, *(statistics.fmean(v) if v else None for v in values)])
    return table(["tokens", "number", "norm of their sum", "norm of the others' sum", "cosine", "coherence"], lines)


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Both parts, as JSON and as Markdown."""
    content, texts = {}, []
    if options.records:
        bounds = tuple(options.bounds) if options.bounds else None
        steps = [tokens_of(record, bounds) for folder in options.records for record in read(Run(folder))]
        content["tokens"] = {"runs": [str(run) for run in options.records], "steps": len(steps), **describe(steps)}
        rows = [[label, *(content["tokens"][group][name] for group in GROUPS)] for name, label in NAMES.items()]
        texts.append(table(["", *GROUPS], rows))
    if options.run:
        steps, rows = Counterfactual(options.run, options.problems, options.samples), []
        for checkpoint in steps.checkpoints():
            rows.append(steps.at(checkpoint))
            print(f"step {rows[-1]['step']}: {'as' if rows[-1]['agrees'] else 'NOT as'} the run", file=sys.stderr)
        content["steps"] = {"run": str(options.run), "arms": compare(rows), "checkpoints": rows}
        texts += [steps_table(content["steps"]["arms"]), gradients_table(rows)]
    return content, "\n".join(texts)


def work(options: argparse.Namespace) -> None:
    """Measure, print and write."""
    content, text = measure(options)
    print(text)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "mechanism.json").write_text(json.dumps(content, indent=1) + "\n")
        (options.out / "mechanism.md").write_text(text)
    except OSError as error:
        raise UserError(f"{error.filename or options.out} cannot be written ({error.strerror})") from None


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, measure and write."""
    parser = argparse.ArgumentParser(prog="make mechanism", description=__doc__.split("\n\n")[0])
    parser.add_argument("--records", nargs="*", type=Path, default=[], help="run folders with token_records=all")
    parser.add_argument("--bounds", nargs=2, type=float, help="δ_F and δ_H that reject tokens of runs without a mask")
    parser.add_argument("--run", type=Path, help="run folder with checkpoints, whose steps are taken again")
    parser.add_argument("--problems", type=int, default=200, help="training problems that measure a step's reward")
    parser.add_argument("--samples", type=int, default=2, help="completions a problem")
    parser.add_argument("--out", type=Path, default=Path("outputs/mechanism"))
    options = parser.parse_args(argv)
    if not options.records and not options.run:
        parser.error('give RECORDS="<run folder> …", RUN=<run folder> or both')
    if min(options.problems, options.samples) < 1:
        parser.error(f"--problems and --samples are at least 1, got {options.problems} and {options.samples}")
    quiet()
    return run_cli(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
