"""LoRA by TRL's names: the adapters that `use_peft=true` trains in place of the weights; only it imports peft."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from open_r1_capo.settings.run import RunConfig
from open_r1_capo.settings.values import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig

ALL = "all-linear"  # peft's name for every linear layer but the head


def adapters(config: RunConfig, model: str) -> LoraConfig | None:
    """The adapters of a run on a model folder or hub id; None without `use_peft`.

    Raises:
        ConfigError: peft is not installed, or a module is not in the model.
    """
    if not config.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise ConfigError(
            "use_peft=true needs the package peft, which is not installed: pip install 'peft>=0.21,<1'"
        ) from None
    targets = config.lora_target_modules
    _check_modules(model, targets, config.lora_modules_to_save)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=ALL if targets == [ALL] else targets,
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def _check_modules(model: str, targets: list[str] | None, whole: list[str] | None) -> None:
    """Raise ConfigError for a name that no module of the model ends in, or an adapter on the head."""
    if not (targets or whole):
        return
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    modules = dict(empty.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear | Conv1D)}
    head = next(name for name, module in modules.items() if module is empty.get_output_embeddings())
    targets = [] if targets == [ALL] else targets or []
    if head in targets:
        raise ConfigError(
            f"lora_target_modules: TRL's loss reads the weight of {head} by itself, where an adapter has no effect: "
            f"leave it out, or train it whole with lora_modules_to_save=[{head}]"
        )
    _check_names("lora_target_modules", targets, linear - {head}, f", or {ALL}")
    _check_names("lora_modules_to_save", whole or [], set(modules), "")


def _check_names(setting: str, wanted: list[str], there: set[str], more: str) -> None:
    last = sorted({name.rpartition(".")[2] for name in there} - {""})
    for name in wanted:
        if any(one == name or one.endswith(f".{name}") for one in there):
            continue
        near = difflib.get_close_matches(name, last, n=1)
        last = [one for one in last if not one.isdigit()]
        what = "linear layers" if more else "modules"
        hint = f"did you mean {near[0]}?" if near else f"its {what} are {', '.join(last)}{more}"
        raise ConfigError(f"{setting}: the policy has no module {name}; {hint}")
