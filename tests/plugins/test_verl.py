"""verl's own FSDP engines on CPUs: the budget holds, the ranks agree, and what cannot work is one sentence."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "verl_budget.sh"
LIB = "open_r1_capo.plugins.verl"
NEEDED = ("verl", "ray", "tensordict", "peft")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"not installed: {', '.join(missing)} (docs/budget_elsewhere.md)"
)


def overrides():
    """The example's command line."""
    text = EXAMPLE.read_text().replace("\\\n", " ")
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("python -m verl")))
    return [word for word in words[3:] if "=" in word]


def budget(strategy="fsdp2", optim=None, **settings):
    override = {"kl_budget": settings}
    return {
        "external_lib": LIB,
        "strategy": strategy,
        "optim": {"override_optimizer_config": override} | (optim or {}),
    }


ONE = {
    "no library": budget(nats=1e-3) | {"external_lib": None},
    "plain-fsdp": {"strategy": "fsdp"},  # before anything of ours is imported
    "plain-fsdp2": {"strategy": "fsdp2"},
    "fsdp": budget("fsdp", nats=1e-3),
    "fsdp2": budget(nats=1e-3),
    "roomy-fsdp": budget("fsdp", nats=1e9, rule="verify"),
    "roomy-fsdp2": budget(nats=1e9, rule="verify"),
    "verify": budget(nats=1e-3, rule="verify"),
    "share": budget(nats=1e-3, share=0.5),
    "entropy": budget(entropy_share=0.003),
    "lora": budget(nats=1e-4) | {"lora_rank": 4},
    "bf16": budget(nats=1e-2) | {"dtype": "bf16", "checkpointing": True},
    "copied": budget(optim={"optimizer": "RMSprop"}, nats=1e-3),
    "not-finite": budget(nats=1e-3) | {"advantages": [1.0, float("nan"), 1.0]},
    "masked": budget(entropy_share=0.003) | {"masked": 1},
    "reloaded": budget(nats=1e-3) | {"reload_before": 2},
    "reference": {"external_lib": LIB, "strategy": "fsdp", "engine": {"forward_only": True}},
    "example": {"overrides": overrides()},
    "no budget": {"external_lib": LIB},
    "unknown": budget(nats=1e-3, natts=1),
    "both": budget(nats=1e-3, entropy_share=0.1),
    "share 2": budget(nats=1e-3, share=2),
    "too large": budget(optim={"optimizer": "RMSprop"}, nats=1e-3, copy_bytes=1000),
    "dropout": budget(nats=1e-3) | {"override_config": {"attention_dropout": 0.1}},
    "qat": budget(nats=1e-3) | {"qat": True},
    "megatron": {"external_lib": LIB, "strategy": "megatron"},
}
OF_A_RANK = ("entropy_here", "moved")
TWO = {
    "fsdp": budget("fsdp", nats=1e-3),
    "fsdp2": budget(nats=1e-3),
    "gathered-fsdp": budget("fsdp", nats=1e-3) | {"engine": {"reshard_after_forward": False}},
    "gathered-fsdp2": budget(nats=1e-3) | {"engine": {"reshard_after_forward": False}},
    "orig-fsdp": budget("fsdp", nats=1e-3) | {"engine": {"use_orig_params": True}},
    "sgd-fsdp": budget("fsdp", {"optimizer": "SGD"}, nats=1e-3),
    "sgd-fsdp2": budget("fsdp2", {"optimizer": "SGD"}, nats=1e-3),
    "copied-fsdp": budget("fsdp", {"optimizer": "RMSprop"}, nats=1e-3),
    "entropy": budget(entropy_share=0.003),
    "lora": budget(nats=1e-4) | {"lora_rank": 4},
}


def launch(ranks, cases, policy, folder):
    """What each rank found, by case."""
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    worker = [str(Path(__file__).with_name("verl_worker.py")), str(policy), str(folder), json.dumps(cases)]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, *runner, *worker]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def one(tiny_policy, tmp_path_factory):
    return launch(1, ONE, tiny_policy, tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module")
def two(tiny_policy, tmp_path_factory):
    return launch(2, TWO, tiny_policy, tmp_path_factory.mktemp("two"))


def kept(steps, nats, least=1 / 1.5):
    for row in steps:
        assert row["taken_back"] == 0
        assert row["nats"] == pytest.approx(nats)
        assert row["kl"] <= 1.5 * nats
        assert row["kl"] == pytest.approx(row["true_kl"], rel=1e-4)
    assert all(row["kl"] >= least * nats for row in steps)


@pytest.mark.parametrize("case", ["fsdp", "fsdp2"])
def test_every_step_fills_its_budget(one, case):
    assert one[case]["kind"] == "KLBudgetEngine"
    kept(one[case]["steps"], 1e-3)
    assert one[case]["rate"] == 1e-3  # verl's own is restored


@pytest.mark.parametrize("case", ["fsdp", "fsdp2"])
def test_a_step_that_fits_is_verls_own_bit_for_bit(one, case):
    plain, roomy = one[f"plain-{case}"], one[f"roomy-{case}"]
    assert plain["kind"] == "FSDPEngineWithLMHead"
    assert torch.equal(plain["parameters"], roomy["parameters"])
    assert [row["grad_norm"] for row in plain["steps"]] == [row["grad_norm"] for row in roomy["steps"]]
    assert all(row["true_kl"] > 1 for row in plain["steps"])  # what verify has to pull back


def test_verify_pulls_back_what_the_rate_exceeds(one):
    kept(one["verify"]["steps"], 1e-3, least=0)
    assert all(row["alpha"] < 1e-3 for row in one["verify"]["steps"])


def test_a_share_of_the_micro_batches_is_measured(one):
    for row in one["share"]["steps"]:
        assert row["kl"] <= 1.5e-3
        assert row["kl"] != pytest.approx(row["true_kl"], rel=1e-6)
        assert row["true_kl"] < 6e-3


def test_the_budget_as_a_share_of_the_entropy(one):
    for row in one["entropy"]["steps"]:
        assert row["nats"] == pytest.approx(0.003 * row["entropy_here"], rel=1e-4)
        assert row["kl"] <= 1.5 * row["nats"]


@pytest.mark.parametrize(("case", "nats"), [("lora", 1e-4), ("bf16", 1e-2), ("copied", 1e-3)])
def test_it_works_with(one, case, nats):
    assert all(row["kl"] <= 1.5 * row["nats"] for row in one[case]["steps"])
    assert any(row["kl"] > nats / 3 for row in one[case]["steps"])


def test_a_gradient_that_is_not_finite_is_verls_to_skip(one):
    first, second, third = one["not-finite"]["steps"]
    assert "kl" in first
    assert "kl" not in second
    assert second["moved"] == 0
    assert "kl" in third


def test_a_mini_batch_without_a_token_takes_no_step(one):
    first, second, third = one["masked"]["steps"]
    assert "kl" in first
    assert "kl" not in second
    assert second["moved"] == 0
    assert third["kl"] <= 1.5 * third["nats"]


def test_a_checkpoint_continues_the_budget(one):
    assert torch.equal(one["reloaded"]["parameters"], one["fsdp2"]["parameters"])
    assert one["reloaded"]["steps"] == one["fsdp2"]["steps"]


def test_the_reference_policy_needs_no_budget(one):
    assert one["reference"]["kind"] == "KLBudgetEngine"


def test_the_example_composes_and_keeps_its_budget(one):
    assert one["example"]["kind"] == "KLBudgetEngine"
    for row in one["example"]["steps"]:
        assert row["kl"] <= 1.5 * row["nats"]
        assert row["nats"] == pytest.approx(0.003 * row["entropy_here"], rel=1e-4)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("no library", "unexpected keyword argument 'kl_budget'"),  # torch's
        ("no budget", "no KL budget is given: set actor_rollout_ref.actor.optim"),
        ("unknown", "kl_budget has no setting 'natts'"),
        ("both", "kl_budget: give either nats or entropy_share"),
        ("share 2", "share must be above 0 and at most 1"),
        ("too large", "the step of RMSprop cannot be pulled back"),
        ("dropout", "which dropout makes a random one"),
        ("qat", "set qat.enable=False"),
        ("megatron", "strategy=megatron: set actor_rollout_ref.actor.strategy to fsdp or fsdp2"),
    ],
)
def test_what_cannot_work_is_one_sentence(one, case, sentence):
    assert re.search(re.escape(sentence), one[case]["error"])


@pytest.mark.parametrize("case", TWO)
def test_two_ranks_agree_bit_for_bit(two, case):
    first, second = (found[case] for found in two)
    assert torch.equal(first["parameters"], second["parameters"])
    for mine, other in zip(first["steps"], second["steps"], strict=True):
        assert all(mine[name] == other[name] for name in mine if name not in OF_A_RANK)
    assert all(row["kl"] <= 1.5 * row["nats"] for row in first["steps"])
    assert all(row["kl"] == pytest.approx(row["true_kl"], rel=1e-3) for row in first["steps"])


@pytest.mark.parametrize("case", ["fsdp", "fsdp2", "entropy", "lora"])
def test_two_ranks_are_one(one, two, case):
    for row, alone in zip(two[0][case]["steps"], one[case]["steps"], strict=True):
        assert row["nats"] == pytest.approx(alone["nats"], rel=1e-3)
        assert row["kl"] == pytest.approx(alone["kl"], rel=1e-2)
