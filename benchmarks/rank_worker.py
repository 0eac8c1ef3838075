"""One rank of `ranks.py`: trains a few steps on given completions and writes down what it saw.

    accelerate launch --config_file … benchmarks/rank_worker.py <policy> <out> <json of the cases>

The completions follow from the step and from their place in the whole batch, so they are the same whatever the number
of ranks; they are of every length, and in the second step those of the last rank are empty.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig

from open_r1_capo.settings.budget import BudgetConfig
from open_r1_capo.settings.capo import capo_config
from open_r1_capo.tasks.data import to_prompts
from open_r1_capo.tasks.lab.task import problems
from open_r1_capo.training.budget_trainer import BudgetTrainer
from open_r1_capo.training.run import quiet
from open_r1_capo.training.trainer import CAPOTrainer

COMPLETIONS, LENGTH, STEPS = 16, 8, 3  # of the whole batch; tokens of the longest


def completions(step: int, first: int, count: int, vocabulary: int) -> dict[str, Tensor]:
    """The completions of some places of a step's batch.

    Args:
        step: of the optimizer, from 0.
        first: place of the first one.
        count: how many.
        vocabulary: ids are below it.

    Returns:
        `completion_ids` (count, T) int64, `completion_mask` (count, T), `advantages` (count,): some are 0.
    """
    ids, mask, advantages = [], [], []
    for place in range(first, first + count):
        rng = torch.Generator().manual_seed(1000 * step + place)
        ids.append(torch.randint(5, vocabulary, (LENGTH,), generator=rng))
        length = 0 if step == 1 and place >= COMPLETIONS // 2 else 1 + place % LENGTH
        mask.append((torch.arange(LENGTH) < length).long())
        advantages.append(torch.randn((), generator=rng) if place % 5 else torch.zeros(()))
    return {
        "completion_ids": torch.stack(ids),
        "completion_mask": torch.stack(mask),
        "advantages": torch.stack(advantages),
    }


class BudgetRank(BudgetTrainer):
    """Trains on `completions`."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        first = self.accelerator.process_index * len(inputs)
        vocabulary = len(self.processing_class)
        return batch | completions(self.state.global_step, first, len(inputs), vocabulary)


class CAPORank(BudgetRank, CAPOTrainer):
    """Keeps the selection of every sequence, too."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen: dict[str, tuple[list[float], ...]] = {}

    def _weigh_tokens(self, inputs, hidden, input_ids, attention_mask, entropies):
        part = super()._weigh_tokens(inputs, hidden, input_ids, attention_mask, entropies)
        chosen = part.by_rule
        columns = (chosen.weight, chosen.policy_shift, chosen.objective_shift)
        columns = [column.float().split(part.mask.sum(1).tolist()) for column in columns]
        for row, ids in enumerate(input_ids[:, -part.mask.shape[1] :]):
            name = f"{self.state.global_step} {ids[part.mask[row]].tolist()}"
            self.seen[name] = tuple(column[row].tolist() for column in columns)
        return part


def whole(parameter: torch.nn.Parameter) -> Tensor:
    """A parameter as the optimizer has it, in float32 and out of its shards; every rank takes part."""
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):  # DeepSpeed's ZeRO-2 and ZeRO-3
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach().clone()
    value = parameter.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).float().clone()


def shard_on_cpus() -> None:
    """Let accelerate take FSDP's settings on CPUs, where it ignores them: it must believe in GPUs for a moment."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def held(trainer: CAPOTrainer) -> dict[str, int]:
    """Bytes that this rank keeps between steps, each storage once: what `make plan` says of them is in `ranks.py`.

    Args:
        trainer: after its last step.

    Returns:
        `weights` of the forward pass; `optimizer`: master weights, if there are any beside them, and Adam's moments.
    """
    optimizer = trainer.optimizer.optimizer
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None)  # ZeRO-2
    masters = masters or getattr(optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor) and x.ndim]
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {"weights": _bytes(model.parameters()), "optimizer": _bytes([*masters, *moments])}


def _bytes(tensors: Iterable[Tensor]) -> int:
    mine = [getattr(x, "ds_tensor", x).detach() for x in tensors]
    mine = [x.to_local() if isinstance(x, DTensor) else x for x in mine]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in mine}.values())


def train(policy: Path, out: Path, training: dict[str, Any], capo: dict[str, Any]) -> dict[str, Any]:
    """Train `STEPS` steps.

    Args:
        policy: a model's folder.
        out: of the trainer.
        training: fields of GRPOConfig.
        capo: the group `capo` of a recipe, and perhaps its group `budget`.

    Returns:
        `kind` of the distribution, `seen` selections, CAPO's `state`, `parameters`, `metrics` of each step, bytes
        `held`.
    """
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if training["bf16"] else "no"
    args = GRPOConfig(
        output_dir=str(out),
        max_steps=STEPS,
        num_generations=4,
        max_completion_length=LENGTH,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        max_grad_norm=0.1,  # less than it is
        temperature=0.9,
        loss_type="grpo",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        optim="adamw_torch",
        seed=0,
        **training,
    )
    shard_on_cpus()
    common = dict(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        reward_funcs=[lambda completion_ids, **kwargs: [0.0] * len(completion_ids)],
        args=args,
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
        train_dataset=to_prompts(Dataset.from_list(problems("train", 24, seed=3)), None),
        budget=BudgetConfig(**capo.pop("budget", {})),
    )
    config = capo_config(**capo)
    trainer = CAPORank(**common, capo=config) if config.on else BudgetRank(**common)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model, bytes_held = trainer.accelerator.unwrap_model(trainer.model), held(trainer)
    return {
        "held": bytes_held,
        "kind": trainer.accelerator.distributed_type.value,
        "seen": trainer.seen if config.on else {},
        "state": trainer.step_model.state_dict() if config.on else {},
        "parameters": {name: whole(parameter) for name, parameter in model.named_parameters()},
        "metrics": [row for row in trainer.state.log_history if "reward" in row],
    }


def main() -> None:
    """Train every case in turn, and write `<case>-<rank>.pt` of each."""
    policy, out, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    quiet()
    for case, settings in cases.items():
        found = train(policy, out, **settings)
        torch.save(found, out / f"{case}-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main()
