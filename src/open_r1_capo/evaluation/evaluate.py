"""Evaluates one model, reusing what earlier calls measured.

Each test set's outcome is stored under a key of everything that determines it, so no stale result is reused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from open_r1_capo.evaluation import EvalError, backends, results, scoring, suite
from open_r1_capo.evaluation.backends import LAUNCHER, ROOT, TASKS, Job, Sampling
from open_r1_capo.evaluation.model import Model, with_user_prompt
from open_r1_capo.evaluation.suite import Benchmark
from open_r1_capo.runs.run import write_atomically
from open_r1_capo.tasks import data, rewards, verifier
from open_r1_capo.tasks.data import DataError, check_user_prompt, prompt_template_hash, read_prompt

RESERVED = 1024  # tokens of the context that are left to the prompt, if it is long
LONGEST = 3072  # tokens of an answer


def commit() -> str:
    """This checkout's commit, with `-dirty` if files were changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def scoring_sources() -> str:
    """A hash of the files that turn answers into scores."""
    files = [TASKS, *(Path(module.__file__) for module in (suite, scoring, rewards, verifier, data))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def digest(value: object) -> str:
    """16 hexadecimal digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def claim(folder: Path, model: Model) -> None:
    """Reserve a results folder for this model; an EvalError if it holds anything but results of this model."""
    path = folder / "model.json"
    if path.exists():
        owner = json.loads(path.read_text())
        # a hub id or `lab` may come from another folder after an update
        known = owner["name"] == model.name or owner["folder"] == str(model.folder)
        if not known and owner["fingerprint"] != model.fingerprint:
            raise EvalError(f"{folder} holds results of another model, {owner['name']}: choose another OUT=<folder>")
        if owner["fingerprint"] != model.fingerprint:
            print(f"eval: the weights of {model.name} have changed: evaluating anew", file=sys.stderr)
    elif folder.exists() and any(folder.iterdir()):
        raise EvalError(f"{folder} is not empty and no results folder: choose another OUT=<folder>")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"name": model.name, "folder": str(model.folder), "fingerprint": model.fingerprint}
    write_atomically(path, json.dumps(facts, indent=1) + "\n")


def prepare_data(
    benchmarks: Sequence[Benchmark], source: Path | None, folder: Path, user_prompt: str = "{problem}"
) -> tuple[list[Benchmark], dict[str, str], list[str]]:
    """Write the test sets into `folder`, where lighteval reads them; `source` has local files, None is the hub.

    A problem becomes the user's turn that `user_prompt` makes of it; GPQA's questions have their own.

    Returns:
        The test sets that can be read, their sha256 by name, and the titles of those that cannot (gated GPQA-Diamond).

    Raises:
        DataError: a test set cannot be read, except GPQA-Diamond among others.
    """
    present, hashes, missing = [], {}, []
    for benchmark in benchmarks:
        try:
            rows = suite.records(benchmark, source)
        except DataError as error:
            if benchmark.kind != "choice" or len(benchmarks) == 1:
                raise
            print(f"eval: TEST without {benchmark.title}: {error}", file=sys.stderr)
            missing.append(benchmark.title)
            continue
        if benchmark.kind != "choice":
            rows = [row | {"problem": user_prompt.replace("{problem}", row["problem"])} for row in rows]
        hashes[benchmark.name] = suite.write_records(rows, folder / benchmark.name / "test.jsonl")
        present.append(benchmark)
    return present, hashes, missing


def run_tasks(job: Job, todo: Sequence[Benchmark], keys: dict[str, str], backend: str, out: Path) -> None:
    """Evaluate the test sets `todo` and write each outcome, under its key, into `out`."""
    from transformers import AutoTokenizer

    (out / "tasks").mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(job.model.folder)
    run = backends.run_vllm if backend == "vllm" else backends.run_transformers
    # vLLM's requests are cached one by one; transformers loses what is unfinished, so it gets one set at a time
    for group in [todo] if backend == "vllm" else [[benchmark] for benchmark in todo]:
        run(job, group)
        for benchmark in group:
            problems = backends.read_details(job, benchmark)
            for problem in problems:
                # lighteval reports no counts; one more for the end-of-text token, which is not part of the text
                answers = tokenizer(problem.pop("answers"), add_special_tokens=False)["input_ids"]
                problem["tokens"] = [min(len(ids) + 1, job.sampling.max_tokens) for ids in answers]
            outcome = {"key": keys[benchmark.name], "problems": problems}
            write_atomically(out / "tasks" / f"{benchmark.name}.json", json.dumps(outcome))


def stored(out: Path, name: str, key: str) -> list[dict] | None:
    """The scored problems of a test set; None if it was not evaluated under this key."""
    path = out / "tasks" / f"{name}.json"
    outcome = json.loads(path.read_text()) if path.exists() else {}
    return outcome["problems"] if outcome.get("key") == key else None


def as_asked(model: Model, options: argparse.Namespace) -> Model:
    """The model with the command line's prompt and length; an EvalError for a prompt without {problem}."""
    if options.max_length:
        model = replace(model, max_length=options.max_length)
    if options.prompt is None:
        return model
    text = read_prompt(options.prompt)
    try:
        check_user_prompt(text, f"the prompt in {options.prompt}")
    except ValueError as error:
        raise EvalError(str(error)) from None
    return with_user_prompt(model, text)


def longest(model: Model) -> int:
    """Tokens of an answer: LONGEST or what the context leaves; all of a length that was asked for, prompt included."""
    if model.max_length:
        return model.context  # a request whose prompt leaves less gets what there is
    return max(1, min(LONGEST, model.context - min(RESERVED, model.context // 4))) if model.context else LONGEST


def evaluate(model: Model, options: argparse.Namespace, out: Path) -> dict:
    """Evaluate one model with the command line's options; returns the content of results.json."""
    claim(out, model)
    model = as_asked(model, options)
    chosen = suite.select(options.tasks, model.suite)
    present, hashes, missing = prepare_data(chosen, options.data, out / "data", model.user_prompt)
    backend = backends.choose_backend(options.backend)
    sampling = Sampling(options.temperature, options.top_p, options.max_tokens or longest(model), options.seed)
    generating, scoring_versions = backends.versions(backend)
    identity = {
        "model": model.fingerprint,
        "template": prompt_template_hash(model.system_prompt, model.user_prompt),
        "sampling": asdict(sampling),
        "backend": backend,
        "versions": generating,
        "launcher": hashlib.sha256(LAUNCHER.read_bytes()).hexdigest()[:16],
    }
    if model.max_length:
        identity["max_length"] = model.max_length
    sources = scoring_sources()
    shared = identity | {"scoring": [sources, scoring_versions], "limit": options.limit}
    samples = {b.name: options.samples or b.samples for b in present}
    keys = {b.name: digest([shared, hashes[b.name], samples[b.name]]) for b in present}
    todo = [b for b in present if stored(out, b.name, keys[b.name]) is None]
    done = f", {len(present) - len(todo)} done before" if len(todo) < len(present) else ""
    print(f"eval: {model.name} on {len(present)} test sets with {backend}{done}", file=sys.stderr, flush=True)
    if todo:
        folder = (out / "samples" / digest(identity)).resolve()
        job = Job(model, sampling, folder, (out / "data").resolve(), options.limit, options.samples)
        run_tasks(job, todo, keys, backend, out)
    rows = {}
    for b in present:
        problems = stored(out, b.name, keys[b.name])
        rows[b.name] = {"title": b.title} | results.summarise(problems, samples[b.name], sampling.max_tokens)
    evaluation = {
        "model": {"name": model.name, "fingerprint": model.fingerprint},
        "settings": identity["sampling"]
        | {"samples": samples, "limit": options.limit, "backend": backend, "max_length": model.max_length}
        | {"system_prompt": model.system_prompt, "user_prompt": model.user_prompt}
        | {"prompt_template": identity["template"], "scoring": sources},
        "data": {"source": str(options.data or "hub"), "sha256": hashes},
        "versions": generating | scoring_versions,
        "commit": commit(),
        "tasks": rows,
        "test": results.test_mean(rows, missing),
    }
    results.write(evaluation, out)
    print("\n".join(line for line in results.table(evaluation) if line))
    print(f"written: {out / 'results.json'} and {out / 'results.md'}", flush=True)
    return evaluation
