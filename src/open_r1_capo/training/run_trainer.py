"""RunTrainer: TRL's `GRPOTrainer` as one run of this project, whatever the method.

It adds REINFORCE's advantage, rewards that could not be given, a clock for each part of a step, counters, and
checkpoints that are sealed when they are complete. `trainer.py` adds the method.
"""

from __future__ import annotations

import difflib
import inspect
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOTrainer

from open_r1_capo.runs.checkpoints import seal
from open_r1_capo.training.packing import Packed, check_packing, pack
from open_r1_capo.training.sampling_drift import SamplingComparison
from open_r1_capo.training.shared_generation import SharedGeneration
from open_r1_capo.training.state import load_state, save_state


class RunTrainer(GRPOTrainer):
    """TRL's GRPO trainer with a clock, counters and sealed checkpoints; its gradients are TRL's, bit for bit.

    Args:
        *args: as `GRPOTrainer`.
        advantage_baseline: `group` (GRPO, Dr.GRPO) or `none`: REINFORCE's advantage is the reward itself.
        optimizer: a name of the package pytorch-optimizer, in place of TRL's `optim`.
        share_prompts: compute a prompt once for all its completions (`packing.py`).
        max_prompt_tokens: longer prompts are cut to their last tokens, chat template included; None cuts none.
        **kwargs: as `GRPOTrainer`.

    Raises:
        ValueError, ImportError: there is no such optimizer, or no such package; the model cannot share prompts.
    """

    def __init__(
        self,
        *args: Any,
        advantage_baseline: str = "group",
        optimizer: str | None = None,
        share_prompts: bool = False,
        max_prompt_tokens: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.max_prompt_tokens = max_prompt_tokens
        if optimizer:
            self.optimizer_cls_and_kwargs = library_optimizer(optimizer, self.args)
        self.advantage_baseline, self.share_prompts = advantage_baseline, share_prompts
        self.sampler: SharedGeneration | None = None
        if share_prompts:
            policy = self.accelerator.unwrap_model(self.model)
            check_packing(policy)
            scattered = self.is_fsdp_enabled or self.is_deepspeed_enabled or hasattr(policy, "peft_config")
            if not (self.use_vllm or scattered):
                self.sampler = SharedGeneration(policy, self.args.bf16)
        self.packed: Packed | None = None  # how the last forward pass was packed
        self.counters = {"completions": 0}
        self.seconds: dict[str, float] = defaultdict(float)
        self.comparison = SamplingComparison()
        self.add_callback(_StepCallback(self))

    # --- around a step -----------------------------------------------------------------------------------------------

    def before_training(self) -> None:
        """Called once, when a run starts or goes on."""

    def before_step(self) -> None:
        """Called between the last backward pass of an update and `optimizer.step`."""

    def after_step(self) -> None:
        """Called after `optimizer.step`."""

    def _compute_loss(self, model, inputs):
        self.comparison.expect(inputs if self._fresh_from_vllm else None)
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        forward = self._packed_logps if self.share_prompts else super()._get_per_token_logps_and_entropies
        found = forward(*args, **kwargs)
        self.comparison.see(found[0])
        return found

    def _packed_logps(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        """TRL's method of text alone, with the prompts of a group computed once."""
        self.packed = packed = pack(input_ids, attention_mask, logits_to_keep)
        rows = len(packed.input_ids)
        size = max(1, rows * (batch_size or len(input_ids)) // len(input_ids))
        outputs = []
        for start in range(0, rows, size):
            part = slice(start, start + size)
            with self.accelerator.autocast():
                inputs = packed.rows(part.start, part.stop)
                outputs.append(model(**inputs, shift_labels=packed.labels[part], fused_lm_head=True))
        logps, entropies = (
            packed.unpack(torch.cat([one[name] for one in outputs])) for name in ("log_probs", "entropy")
        )
        return logps, entropies if compute_entropy else None, None

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        if self.sampler and not self.use_vllm:  # which `attach` may have set since
            return self.sampler.generate(prompt_ids, self.generation_config), None
        with self.accelerator.autocast():  # around all of it: the weights are rounded once and not for each token
            call = (prompt_ids, images, multimodal_fields, num_generations)
            return super()._generate_single_turn(*call, *args, **kwargs)

    @property
    def _fresh_from_vllm(self) -> bool:
        """Whether the sampler had this step's weights, and TRL does not compare its log-probabilities itself."""
        fresh = self.use_vllm and self._last_loaded_step == self.state.global_step
        return fresh and self.model.training and not self.vllm_importance_sampling_correction

    def _tokenize_prompts(self, prompts):
        prompt_ids, *others = super()._tokenize_prompts(prompts)
        if self.max_prompt_tokens is not None:
            prompt_ids = [ids[-self.max_prompt_tokens :] for ids in prompt_ids]
        return prompt_ids, *others

    # --- rewards, counters, logs -------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        with self._clock("generate"):
            output = super()._generate_and_score_completions(inputs)
        self.seconds["generate"] -= self._reward_seconds
        self.seconds["reward"] += self._reward_seconds
        start = self.accelerator.process_index * len(inputs)
        mine = self._rewards[start : start + len(inputs)] * self.reward_weights.to(self._rewards.device)
        rewards = mine.nansum(1)  # unscorable: 0, as TRL
        if self.advantage_baseline == "none":
            output["advantages"] = rewards
        self._own_rewards = rewards.masked_fill(mine.isnan().all(1), torch.nan)
        if self.model.training:
            self.counters["completions"] += len(inputs) * self.accelerator.num_processes
        return output

    def _calculate_rewards(self, *args, **kwargs):
        start = time.perf_counter()
        rewards = super()._calculate_rewards(*args, **kwargs)
        # a NaN or infinite reward is an unscorable completion, which TRL leaves out of its group
        self._rewards: Tensor = rewards.masked_fill(~rewards.isfinite(), torch.nan)
        self._reward_seconds = time.perf_counter() - start
        return self._rewards

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the counters and the step's seconds to what TRL logs."""
        if self.model.training and "loss" in logs:
            total = self.seconds.pop("total", 0.0)
            train = total - sum(self.seconds.values())
            logs |= self.counters | {f"time/{name}": value for name, value in self.seconds.items()}
            logs |= {"time/train": train, "time/total": total, **self.comparison.metrics(self.accelerator)}
            self.seconds.clear()
        super().log(logs, start_time)

    def record(self, values: dict[str, float]) -> None:
        """Put values into the running step's log line."""
        for name, value in values.items():
            self._metrics["train"][name].append(value)

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to a named sum."""
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] += self._now() - start

    def _now(self) -> float:
        """Seconds, once the accelerator has done what it was asked, so that each block pays for its own work."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint holds beside TRL's own: tensors and settings of models, and plain numbers."""
        return {}, dict(self.counters)

    def _load_state(self, state: dict[str, Any], numbers: dict[str, Any]) -> None:
        """Take over what `_state` gave."""
        self.counters = {name: int(numbers[name]) for name in self.counters}

    def _save_checkpoint(self, model, trial):
        limit = self.args.save_total_limit
        self.args.save_total_limit = None  # no older one goes before this one is complete
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            save_state(folder, *self._state())
        self.accelerator.wait_for_everyone()  # the other ranks' shards are part of a complete checkpoint
        if self.args.should_save:
            seal(folder, self.accelerator.num_processes)
            rotate_checkpoints(str(folder.parent), limit, use_mtime=True)

    def _load_optimizer_and_scheduler(self, folder):
        super()._load_optimizer_and_scheduler(folder)
        if folder is not None:
            load_state(Path(folder), self._load_state)


def library_optimizer(name: str, args: TrainingArguments) -> tuple[type, dict[str, Any]]:
    """The class of a name in pytorch-optimizer, and what it takes of TRL's arguments: rate, betas, ε, decay.

    Raises:
        ValueError: there is no such optimizer.
        ImportError: the package is not installed.
    """
    try:
        from pytorch_optimizer import get_supported_optimizers, load_optimizer
    except ImportError:
        raise ImportError(f"optimizer={name} needs a package: pip install pytorch-optimizer") from None
    if name not in get_supported_optimizers():
        near = difflib.get_close_matches(name, get_supported_optimizers(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"pytorch-optimizer has no optimizer {name!r}{hint}")
    chosen = load_optimizer(name)
    given = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    given |= {"weight_decay": args.weight_decay}
    return chosen, {key: value for key, value in given.items() if key in inspect.signature(chosen).parameters}


class _StepCallback(TrainerCallback):
    """Calls the trainer at the moments around `optimizer.step` that have no method to override."""

    def __init__(self, trainer: RunTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.before_training()

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.after_step()
        self.trainer.seconds["total"] += time.perf_counter() - self.start
