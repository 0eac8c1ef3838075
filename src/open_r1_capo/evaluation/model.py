"""The model under evaluation: where it is, what identifies it, and the settings it was trained with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from open_r1_capo.evaluation.server import EvalError
from open_r1_capo.tasks.data import SYSTEM_PROMPT

# what decides a model's answers; optimizer states and other leftovers of training do not
WEIGHTS = ("*.safetensors", "*.bin")
RECIPES = ("config.json", "generation_config.json", "tokenizer*", "*.jinja", "vocab*", "merges.txt", "*.model")
NOT_WEIGHTS = ("training_args.bin",)


@dataclass(frozen=True)
class Model:
    """A model to evaluate.

    Attributes:
        name: What the user called it.
        folder: Where its files are.
        fingerprint: 16 hexadecimal digits of the content of its files.
        is_lab: Whether it is the lab's policy, or trained from it.
        system_prompt: The one it was trained with; "" for none.
    """

    name: str
    folder: Path
    fingerprint: str
    is_lab: bool
    system_prompt: str

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens, if its configuration says so."""
        return json.loads((self.folder / "config.json").read_text()).get("max_position_embeddings")


def fingerprint(folder: Path) -> str:
    """Identify a model by the content of its files, so that overwritten weights are another model.

    Args:
        folder: The model's folder.

    Returns:
        16 hexadecimal digits.
    """
    files = {file for pattern in (*WEIGHTS, *RECIPES) for file in folder.glob(pattern) if file.name not in NOT_WEIGHTS}
    total = hashlib.sha256()
    for file in sorted(files):
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while block := content.read(1 << 24):
                digest.update(block)
        total.update(f"{file.name}:{digest.hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def training_settings(folder: Path) -> dict:
    """Find the settings of the run that a checkpoint belongs to.

    Args:
        folder: A model's folder, `<run>/checkpoints/checkpoint-<step>` if it is a checkpoint.

    Returns:
        The run's config.yaml, or {} if the folder belongs to no run.
    """
    from omegaconf import OmegaConf

    for parent in list(folder.resolve().parents)[:2]:
        if (parent / "config.yaml").is_file() and (parent / "checkpoints").is_dir():
            return OmegaConf.to_container(OmegaConf.load(parent / "config.yaml"), resolve=False)
    return {}


def download(name: str) -> Path:
    """Bring a model from the hub, or from its cache.

    Args:
        name: The hub's name, `owner/name`.

    Returns:
        Its local folder.

    Raises:
        EvalError: If it is neither there nor in the cache.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, ignore_patterns=["*.pth", "*.gguf", "original/*"]))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        cause = str(error).strip().split("\n")[0]
        raise EvalError(f"{name} is no folder here, and the hub does not give it: {cause}") from error


def lab_policy(settings: dict | None) -> Path:
    """Give the folder of the lab's base policy.

    Args:
        settings: What decides it, the group `lab` of a run's settings; None for the lab's own.

    Returns:
        Its folder.

    Raises:
        EvalError: If it cannot be made or kept.
    """
    from open_r1_capo.settings.run import policy_settings
    from open_r1_capo.tasks.lab.policy import LabError, base_policy

    try:
        return base_policy(settings=policy_settings("lab", {"lab": settings}))
    except LabError as error:
        raise EvalError(str(error)) from None


def resolve(name: str, lab: dict | None = None) -> Model:
    """Find a model.

    Args:
        name: A folder, a name on the hub, or `lab` for the lab's base policy.
        lab: As in `lab_policy`.

    Returns:
        The model.

    Raises:
        EvalError: If there is none, or the folder holds no model.
    """
    folder = lab_policy(lab) if name == "lab" else Path(name) if Path(name).exists() else download(name)
    if not (folder / "config.json").is_file() or not any(folder.glob(pattern) for pattern in WEIGHTS):
        raise EvalError(f"{folder} holds no model (config.json and weights as .safetensors)")
    settings = training_settings(folder)
    is_lab = (folder / "lab.json").is_file() or settings.get("model_name_or_path") == "lab"
    trained_with = settings.get("system_prompt")
    if trained_with is None:
        trained_with = "" if is_lab else SYSTEM_PROMPT
    return Model(name, folder.resolve(), fingerprint(folder), is_lab, str(trained_with))
