"""One rank of verl's actor engine on a CPU, without Ray: builds engines from verl's own configuration, takes steps.

Run by test_verl.py with a policy's folder, a folder for the answers and the cases as JSON; writes rank<k>.pt.
"""

import contextlib
import json
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

sys.modules["trl"] = None  # verl 0.9 takes a value head from an older TRL, unless there is none

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from verl.plugin.platform import PlatformBase, set_platform  # noqa: E402


class CPU(PlatformBase):
    """What verl's engine asks of a device; verl itself knows only accelerators."""

    device_name, vendor_name, device_module = "cpu", "generic", torch.cpu

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")


CPU.__abstractmethods__ = frozenset()  # the rest is for Ray, profilers and rollouts
torch.cpu.empty_cache = lambda: None
set_platform(CPU())

from hydra import compose, initialize_config_module  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from torch.distributed.fsdp import _init_utils  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.workers.config import (  # noqa: E402
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    McoreEngineConfig,
    QATEngineConfig,
)
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding  # noqa: E402

EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cpu")(FSDPEngineWithLMHead)
_init_utils._check_module_states_for_sync_module_states = lambda states: None  # FSDP1 wants GPUs; gloo does not
PROMPT, RESPONSE, ROWS = 4, 6, 8


def batch(step, advantage, counts=True):
    """This rank's share of ROWS random prompts and responses of unequal lengths, the same ones whatever the ranks."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, 60, (ROWS, PROMPT + RESPONSE), generator=generator)
    lengths = torch.randint(2, RESPONSE + 1, (ROWS, 1), generator=generator)
    response_mask = (torch.arange(RESPONSE) < lengths).long()
    attention = torch.cat([torch.ones(ROWS, PROMPT, dtype=torch.long), response_mask], 1)
    advantages = torch.randn(ROWS, 1, generator=generator) * response_mask * advantage
    data = {"input_ids": ids, "prompts": ids[:, :PROMPT], "responses": ids[:, PROMPT:], "advantages": advantages}
    data |= {"attention_mask": attention, "response_mask": response_mask, "position_ids": attention.cumsum(1) - 1}
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    data = left_right_2_no_padding(TensorDict(data, batch_size=[ROWS])[mine])
    if not counts:  # as rollout correction masks tokens out
        data["response_mask"] = data["loss_mask"] = torch.zeros_like(data["response_mask"])
    settings = {"use_remove_padding": False, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2}
    settings |= {"temperature": 1.0, "global_batch_size": ROWS, "calculate_entropy": False}
    tensordict_utils.assign_non_tensor(data, **settings)
    return data


def composed(overrides):
    """verl's trainer configuration with a command line's overrides."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides).actor_rollout_ref


def build(policy, case):
    """The engine that verl's registry has for a case."""
    optim = FSDPOptimizerConfig(lr=1e-3, total_training_steps=10, **case.get("optim", {}))
    external_lib, strategy = case.get("external_lib"), case.get("strategy", "fsdp2")
    if "overrides" in case:
        given = composed(case["overrides"])
        external_lib, strategy = given.model.external_lib, given.actor.strategy
        optim = omega_conf_to_dataclass(given.actor.optim)
    model = HFModelConfig(
        path=str(policy),
        use_remove_padding=False,
        external_lib=external_lib,
        override_config={"attn_implementation": "eager"} | case.get("override_config", {}),
        enable_gradient_checkpointing=case.get("checkpointing", False),
        lora_rank=case.get("lora_rank", 0),
    )
    if strategy == "megatron":
        engine = McoreEngineConfig()
    else:
        precision = {"param_dtype": case.get("dtype", "fp32"), "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
        options = {"mixed_precision": precision, "use_torch_compile": False} | case.get("engine", {})
        qat = QATEngineConfig(enable=case.get("qat", False))
        engine = FSDPEngineConfig(strategy=strategy, qat=qat, **options)
    checkpoint = CheckpointConfig(load_contents=["model", "optimizer"])
    engine = EngineRegistry.new("language_model", strategy, model, engine, optim, checkpoint)
    engine.initialize()
    return engine


def parameters(engine):
    """All of them in one vector, gathered from the ranks."""
    found = engine.module.state_dict().values()
    return torch.cat([(v.full_tensor() if isinstance(v, DTensor) else v).detach().float().flatten() for v in found])


def answers(engine, data):
    """(B, T) log-probs of the responses."""
    with engine.eval_mode():
        return no_padding_2_padding(engine.infer_batch(data.copy())["model_output"]["log_probs"], data)


def take_step(engine, loss, step, advantage, counts):
    """One step on-policy; what verl reports of it, and the KL by a forward pass of our own."""
    data = batch(step, advantage, counts)
    data["old_log_probs"] = answers(engine, data)
    with engine.train_mode():
        metrics = engine.train_batch(data, loss)["metrics"]
    engine.lr_scheduler_step()
    change = answers(engine, data).double() - data["old_log_probs"].double()
    mask = data["response_mask"].bool()
    k3 = (torch.expm1(change) - change)[mask]
    total = torch.stack([k3.sum(), torch.tensor(float(len(k3)), dtype=torch.float64)])
    dist.all_reduce(total)
    entropy = -data["old_log_probs"][mask].double()
    budget = {name.removeprefix("budget/"): value[0] for name, value in metrics.items() if name.startswith("budget/")}
    found = {"true_kl": float(total[0] / total[1]), "moved": float(change.abs().max())}
    return found | {"grad_norm": metrics["grad_norm"], "entropy_here": float(entropy.mean())} | budget


def run(policy, folder, case):
    """What a case does, or the sentence that it is refused with."""
    try:
        engine = build(policy, case)
    except (ValueError, TypeError) as error:
        return {"error": str(error)}
    if engine.optimizer is None:
        return {"kind": type(engine).__name__}
    small = {"ppo_micro_batch_size_per_gpu": 2, "use_dynamic_bsz": False, "use_torch_compile": False}
    loss = partial(ppo_loss, config=FSDPActorConfig(rollout_n=1, **small))
    steps = []
    for step in range(case.get("steps", 3)):
        if step == case.get("reload_before"):
            engine.save_checkpoint(str(folder / "checkpoint"))
            engine = build(policy, case)
            engine.load_checkpoint(str(folder / "checkpoint"))
        steps.append(
            take_step(engine, loss, step, case.get("advantages", [1.0] * 9)[step], step != case.get("masked"))
        )
    rate = engine.optimizer.param_groups[0]["lr"]
    return {"kind": type(engine).__name__, "steps": steps, "parameters": parameters(engine), "rate": rate}


def main(policy, folder, cases):
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    found = {}
    for name, case in cases.items():
        with contextlib.redirect_stdout(sys.stderr):
            found[name] = run(policy, folder, case)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
