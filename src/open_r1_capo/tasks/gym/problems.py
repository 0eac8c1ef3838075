"""Problems of one reasoning-gym task: drawn from a seed, split by their text, found again by a reference.

    check("chain_sum", {"max_terms": 2})                       # ValueError for an unknown task or option
    rows = draw("chain_sum", {"max_terms": 2}, "test", 100)    # problem, answer, entry

A task's scoring reads more of a problem than its answer, and not all of that can be written down. So a row carries
`entry`, the reference of a problem (task, options, seed, index), from which `find` makes it again.
"""

from __future__ import annotations

import difflib
import functools
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

from open_r1_capo.tasks.data import DataError, split_of

PREFIX = "reasoning_gym/"
PACKAGE = "reasoning-gym==0.1.25"
DRAWS = 20_000  # problems of one seed that are looked at before giving up
OURS = ("seed", "size")  # options that follow from the run's seed and data.problems
LEFT_OUT = ("composite",)  # a mixture of tasks, whose options are tasks themselves
WORKED = "answer_cot"  # where a task's metadata has a worked solution, ending in GSM8K's ####


def _registry() -> Mapping[str, tuple[type, type]]:
    """Class and settings of every task; raises ValueError with the command that installs the package."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ValueError(
            f"name={PREFIX}… needs the package reasoning-gym: run `{sys.executable} -m pip install '{PACKAGE}'`"
        ) from None
    return {name: entry for name, entry in DATASETS.items() if name not in LEFT_OUT}


def check(task: str, options: Mapping[str, Any]) -> None:
    """Refuse an unknown task, an option that it does not have, or a value out of range; ValueError."""
    tasks = _registry()
    if task not in tasks:
        raise ValueError(f"name={PREFIX}{task}: reasoning-gym has no such task; {_nearest(task, tasks)}")
    known = {one.name: one for one in fields(tasks[task][1]) if one.name not in OURS}
    for name, value in options.items():
        if name in OURS:
            raise ValueError(f"options.{name} follows from the run: set seed= or data.problems= instead")
        if name not in known:
            raise ValueError(f"options.{name}: the task {task} has no such option; {_nearest(name, known)}")
        _check_kind(name, value, known[name])
    try:
        _dataset(task, json.dumps(dict(options)), 0)
    except (AssertionError, ValueError, TypeError) as error:
        raise ValueError(
            f"options: the task {task} refuses {dict(options)} ({str(error) or 'out of range'})"
        ) from None


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _check_kind(name: str, value: Any, option: Any) -> None:
    """Refuse a value of another kind than the option's default; many tasks would fail at it much later."""
    default = option.default_factory() if option.default_factory is not MISSING else option.default
    if default is None or default is MISSING:
        return
    # bool first: True is an int too
    groups = ((bool, "true or false"), (int, "a whole number"), ((int, float), "a number"), (str, "text"),
              ((list, tuple), "a list"), (dict, "a group"))  # fmt: skip
    kind, words = next(((kind, words) for kind, words in groups if isinstance(default, kind)), (object, ""))
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"options.{name} must be {words}, got {value!r}")


@functools.lru_cache(maxsize=16)
def _dataset(task: str, options: str, seed: int) -> Any:
    """The task's problems of one seed, by index; options as JSON."""
    kind, config = _registry()[task]
    return kind(config=config(**json.loads(options), seed=seed, size=DRAWS))


def find(reference: str) -> tuple[Any, dict[str, Any]]:
    """The data set and the problem (question, answer, metadata) of a row's `entry`."""
    where = json.loads(reference)
    data = _dataset(where["task"], json.dumps(where["options"]), where["seed"])
    return data, data[where["index"]]


def _drawn(task: str, options: Mapping[str, Any], split: str, seed: int) -> Iterator[tuple[str, Any, dict]]:
    """References, data sets and problems of a split; `test` gives each text once."""
    # A checksum keeps the seeds apart: problem i of seed s is problem i - 1 of seed s + 1.
    start = zlib.crc32(f"{task}/{split}/{seed}".encode())
    data, seen = _dataset(task, json.dumps(dict(options)), start), set()
    for index in range(DRAWS):
        entry = data[index]
        question = entry["question"]
        if split_of(question) != split or (split == "test" and question in seen):
            continue
        seen.add(question)
        where = {"task": task, "options": dict(options), "seed": start, "index": index}
        yield json.dumps(where), data, entry


def draw(task: str, options: Mapping[str, Any], split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """State `count` problems of a split: `problem`, `answer` (one of the right ones, or "") and `entry`.

    Raises:
        DataError: The task with these options has too few different problems.
    """
    rows: list[dict[str, str]] = []
    for reference, _, entry in _drawn(task, options, split, seed):
        if len(rows) == count:
            break
        answer = "" if entry["answer"] is None else str(entry["answer"])
        rows.append({"problem": entry["question"], "answer": answer, "entry": reference})
    return _enough(rows, count, f"{split} problems", task)


def worked(task: str, options: Mapping[str, Any], count: int, seed: int = 0) -> list[dict[str, str]]:
    """State `count` train problems with worked solutions: `problem` and `solution`, which ends in `Answer: …`.

    Raises:
        DataError: The task gives no worked solutions, or too few.
    """
    rows: list[dict[str, str]] = []
    for _, data, entry in _drawn(task, options, "train", seed):
        if len(rows) == count:
            break
        steps, mark, answer = str(entry["metadata"].get(WORKED, "")).rpartition("####")
        if not mark:
            raise DataError(f"{PREFIX}{task} has no worked solutions; {PREFIX}gsm_symbolic has")
        if data.score_answer(answer.strip(), entry) >= 1:  # a few templates round in the text and not in the answer
            rows.append({"problem": entry["question"], "solution": f"{steps.strip()}\nAnswer: {answer.strip()}"})
    return _enough(rows, count, "worked solutions", task)


def _enough(rows: list[dict[str, str]], count: int, what: str, task: str) -> list[dict[str, str]]:
    if len(rows) < count:
        raise DataError(
            f"{PREFIX}{task} has only {len(rows)} {what} among {DRAWS:,} draws with these data.options, and {count} "
            "were asked for: widen the options, or ask for fewer"
        )
    return rows
