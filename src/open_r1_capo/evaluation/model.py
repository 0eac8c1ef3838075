"""The model under evaluation: where it is, what identifies it, and the settings it was trained with."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_r1_capo.evaluation import EvalError
from open_r1_capo.runs.run import RunError, run_of
from open_r1_capo.tasks.data import SYSTEM_PROMPT
from open_r1_capo.tasks.source import policy_source, source_of

# what decides a model's answers; optimizer states and other leftovers of training do not
WEIGHTS = ("*.safetensors", "*.bin")
RECIPES = ("config.json", "generation_config.json", "tokenizer*", "*.jinja", "vocab*", "merges.txt", "*.model")
NOT_WEIGHTS = ("training_args.bin",)


@dataclass(frozen=True)
class Model:
    """A model to evaluate."""

    name: str  # what the user called it
    folder: Path
    fingerprint: str
    suite: str  # the test sets that fit it, a name of `suite.SUITES`
    system_prompt: str  # the one it was trained with; "" for none
    user_prompt: str = "{problem}"  # the user's turn
    max_length: int | None = None  # tokens of prompt and answer together, where that is asked for

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens: what its configuration says, or less if that is asked for; None if neither."""
        own = json.loads((self.folder / "config.json").read_text()).get("max_position_embeddings")
        return min((length for length in (own, self.max_length) if length), default=None)


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits of the content of a model's files, so that overwritten weights are another model."""
    files = {file for pattern in (*WEIGHTS, *RECIPES) for file in folder.glob(pattern) if file.name not in NOT_WEIGHTS}
    total = hashlib.sha256()
    for file in sorted(files):
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while block := content.read(1 << 24):
                digest.update(block)
        total.update(f"{file.name}:{digest.hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def _download(name: str) -> Path:
    """Get a model from the hub or its cache."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, ignore_patterns=["*.pth", "*.gguf", "original/*"]))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        cause = str(error).strip().split("\n")[0]
        raise EvalError(f"{name} is no folder here, and the hub does not give it: {cause}") from error


def _training_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run that a checkpoint belongs to; empty if there is none."""
    run = run_of(folder)
    try:
        return run.settings if run else {}
    except RunError as error:  # another program's config.yaml
        print(f"eval: {folder} is evaluated as a model of its own: {error}", file=sys.stderr)
        return {}


def resolve(name: str, settings: Mapping[str, Any] | None = None) -> Model:
    """Find a model by folder, hub id or policy name (such as `lab`); a policy that has to be made is made.

    `settings` are those of the run that started from the model; they shape such a policy.

    Raises:
        EvalError: there is no such model, or the folder holds none.
    """
    from open_r1_capo.settings.run import policy_settings  # Hydra and all settings, for a policy that is made

    path = policy_source(name).folder(name, policy_settings(name, dict(settings or {})))
    folder = Path(path) if Path(path).exists() else _download(path)
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        raise EvalError(
            f"{folder} holds LoRA adapters of {base} and no whole model: write one with peft "
            "(AutoPeftModelForCausalLM.from_pretrained, merge_and_unload, save_pretrained) and evaluate that"
        )
    if not (folder / "config.json").is_file() or not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise EvalError(f"{folder} holds no model (config.json and weights as .safetensors)")
    trained = _training_settings(folder) or dict(settings or {})
    source = policy_source(trained["model_name_or_path"]) if "model_name_or_path" in trained else source_of(folder)
    prompt = trained.get("system_prompt")
    if prompt is None:
        prompt = SYSTEM_PROMPT if source.system_prompt is None else source.system_prompt
    own, found = trained.get("evaluation") or {}, (name, folder.resolve(), fingerprint(folder), source.suite)
    model = Model(*found, str(prompt), max_length=own.get("max_length"))
    return model if own.get("prompt") is None else with_user_prompt(model, own["prompt"])


def with_user_prompt(model: Model, text: str) -> Model:
    """The model, asked by a user's turn with {problem} in it and no system turn."""
    return replace(model, system_prompt="", user_prompt=text)
