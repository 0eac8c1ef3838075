"""A KL budget for verl's actor, by two settings of its configuration.

    actor_rollout_ref.model.external_lib=open_r1_capo.plugins.verl
    actor_rollout_ref.actor.optim.override_optimizer_config={kl_budget:{entropy_share:0.003}}

verl imports `external_lib` in its model workers before it builds an engine. That registers here a subclass of its FSDP
engine for this machine's device, which verl prefers to its own. In each mini-batch the engine keeps the log-probs of
the response tokens that the loss was given, lets verl take its optimizer step, asks the same again, and moves the
parameters along the step until the KL fits (`KLBudget`).

verl has entry points for plug-ins as well (`verl.plugins`). They are imported by every process of a job, the rewards'
and the rollouts' too, and this would import all of verl's engines there; and if one fails, nothing is said.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from open_r1_capo.budget import KLBudget, Taken, sampled_kl
from open_r1_capo.budget.kl import has_dropout

try:
    from verl.utils import tensordict_utils
    from verl.utils.device import get_device_name, get_vendor
    from verl.workers.engine import BaseEngine, EngineRegistry, FSDPEngineWithLMHead
    from verl.workers.utils.padding import no_padding_2_padding
except ImportError as error:
    raise ImportError(
        f"open_r1_capo.plugins.verl was written for verl 0.9, and cannot use this one: {error}"
    ) from error

logger = logging.getLogger(__name__)
SETTING = "kl_budget"  # in optim.override_optimizer_config
OPTIONS = ("nats", "entropy_share", "rule", "tolerance", "max_passes", "copy_bytes", "share")
HERE = {"device": get_device_name(), "vendor": get_vendor()}  # verl looks for an engine of the vendor first


class _Asked(NamedTuple):
    """One micro-batch of the gradient, and what the policy answered."""

    micro_batch: Any  # TensorDict
    log_probs: Tensor  # (B, T) of the response tokens
    mask: Tensor  # (B, T) bool, those that count

    def counted(self) -> Tensor:
        """(N,) float64, the log-probs of those."""
        return self.log_probs[self.mask].double()


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], **HERE)
class KLBudgetEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine (1 and 2), whose optimizer steps keep within a budget of KL.

    The arguments are verl's. `optimizer_config.override_optimizer_config` has an entry `kl_budget` with `nats` or
    `entropy_share`, and optionally `rule`, `tolerance`, `max_passes`, `copy_bytes` of `KLBudget`, and `share`, in
    (0, 1]: of a mini-batch's micro-batches that are measured. A reference policy needs none of it.

    Attributes:
        budget: of the optimizer; None for a reference policy.
        taken: what became of the last step; None if verl did not take one.

    Raises:
        ValueError: no budget, an unknown setting or one out of range, or something that the budget does not work with.
    """

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        self.budget: KLBudget | None = None
        self.taken: Taken | None = None
        self._asked: list[_Asked] = []
        self._begun, self._nats = False, 0.0
        if not engine_config.forward_only:
            self._options, optimizer_config = _split(optimizer_config)
            self._share = self._options.pop("share", 1.0)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        if self._qat_enabled and not engine_config.forward_only:
            raise ValueError(f"{SETTING} does not work with quantization-aware training: set qat.enable=False")

    def initialize(self):
        """Build the model and the optimizer, and take over the optimizer's steps.

        Raises:
            ValueError: the optimizer's step cannot be pulled back, or the policy has dropout.
        """
        super().initialize()
        if self.engine_config.forward_only:
            return
        if has_dropout(self.module):
            raise ValueError(
                f"{SETTING} measures the policy that the loss was computed with, which dropout makes a random one: "
                "set the model's dropout to 0 (model.override_config)"
            )
        self.budget = KLBudget(self.optimizer, **self._options)
        # inside optimizer.step: after the clipping, and only if verl takes the step
        self.optimizer.register_step_pre_hook(self._begin)

    # --- what the policy is asked ------------------------------------------------------------------------------------

    def optimizer_zero_grad(self):
        """Forget the gradient, and what it was made of."""
        super().optimizer_zero_grad()
        self._asked.clear()

    def forward_step(self, micro_batch, loss_function, forward_only):
        """Keep what the policy answers in a training pass."""
        loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        if not forward_only:
            self._asked.append(_answer(micro_batch, output["model_output"]))
        return loss, output

    # --- the step ----------------------------------------------------------------------------------------------------

    def train_batch(self, data, loss_function):
        """Take one step; adds `budget/kl`, `nats`, `alpha`, `passes` and `taken_back` to verl's metrics."""
        outputs = super().train_batch(data, loss_function)
        if self.taken and self.is_mp_src_rank_with_outputs():
            # verl expects lists, one entry a micro-batch, of all but its own numbers
            outputs["metrics"] |= {f"budget/{k}": [float(v)] for k, v in dataclasses.asdict(self.taken).items()}
        return outputs

    def optimizer_step(self):
        """Take verl's step, measure it, and move along it until its KL fits; returns the gradient's norm."""
        self.taken, self._begun = None, False
        # a token's -log π is an unbiased estimate of the entropy that it was drawn with
        entropy = self._over_ranks([(-one.counted().sum().item(), len(one.counted())) for one in self._asked])
        if entropy is None:
            logger.warning("%s: no response token of this mini-batch counts, so no step is taken", SETTING)
            self.optimizer.zero_grad()
            self.budget.skip()
            return 0.0
        self._nats = self.budget.budget(entropy=entropy)
        norm = super().optimizer_step()
        if self._begun:
            self.taken = self.budget.settle(self._measure, self._nats, signal=norm > 0)
        else:  # verl found a gradient that is not finite
            self.budget.skip()
        return norm

    def _begin(self, optimizer, args, kwargs) -> None:
        self._begun = self.budget.begin(self._nats)

    @torch.no_grad()
    def _measure(self) -> float:
        """KL(π_old ‖ π_now) of the measured micro-batches of all ranks, in nats a token."""
        count = max(1, round(self._share * len(self._asked)))  # the same on every rank, as is the number of them
        measured = [self._asked[i * len(self._asked) // count] for i in range(count)]
        training, parts = self.module.training, []
        self.module.eval()
        for asked in measured:
            _, output = self.forward_step(asked.micro_batch, loss_function=None, forward_only=True)
            kl = sampled_kl(asked.log_probs, _answer(asked.micro_batch, output["model_output"]).log_probs, asked.mask)
            parts.append((kl.mean * kl.count if kl.count else 0.0, kl.count))
        self.module.train(training)
        _reshard(self.module)
        mean = self._over_ranks(parts)
        return float("nan") if mean is None else mean

    def _over_ranks(self, parts: list[tuple[float, int]]) -> float | None:
        """The mean over the tokens of all ranks, the same number on each, from sums and counts; None without a token.

        All ranks and not the data-parallel ones alone: sequence-parallel ranks repeat a sum, and its count with it.
        """
        device = self._asked[0].log_probs.device
        total = torch.tensor(parts, dtype=torch.float64, device=device).sum(0)
        dist.all_reduce(total)
        return float(total[0] / total[1]) if total[1] else None

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(self, local_path, *args, **kwargs):
        """Keep, beside verl's shard of this rank, what the next step needs to know of the earlier ones."""
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.budget and local_path is not None:
            self._state_file(local_path).write_text(json.dumps(self.budget.state_dict()))

    def load_checkpoint(self, local_path, *args, **kwargs):
        """Continue from a checkpoint, also from one without a budget."""
        super().load_checkpoint(local_path, *args, **kwargs)
        if self.budget and local_path is not None:
            file = self._state_file(local_path)
            if file.is_file():
                self.budget.load_state_dict(json.loads(file.read_text()))
            else:
                logger.warning("%s: %s is missing, so the budget starts anew", SETTING, file)

    def _state_file(self, folder: str) -> Path:
        return Path(folder) / f"{SETTING}_world_size_{dist.get_world_size()}_rank_{self.rank}.json"


@EngineRegistry.register(
    model_type="language_model", backend=["megatron", "veomni", "torchtitan", "automodel", "fsdp_turbo"], **HERE
)
class _Refused(BaseEngine):
    """Any other engine of an actor."""

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        raise ValueError(
            f"open_r1_capo.plugins.verl keeps the steps of verl's FSDP engines within a KL budget, and this is "
            f"strategy={engine_config.strategy}: set actor_rollout_ref.actor.strategy to fsdp or fsdp2, or take it "
            "out of actor_rollout_ref.model.external_lib"
        )


def _split(optimizer_config: Any) -> tuple[dict[str, Any], Any]:
    """The checked settings of the budget, and verl's optimizer settings without them."""
    override = dict(optimizer_config.override_optimizer_config or {})
    options = override.pop(SETTING, None)
    if not isinstance(options, Mapping) or not options:
        raise ValueError(
            f"open_r1_capo.plugins.verl is loaded but no KL budget is given: set actor_rollout_ref.actor.optim."
            f"override_optimizer_config={{{SETTING}:{{nats:1e-3}}}}, or entropy_share in place of nats"
        )
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise ValueError(f"{SETTING} has no setting {unknown[0]!r}; it has {', '.join(OPTIONS)}")
    options = dict(options)
    share = options.get("share", 1.0)
    if not 0 < share <= 1:
        raise ValueError(f"{SETTING}: share must be above 0 and at most 1, got {share}")
    try:  # before minutes of loading
        others = {name: value for name, value in options.items() if name != "share"}
        KLBudget(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), **others)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{SETTING}: {error}") from error
    return options, dataclasses.replace(optimizer_config, override_optimizer_config=override or None)


def _answer(micro_batch: Any, output: dict[str, Tensor]) -> _Asked:
    """The log-probs of a micro-batch's response tokens, from the engine's output."""
    distilled = tensordict_utils.get_non_tensor_data(micro_batch, "distillation_use_topk", default=False)
    if "response_mask" not in micro_batch or distilled:
        raise ValueError(f"{SETTING} needs responses that the policy has sampled, and verl trains on others here")
    log_probs = output["log_probs"].detach()
    here = micro_batch.to(log_probs.device)
    mask = here.select("response_mask").to_padded_tensor()["response_mask"].bool()
    return _Asked(micro_batch, no_padding_2_padding(log_probs, here), mask)


def _reshard(module: torch.nn.Module) -> None:
    """Drop the whole parameters that a forward pass without a backward pass leaves gathered.

    The optimizer knows the shards, and the next pass would use what was gathered before they moved.
    """
    if isinstance(module, FSDP):
        for part in FSDP.fsdp_modules(module):
            if part._handle and part._handle.uses_sharded_strategy:
                part._handle.reshard(True)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
