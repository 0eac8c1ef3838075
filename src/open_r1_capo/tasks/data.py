r"""Problems with their answers, and the one prompt template that training and evaluation share.

    problems = load_problems("math_train_7500")                      # from the hub
    problems = load_problems("math_train_12000", path="my/folder")   # from math_train.jsonl in a folder
    problems = load_problems(path="my/problems.jsonl")
    to_prompts(problems, SYSTEM_PROMPT)                              # prompt, solution, problem, answer

Sources: DigitalLearningGmbH/MATH-lighteval (MATH, 7,500 train and 5,000 test problems) and HuggingFaceH4/MATH-500.
The 12,000 are the whole of MATH without MATH-500, the split that openai/prm800k describes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from open_r1_capo.runs.exit import UserError
from open_r1_capo.tasks.hub import hub_reachable
from open_r1_capo.tasks.verifier import box_end

if TYPE_CHECKING:
    from datasets import Dataset

SYSTEM_PROMPT = (
    "You solve problems step by step. First think the problem through inside <think> and </think>: plan, calculate, "
    "and check your work. Then, after </think>, state the result briefly and put the final answer, and nothing else, "
    "inside \\boxed{}."
)
MATH, MATH_500 = "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500"
MATH_SETS = {"math_train_7500": 7500, "math_train_12000": 12000}
PROBLEM_COLUMNS = ("problem", "question", "Problem", "Question", "input")
ANSWER_COLUMNS = ("answer", "Answer", "final_answer", "solution", "expected_answer", "output")
SHOWN = 3  # faults of a file that are named
SOLUTION_COLUMNS = ("solution", "completion", "response")  # worked ones
KEPT_COLUMNS = ("id", "level", "subject", "type", "split")
TEST_SHARE = 5  # one problem in five is held out, of sources that have no test set


class DataError(UserError, ValueError):
    """A data set cannot be used; the message is one sentence for the user."""


# --- the prompt template ---------------------------------------------------------------------------------------------


def make_prompt(problem: str, system_prompt: str | None) -> list[dict]:
    """The conversation that asks for the answer to a problem; None or "" sends no system turn."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": problem}]


def read_prompt(path: str) -> str:
    """The text of a prompt that a file holds, without its last line ends; DataError if it cannot be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"the prompt in {path} cannot be read ({reason})") from None


def check_user_prompt(text: str, name: str) -> None:
    """Refuse a template of the user's turn without a place for the problem: ValueError, beginning with `name`."""
    if "{problem}" not in text:
        raise ValueError(f"{name} must hold {{problem}} where the problem goes, got {text[:60]!r}")


def prompt_template_hash(system_prompt: str | None, user_prompt: str = "{problem}") -> str:
    """Identify a prompt template in 16 hex digits: evaluations with different hashes asked different questions."""
    template = json.dumps(make_prompt(user_prompt, system_prompt), sort_keys=True)
    return hashlib.sha256(template.encode()).hexdigest()[:16]


def to_prompts(dataset: Dataset, system_prompt: str | None) -> Dataset:
    r"""Add the columns that GRPOTrainer and the rewards read: `prompt` (a conversation), `solution` (`\boxed{…}`)."""

    def add(row: dict) -> dict:
        return {"prompt": make_prompt(row["problem"], system_prompt), "solution": boxed(row["answer"])}

    return dataset.map(add, load_from_cache_file=False)


# --- answers ---------------------------------------------------------------------------------------------------------


def boxed(answer: str) -> str:
    r"""Write a gold answer as math-verify parses it best: `\boxed{…}` without inner dollar signs, "" for none."""
    answer = re.sub(r"(?<!\\)\$", "", answer).strip()
    return f"\\boxed{{{answer}}}" if answer else ""


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}`, `\boxed x` or `\fbox{…}` of a solution; None without a complete box."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*(\{|\s\S+)", text))
    if not boxes:
        return None
    last = boxes[-1]
    if last[1] != "{":
        return last[1].strip().rstrip("$.")
    end = box_end(text, last.start(1))
    return None if end < 0 else text[last.end(1) : end - 1].strip()


def gold_answer(value: object) -> str:
    """The gold answer in a cell: a solution's last box, what follows GSM8K's ####, or the cell itself; "" for none."""
    if isinstance(value, list | tuple):
        return ", ".join(gold_answer(element) for element in value)
    text = "" if value is None else str(value)
    if "\\boxed" in text or "\\fbox" in text:
        return last_boxed(text) or ""
    return text.rpartition("####")[2].strip()


def stated_answer(text: str) -> str:
    r"""The answer that a completion states, without the white space and asterisks around it.

    The last `<answer>…</answer>`; else the last `\boxed{…}`; else the rest of the line after the last `Answer:`; else
    the whole text.
    """
    if tags := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL):
        answer = tags[-1]
    elif (box := last_boxed(text)) is not None:
        answer = box
    elif lines := re.findall(r"\banswer:(.*)", text, re.IGNORECASE):
        answer = lines[-1]
    else:
        answer = text
    return answer.strip().strip("*").strip()


# --- held-out problems -----------------------------------------------------------------------------------------------


def split_of(problem: str) -> str:
    """`test` for one problem in five, else `train`, by its text alone."""
    # A checksum and not hash(): Python's own hash of a string changes from process to process.
    return "test" if zlib.crc32(normalise(problem).encode()) % TEST_SHARE == 0 else "train"


# --- reading ---------------------------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> list[dict]:
    """Read a JSONL or Parquet file, one dict a row; raises DataError if it is missing or malformed."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a Parquet file: {error}") from error
    if path.suffix not in (".jsonl", ".json"):
        raise DataError(f"{path} is neither .jsonl nor .parquet")
    rows, faults = [], []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                row, fault = _parse_line(line)
                rows += [] if fault else [row]
                faults += [(number, fault)] if fault else []
    _refuse_faults(str(path), faults, len(rows) + len(faults))
    return rows


def _parse_line(line: bytes) -> tuple[dict, str | None]:
    """The row of a line, and what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return {}, f"is not a JSON object ({error.msg.removesuffix(' at')} at column {error.colno})"
    except ValueError as error:  # not UTF-8
        return {}, f"is not a JSON object ({error})"
    return (row, None) if isinstance(row, dict) else ({}, f"is not a JSON object (it is a {type(row).__name__})")


def _refuse_faults(source: str, faults: list[tuple[int, str]], total: int, unit: str = "line") -> None:
    """Raise DataError if there are any: how many, and the first ones by line."""
    if faults:
        first = "; ".join(f"{unit} {number} {fault}" for number, fault in faults[:SHOWN])
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise DataError(
            f"{source}: {len(faults)} of {total} {unit}s cannot be used: {first}{more}: mend them, or take them out"
        )


def _file_rows(path: Path, split: str, stems: tuple[str, ...]) -> list[dict]:
    """Read a file, or those files of a folder that belong to the split (or whose name starts with a stem)."""
    if not path.exists():
        raise DataError(f"data.path={path} does not exist")
    if path.is_file():
        return read_rows(path)
    os.listdir(path)  # rglob passes over what it must not read
    files = sorted(file for file in path.rglob("*") if file.suffix in (".jsonl", ".parquet"))
    for stem in stems:
        if chosen := [file for file in files if file.name.startswith(stem)]:
            return [row for file in chosen for row in read_rows(file)]
    if len(files) != 1:
        names = ", ".join(str(file.relative_to(path)) for file in files[:8]) or "no .jsonl or .parquet file"
        raise DataError(f"data.path={path} has no file named {split}*; name one of its files instead: {names}")
    return read_rows(files[0])


LOCAL_COPY = "data.path=<file or folder of .jsonl or .parquet>"


def hub_rows(name: str, config: str | None, split: str, local_copy: str = LOCAL_COPY) -> list[dict]:
    """Load a data set from the hub or its local cache, one dict a row; `local_copy` tells users how to give a copy.

    Raises:
        DataError: If it does not exist, is gated, or the hub cannot be reached.
    """
    import datasets

    work_offline_if_unreachable()
    try:
        return datasets.load_dataset(name, config, split=split).to_list()
    except datasets.exceptions.DatasetNotFoundError as error:
        gated = "gated" in str(error)
        hint = "is gated: accept its terms on the hub and run `hf auth login`" if gated else "was not found on the hub"
        raise DataError(f"data set {name} {hint} (or use a local copy: {local_copy})") from error
    except (OSError, ValueError) as error:  # no network: ConnectionError; no such config or split: ValueError
        if isinstance(error, OSError) or "Couldn't find cache" in str(error):
            raise DataError(
                f"data set {name} could not be downloaded (is this machine offline?); use a local copy: {local_copy}"
            ) from error
        raise DataError(f"data set {name}: {error}") from error


def work_offline_if_unreachable() -> None:
    """Use the hub's cache alone if it cannot be reached: each of the client's retries would wait in vain."""
    import datasets
    import huggingface_hub

    if not hub_reachable():
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True


def _readable(read: Callable[[], list[dict]], source: str) -> list[dict]:
    """The rows; raises DataError where the system does not let them be read."""
    try:
        return read()
    except OSError as error:
        raise DataError(f"{error.filename or source} cannot be read ({error.strerror or error})") from error


def _math_rows(name: str, path: Path | None) -> list[dict]:
    """Load one of the two MATH training sets and check that it is complete."""
    if path is None:
        rows = hub_rows(MATH, None, "train")
        if name == "math_train_12000":
            held_out = {normalise(row["problem"]) for row in hub_rows(MATH_500, None, "test")}
            rows += [row for row in hub_rows(MATH, None, "test") if normalise(row["problem"]) not in held_out]
    else:
        rows = _file_rows(path, "train", (name, "math_train", "train"))
        if name == "math_train_7500":
            rows = [row for row in rows if row.get("split", "train") == "train"]
    if len(rows) != MATH_SETS[name]:
        raise DataError(f"{name} from {path or MATH} has {len(rows)} problems instead of {MATH_SETS[name]}")
    return rows


def normalise(problem: str) -> str:
    """A problem without white space, to compare those of different copies of a data set."""
    return "".join(problem.split())


def _column(what: str, wanted: str | None, candidates: Iterable[str], rows: list[dict], source: str) -> str:
    """Choose the column to read, of the problem or the answer: the wanted one, else the first candidate there is."""
    names = [wanted] if wanted else list(candidates)
    for name in names:
        if name in rows[0]:
            return name
    there = ", ".join(map(str, rows[0]))
    hint = "" if wanted else f": name the column with data.{what}_column=<name>"
    raise DataError(f"{source} has no column {' or '.join(names)}; its columns are {there}{hint}")


def _rows(name: str | None, path: str | Path | None, config: str | None, split: str) -> tuple[str, list[dict]]:
    """The source, for messages, and all its rows; raises DataError if there is none."""
    if not name and not path:
        raise DataError("no data set: give data.name=<name> or data.path=<file or folder>")
    source, local = str(path or name), Path(path) if path else None
    if name in MATH_SETS:
        rows = _readable(lambda: _math_rows(name, local), source)
    elif local:
        rows = _readable(lambda: _file_rows(local, split, (split,)), source)
    else:
        rows = hub_rows(name, config, split)
    if not rows:
        raise DataError(f"{source} holds no problem")
    return source, rows


def load_problems(
    name: str | None = None,
    path: str | Path | None = None,
    *,
    config: str | None = None,
    split: str = "train",
    problem_column: str | None = None,
    answer_column: str | None = None,
) -> Dataset:
    r"""Load problems and their answers: `problem`, `answer`, and those of KEPT_COLUMNS that the source has.

    Args:
        name: `math_train_7500`, `math_train_12000`, or the name of any data set on the hub.
        path: A JSONL or Parquet file, or a folder of them, to read instead of the hub.
        config: Configuration of a hub data set.
        split: Split of a hub data set; in a folder, the files whose names start with it.
        problem_column: By default the first of PROBLEM_COLUMNS that is there.
        answer_column: By default as above; of a worked solution, the last `\boxed` is taken.

    Raises:
        DataError: If the data set is missing, malformed, incomplete, or has no answers.
    """
    from datasets import Dataset, DatasetInfo

    source, rows = _rows(name, path, config, split)
    problem = _column("problem", problem_column, PROBLEM_COLUMNS, rows, source)
    answer = _column("answer", answer_column, ANSWER_COLUMNS, rows, source)
    kept = [column for column in KEPT_COLUMNS if column in rows[0]]
    table, faults = [], []
    for number, row in enumerate(rows, start=1):
        empty = [name for name in (problem, answer) if not str("" if row.get(name) is None else row[name]).strip()]
        faults += [(number, f"has nothing in column {empty[0]}")] if empty else []
        cells = {column: str(row.get(column)) for column in kept}
        table.append({"problem": str(row.get(problem)), "answer": gold_answer(row.get(answer)), **cells})
    _refuse_faults(source, faults, len(rows), "row")
    if not any(row["answer"] for row in table):
        raise DataError(f"{source}: no answer found in column {answer} (answers, or solutions with \\boxed{{…}})")
    found = f"{len(table)} of {source}, column {problem} with the answers in column {answer}"
    return Dataset.from_list(table, info=DatasetInfo(description=found))


def load_solutions(
    name: str | None = None,
    path: str | Path | None = None,
    *,
    config: str | None = None,
    split: str = "train",
    problem_column: str | None = None,
    answer_column: str | None = None,
) -> list[dict[str, str]]:
    """Load problems with worked solutions: `problem`, `solution` as it is, and the `answer` in it; arguments as above.

    Raises:
        DataError: If the data set is missing, malformed or empty, or a cell is not text.
    """
    source, rows = _rows(name, path, config, split)
    problem = _column("problem", problem_column, (*PROBLEM_COLUMNS, "prompt"), rows, source)
    solution = _column("answer", answer_column, (*SOLUTION_COLUMNS, *ANSWER_COLUMNS), rows, source)
    table = []
    for number, row in enumerate(rows, start=1):
        for column in (problem, solution):
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise DataError(f"{source}, row {number}: column {column} is empty, or not text")
        text = row[solution]
        answer = gold_answer(text) if "####" in text else stated_answer(text)
        table.append({"problem": row[problem], "solution": text, "answer": answer})
    return table
