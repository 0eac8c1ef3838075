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

SEED = 0  # of GPQA's order of choices
LAB_PROBLEMS = 200  # of each variant
LAB_SEED = 1


@dataclass(frozen=True)
class Benchmark:
    """One test set.

    Attributes:
        name: What TASKS names it; also the stem of its local file.
        title: What tables call it.
        hub: Name on the hub; for the lab, the name of the variant.
        config: Configuration there.
        split: Split there.
        gold: Turns a row into the gold answer.
        kind: math (math-verify), number (math-verify with Minerva's tolerance) or choice (a letter).
        samples: Answers a problem by default; small sets need several for a usable standard error.
    """

    name: str
    title: str
    hub: str
    config: str | None
    split: str
    gold: Callable[[dict], str]
    kind: str = "math"
    samples: int = 1

    @property
    def task(self) -> str:
        """Name of the lighteval task; lighteval has own tasks called gsm8k, …, and refuses a second one."""
        return f"capo:{self.name}"


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


def _choice(row: dict) -> str:
    return choices(row)[1]


OPEN = (
    Benchmark("gsm8k", "GSM8K", "openai/gsm8k", "main", "test", _without_thousands),
    Benchmark("math_500", "MATH500", "HuggingFaceH4/MATH-500", None, "test", _plain),
    Benchmark("olympiadbench", "OlympiadBench", "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", _olympiad),
    Benchmark("minervamath", "MinervaMath", "math-ai/minervamath", None, "test", _minerva, kind="number"),
    Benchmark("gpqa_diamond", "GPQA-Diamond", "Idavidrein/gpqa", "gpqa_diamond", "train", _choice, kind="choice"),
    Benchmark("amc23", "AMC23", "math-ai/amc23", None, "test", _whole, samples=16),
    Benchmark("aime24", "AIME24", "HuggingFaceH4/aime_2024", None, "train", _whole, samples=16),
    Benchmark("aime25", "AIME25", "yentinglin/aime_2025", None, "train", _whole, samples=16),
)


def lab() -> tuple[Benchmark, ...]:
    """Return the lab's test sets, one for each variant of its task.

    Returns:
        Eight benchmarks named lab_<variant>.
    """
    from open_r1_capo.tasks.lab.task import VARIANTS

    return tuple(
        Benchmark(f"lab_{name}", name.replace("_", " "), name, None, "test", _plain, samples=4) for name in VARIANTS
    )


def select(names: str | None, model_is_lab: bool = False) -> tuple[Benchmark, ...]:
    """Choose the benchmarks of an evaluation.

    Args:
        names: Names separated by commas or spaces, `open` and `lab` included; nothing for the model's own suite.
        model_is_lab: Whether the model is the lab's policy, whose own suite is `lab`.

    Returns:
        The benchmarks, in the order of the suites.

    Raises:
        DataError: If a name is unknown.
    """
    wanted = re.split(r"[,\s]+", names.strip()) if names and names.strip() else ["lab" if model_is_lab else "open"]
    known = [*OPEN, *lab()]
    groups = {"open": {b.name for b in OPEN}, "lab": {b.name for b in lab()}}
    chosen: set[str] = set()
    for name in wanted:
        if name not in groups and name not in {b.name for b in known}:
            raise DataError(f"unknown task {name}; known: open, lab, {', '.join(b.name for b in known)}")
        chosen |= groups.get(name, {name})
    return tuple(b for b in known if b.name in chosen)


def choices(row: dict) -> tuple[str, str]:
    """Order the four choices of a GPQA question, by the question and a fixed seed alone.

    Args:
        row: A row of the hub's data set.

    Returns:
        The choices as lettered lines, and the letter of the right one.
    """
    names = ["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
    order = random.Random(sha256(f"{SEED}:{row['Question']}".encode()).digest()).sample(range(4), 4)
    lines = [f"({letter}) {str(row[names[i]]).strip()}" for letter, i in zip("ABCD", order, strict=True)]
    return "\n".join(lines), "ABCD"[order.index(0)]


def record(benchmark: Benchmark, row: dict, index: int) -> dict:
    """Turn a row of a test set, from the hub or a local file, into a record.

    Args:
        benchmark: The test set.
        row: One of its rows; a record is returned as it is.
        index: Position of the row, the id of rows that have none.

    Returns:
        `id`, `problem`, `gold` (LaTeX in a box, or a letter) and `kind`.

    Raises:
        DataError: If a column is missing.
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
    try:
        return hub_rows(benchmark.hub, benchmark.config, benchmark.split, f"DATA=<folder with {benchmark.name}.jsonl>")
    except DataError as error:
        if benchmark.kind != "choice":
            raise
        terms = f"accept the terms of {benchmark.hub} on the hub and run `hf auth login`"
        raise DataError(f"{benchmark.title} is gated and comes from the hub only: {terms}") from error


def records(benchmark: Benchmark, folder: str | Path | None = None) -> list[dict]:
    """Load a test set.

    Args:
        benchmark: The test set.
        folder: Folder with <name>.jsonl or .parquet, or None for the hub; the lab's sets need neither, and GPQA's
            authors ask that its text is not stored in the open, so it comes from the hub only.

    Returns:
        Its records.

    Raises:
        DataError: If it cannot be read; the sentence says what to do.
    """
    if benchmark.name.startswith("lab_"):
        from open_r1_capo.tasks.lab.task import problems

        rows = problems("test", LAB_PROBLEMS, seed=LAB_SEED, variant=benchmark.hub)
    elif folder is None or benchmark.kind == "choice":
        rows = _from_hub(benchmark)
    else:
        if not Path(folder).is_dir():
            raise DataError(f"the data folder {folder} does not exist")
        files = [Path(folder) / f"{benchmark.name}{suffix}" for suffix in (".jsonl", ".parquet")]
        rows = read_rows(next((file for file in files if file.exists()), files[0]))
    return [record(benchmark, row, index) for index, row in enumerate(rows)]


def write_records(rows: list[dict], path: Path) -> str:
    """Write records as JSONL.

    Args:
        rows: The records.
        path: The file.

    Returns:
        The sha256 of the file's content, in hexadecimal.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return sha256(text.encode()).hexdigest()
