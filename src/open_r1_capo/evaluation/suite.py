r"""The two suites of eight test sets: where their problems come from and what counts as the gold answer.

`open` are the paper's: GSM8K, MATH500, OlympiadBench, MinervaMath, GPQA-Diamond, AMC23, AIME24, AIME25. `lab` are
eight held-out variants of the lab's task. A row of a test set, from the hub or from a local file, becomes a record
with `id`, `problem`, `gold` and `kind`; `kind` decides how answers are scored (scoring.py).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from open_r1_capo.tasks.data import DataError, boxed, gold_answer, hub_rows, read_rows
from open_r1_capo.tasks.source import PROBLEMS

CHOICES_SEED = 0  # of GPQA's order of choices
DRAWN_PROBLEMS = 200  # of each test set that a problem source draws
DRAWN_SEED = 1  # a run measures itself with seed 0


def _plain(row: dict) -> str:
    return gold_answer(row["answer"] if "answer" in row else row["solution"])


def _without_thousands(row: dict) -> str:
    return re.sub(r"(?<=\d),(?=\d{3})", "", _plain(row))


def _whole(row: dict) -> str:
    """Read AIME's 025 and AMC's 27.0 as the whole numbers they are."""
    answer = re.sub(r"\\\w+|[^\d.\-]", "", _plain(row))  # one copy of AIME25 writes 336^\circ
    return str(int(float(answer)))


def _olympiad(row: dict) -> str:
    return gold_answer(row["final_answer"] if "final_answer" in row else row["answer"])


def _minerva(row: dict) -> str:
    answer = re.sub(r"(\d)e([+-]?\d+)", r"\1 \\times 10^{\2}", _plain(row))
    return answer.replace("np.", "\\").replace("./", "/")


@dataclass(frozen=True)
class Benchmark:
    """One test set."""

    name: str  # in TASKS, and the stem of its local file
    title: str  # in tables
    origin: str  # on the hub; where `source` draws the problems, the name of its test set
    config: str | None
    split: str
    gold: Callable[[dict], str] = _plain  # turns a row into the gold answer; not used for a choice
    kind: str = "math"  # math (math-verify), number (the same with Minerva's tolerance) or choice (a letter)
    samples: int = 1  # answers per problem; small sets need several for a usable standard error
    source: str | None = None  # which of `PROBLEMS` draws the problems; None: the hub or a local file

    @property
    def task(self) -> str:
        """Name of the lighteval task; lighteval has its own gsm8k, … and refuses a second one."""
        return f"capo:{self.name}"


OPEN = (
    Benchmark("gsm8k", "GSM8K", "openai/gsm8k", "main", "test", _without_thousands),
    Benchmark("math_500", "MATH500", "HuggingFaceH4/MATH-500", None, "test"),
    Benchmark("olympiadbench", "OlympiadBench", "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", _olympiad),
    Benchmark("minervamath", "MinervaMath", "math-ai/minervamath", None, "test", _minerva, kind="number"),
    Benchmark("gpqa_diamond", "GPQA-Diamond", "Idavidrein/gpqa", "gpqa_diamond", "train", kind="choice"),
    Benchmark("amc23", "AMC23", "math-ai/amc23", None, "test", _whole, samples=16),
    Benchmark("aime24", "AIME24", "HuggingFaceH4/aime_2024", None, "train", _whole, samples=16),
    Benchmark("aime25", "AIME25", "yentinglin/aime_2025", None, "train", _whole, samples=16),
)


def drawn(source: str) -> tuple[Benchmark, ...]:
    """The test sets of a problem source, called <source>_<name>."""
    return tuple(
        Benchmark(f"{source}_{name}", name.replace("_", " "), name, None, "test", samples=4, source=source)
        for name in PROBLEMS[source].suite(0)
    )


SUITES = {"open": OPEN} | {name: drawn(name) for name, source in PROBLEMS.items() if "suite" in source.measures}


def select(names: str | None, default: str = "open") -> tuple[Benchmark, ...]:
    """Choose benchmarks by the names of benchmarks or suites; a DataError if a name is unknown."""
    known = [benchmark for suite in SUITES.values() for benchmark in suite]
    chosen: set[str] = set()
    for name in re.split(r"[,\s]+", (names or "").strip() or default):
        if name not in SUITES and name not in {b.name for b in known}:
            raise DataError(f"unknown task {name}; known: {', '.join([*SUITES, *(b.name for b in known)])}")
        chosen |= {b.name for b in SUITES[name]} if name in SUITES else {name}
    return tuple(b for b in known if b.name in chosen)


def choices(row: dict) -> tuple[str, str]:
    """The lettered choices of a GPQA question and the right letter; the order depends on the question alone."""
    names = ["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
    order = random.Random(sha256(f"{CHOICES_SEED}:{row['Question']}".encode()).digest()).sample(range(4), 4)
    lines = [f"({letter}) {str(row[names[i]]).strip()}" for letter, i in zip("ABCD", order, strict=True)]
    return "\n".join(lines), "ABCD"[order.index(0)]


def record(benchmark: Benchmark, row: dict, index: int) -> dict:
    """Turn a row (number `index`) into a record with `id`, `problem`, `gold` (boxed LaTeX or a letter) and `kind`.

    A row that is a record already stays as it is.

    Raises:
        DataError: a column is missing.
    """
    if "gold" in row:
        return {key: row[key] for key in ("id", "problem", "gold", "kind")}
    try:
        if benchmark.kind == "choice":
            lines, gold = choices(row)
            problem = f"{row['Question'].strip()}\n\n{lines}\n\nAnswer with the letter of the right choice."
        else:
            problem, gold = row.get("problem") or row["question"], boxed(benchmark.gold(row))
    except (KeyError, ValueError) as error:
        raise DataError(f"{benchmark.name}, row {index}: {type(error).__name__} {error}") from error
    return {"id": str(row.get("id", index)), "problem": problem, "gold": gold, "kind": benchmark.kind}


def _from_hub(benchmark: Benchmark) -> list[dict]:
    local_copy = f"DATA=<folder with {benchmark.name}.jsonl>"
    try:
        return hub_rows(benchmark.origin, benchmark.config, benchmark.split, local_copy)
    except DataError as error:
        if benchmark.kind != "choice":
            raise
        terms = f"accept the terms of {benchmark.origin} on the hub and run `hf auth login`"
        raise DataError(f"{benchmark.title} is gated and comes from the hub only: {terms}") from error


def records(benchmark: Benchmark, folder: str | Path | None = None) -> list[dict]:
    """Load a test set from a folder with <name>.jsonl or .parquet, or from the hub (None).

    GPQA's authors ask that its text is not stored in the open, so it comes from the hub only.

    Raises:
        DataError: it cannot be read; the sentence says what to do.
    """
    if benchmark.source:
        rows = PROBLEMS[benchmark.source].suite(DRAWN_PROBLEMS, DRAWN_SEED)[benchmark.origin]
    elif folder is None or benchmark.kind == "choice":
        rows = _from_hub(benchmark)
    else:
        if not Path(folder).is_dir():
            raise DataError(f"the data folder {folder} does not exist")
        files = [Path(folder) / f"{benchmark.name}{suffix}" for suffix in (".jsonl", ".parquet")]
        rows = read_rows(next((file for file in files if file.exists()), files[0]))
    return [record(benchmark, row, index) for index, row in enumerate(rows)]


def write_records(rows: list[dict], path: Path) -> str:
    """Write records as JSONL and return the sha256 of the file."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return sha256(text.encode()).hexdigest()
