r"""The eight test sets as lighteval custom tasks (lighteval 0.13).

`make eval` uses them, and so can lighteval alone:

    .venv-eval/bin/lighteval endpoint litellm MODEL.yaml "capo:gsm8k|0,capo:math_500|0" --custom-tasks eval/tasks.py

Another environment that has lighteval needs PYTHONPATH=src. MODEL.yaml holds the address of the model, the sampling,
and the system prompt; `make eval` leaves the one it used beside its results. Two environment variables change the
tasks: CAPO_EVAL_DATA=<folder> reads <folder>/<task>.jsonl or <folder>/<task>/test.jsonl instead of the hub, the lab's
sets (`capo:lab_…`) among them, and CAPO_EVAL_SAMPLES=<n> asks for n answers a problem. Without it, AMC and AIME ask
for 16 and need a call of their own: lighteval asks for as many answers to every problem as the first one needs.

Answers are verified by this project's own environment (`make install`), or the interpreter CAPO_EVAL_PYTHON names:
lighteval 0.13 insists on a version of latex2sympy2_extended that math-verify 0.9 cannot use.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import numpy as np
from lighteval.metrics.metrics_sample import SampleLevelComputation, SamplingMetric
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc, SamplingMethod

from open_r1_capo.evaluation.scoring import Verifier, score
from open_r1_capo.evaluation.suite import SUITES, Benchmark, record

DATA = os.environ.get("CAPO_EVAL_DATA")
PYTHON = Path(os.environ.get("CAPO_EVAL_PYTHON") or Path(__file__).parents[1] / ".venv" / "bin" / "python")
SAMPLES = int(os.environ.get("CAPO_EVAL_SAMPLES", "0"))


class MeanAccuracy(SamplingMetric, SampleLevelComputation):
    """Share of a problem's answers that are right; the whole test set goes through the verifier at once.

    Args:
        n: answers a problem.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def num_samples(self) -> int:
        """How many answers lighteval has to ask for."""
        return self.n

    def compute(self, responses: list[ModelResponse], docs: list[Doc], **kwargs: object) -> list[float]:
        """The mean score of each problem's answers; NaN where its gold answer cannot be parsed.

        Raises:
            ValueError: answers are missing; counting them as wrong would hide a failed server.
        """
        # the text as generated: lighteval's own post-processing removes <think>…</think>, which the reward does not
        texts = [(response.text or [])[: self.n] for response in responses]
        short = sum(len(answers) < self.n for answers in texts)
        if short:
            hint = "test sets with different numbers need a call each, see CAPO_EVAL_SAMPLES"
            raise ValueError(f"{short} of {len(docs)} problems have fewer than {self.n} answers ({hint})")
        items = [
            (doc.specific["kind"], doc.choices[0], answer)
            for doc, answers in zip(docs, texts, strict=True)
            for answer in answers
        ]
        verifier = Verifier(python=str(PYTHON) if PYTHON.exists() else None)
        scores = np.array(score(items, verifier), dtype=float).reshape(len(docs), self.n)
        verifier.close()
        return scores.mean(axis=1).tolist()


def doc(line: dict, task_name: str, benchmark: Benchmark) -> Doc:
    """lighteval's document of a row: the problem, with the gold answer as its only choice."""
    row = record(benchmark, line, line.get("__index", 0))
    specific = {"id": row["id"], "kind": row["kind"]}
    return Doc(task_name=task_name, query=row["problem"], choices=[row["gold"]], gold_index=0, specific=specific)


def _source(benchmark: Benchmark) -> dict:
    """Where lighteval loads a test set from: the hub, or a folder that holds one test.jsonl."""
    if not DATA:
        subset = benchmark.config or "default"
        return {"hf_repo": benchmark.origin, "hf_subset": subset, "evaluation_splits": [benchmark.split]}
    folder = Path(DATA).resolve() / benchmark.name
    if not (folder / "test.jsonl").exists():
        plain = folder.with_suffix(".jsonl")
        folder = Path(tempfile.mkdtemp(prefix=f"capo-{benchmark.name}-"))
        if plain.exists():
            (folder / "test.jsonl").symlink_to(plain)
    return {"hf_repo": str(folder), "hf_subset": "default", "evaluation_splits": ["test"], "hf_avail_splits": ["test"]}


def config(benchmark: Benchmark) -> LightevalTaskConfig:
    """lighteval's configuration of a test set; the model's configuration says how many tokens are generated."""
    metric = SampleLevelMetric(
        metric_name="accuracy",
        higher_is_better=True,
        category=SamplingMethod.GENERATIVE,
        sample_level_fn=MeanAccuracy(SAMPLES or benchmark.samples),
        corpus_level_fn=np.nanmean,
        batched_compute=True,
    )
    return LightevalTaskConfig(
        name=benchmark.task,
        prompt_function=functools.partial(doc, benchmark=benchmark),
        metrics=[metric],
        **_source(benchmark),
    )


TASKS_TABLE = [config(benchmark) for suite in SUITES.values() for benchmark in suite if DATA or not benchmark.source]
