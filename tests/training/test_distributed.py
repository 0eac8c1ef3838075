"""Two ranks are one: the same masks, moments and parameters as a single process, whole and in shards."""

import functools
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from open_r1_capo import grpo
from test_grpo import command, metrics

ROOT = Path(__file__).parents[2]
STAND_INS = Path(__file__).parents[1] / "stand_ins"
sys.path.insert(0, str(ROOT / "benchmarks"))
import ranks  # noqa: E402

WORKER = """
import json, sys, torch
sys.path.insert(0, {tests!r})
import conftest, tiny_trainer
from transformers import AutoTokenizer
from pathlib import Path
policy, out, capo, micro = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")

def greedy_words(completion_ids, **kwargs):
    return [sum(ids) % 7 / 7 for ids in completion_ids]

budget = capo.pop("budget", None)
trainer = tiny_trainer.build(policy, tokenizer, out, capo, reward=greedy_words, per_device_train_batch_size=micro,
    budget=budget,
    num_generations=4, max_steps=2, learning_rate=1e-3, shuffle_dataset=False,
    generation_kwargs={{"do_sample": True, "top_k": 1}})
texts = {{}}
prepare = trainer._generate_and_score_completions
def varied(inputs):
    # the same completions whatever the ranks: every copy of a prompt gets its own, from the prompt alone
    batch = prepare(inputs)
    total = trainer.accelerator.process_index * len(inputs)
    ids = batch["completion_ids"]
    for row in range(len(ids)):
        generator = torch.Generator().manual_seed(trainer.state.global_step * 100 + total + row)
        ids[row] = torch.randint(5, 200, ids[row].shape, generator=generator)
    batch["completion_mask"] = torch.ones_like(batch["completion_mask"])
    rows = torch.arange(total, total + len(ids))
    batch["advantages"] = (rows % 4 - 1.5) * torch.where(rows % 3 == 0, -1.0, 1.0)
    return batch
trainer._generate_and_score_completions = varied
judge = trainer._weigh_tokens
def judged(inputs, hidden, input_ids, attention_mask, entropies):
    part = judge(inputs, hidden, input_ids, attention_mask, entropies)
    weights = part.by_rule.weight.split(part.mask.sum(1).tolist())
    for ids, mask, weight in zip(input_ids, part.mask, weights):
        texts[str(trainer.state.global_step) + str(ids[-part.mask.shape[1]:][mask].tolist())] = weight.tolist()
    return part
trainer._weigh_tokens = judged
trainer.train()
rank = trainer.accelerator.process_index
state = trainer.step_model.state_dict()
torch.save({{"weights": texts, "parameters": tiny_trainer.parameters(trainer), "state": state,
    "metrics": tiny_trainer.history(trainer) if rank == 0 else None}}, out / f"rank{{rank}}.pt")
"""


@pytest.fixture
def launch(tmp_path, tiny_policy):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(tests=str(Path(__file__).parents[1])))

    def launch(ranks, capo):
        out = tmp_path / f"ranks{ranks}"
        out.mkdir()
        runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        start = runner if ranks > 1 else [sys.executable]
        arguments = [str(worker), str(tiny_policy), str(out), json.dumps(capo), str(16 // ranks)]
        done = subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-6000:]
        return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]

    return launch


@pytest.mark.parametrize(
    "capo",
    [
        {"mode": "mask", "max_policy_shift": 4.0, "top_k": 1000},
        {
            "mode": "scale",
            "max_policy_shift": 1e-2,
            "denominator": "all",
            "top_k": 1000,
            "step_policy_shift": 1e-3,
            "absent_rows": "decay",
        },
        {"mode": "mask", "max_policy_shift": 1e9, "top_k": 1000, "budget": {"rule": "target", "nats": 1e-3}},
    ],
    ids=["mask", "scale-planned", "budget"],
)
def test_two_ranks_are_one(launch, capo):
    (one,), (first, second) = launch(1, capo), launch(2, capo)
    assert torch.equal(first["parameters"], second["parameters"])  # the ranks agree bit for bit
    for name in ("token_ids", "first_moment", "second_moment", "last_step"):
        assert torch.equal(first["state"][name], second["state"][name])
    weights = first["weights"] | second["weights"]
    assert weights.keys() == one["weights"].keys()
    for text, weight in one["weights"].items():
        assert weights[text] == pytest.approx(weight, rel=1e-2), text
    if "budget" in capo:
        assert all(row["budget/kl"] <= 1.5e-3 for row in first["metrics"])
    elif capo["mode"] == "mask":
        assert weights == one["weights"]
        kept = torch.tensor([w for row in weights.values() for w in row])
        assert 0.05 < kept.mean() < 0.95
    scale = one["state"]["first_moment"].abs().max()
    assert (first["state"]["first_moment"] - one["state"]["first_moment"]).abs().max() < 1e-4 * scale
    for row, reference in zip(first["metrics"], one["metrics"], strict=True):
        for name in (
            "capo/rejected_frac",
            "capo/batch_policy_shift",
            "capo/measured_kl",
            "capo/step_scale",
            "completions",
        ):
            assert row[name] == pytest.approx(reference[name], rel=2e-3, abs=1e-6), name


# --- in shards -------------------------------------------------------------------------------------------------------

SHARDED = {
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "planned": ({}, {"step_policy_shift": 1e-3, "absent_rows": "decay"}),
    "budget": ({}, {"budget": {"rule": "target", "nats": 1e-4}}),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The policy with its head tied or not, and what one process makes of it."""

    @functools.cache
    def train(tied):
        model = ranks.policy(tmp_path_factory.mktemp("ranks") / "policy", tied)
        return model, ranks.run(None, 1, model, tmp_path_factory.mktemp("one"), SHARDED)

    return train


@pytest.mark.parametrize(
    ("accelerator", "tied"), [("zero2", False), ("zero3", False), ("zero3", True), ("fsdp", False), ("fsdp", True)]
)
def test_two_ranks_in_shards_are_one(accelerator, tied, one_process, tmp_path):
    """A planned rate, a schedule, clipping, accumulation, and a step in which a rank has no token at all."""
    if ranks.interpreter(accelerator) is None:
        pytest.skip("no DeepSpeed: make ranks installs it")
    model, alone = one_process(tied)
    for case, found in ranks.run(accelerator, 2, model, tmp_path, SHARDED).items():
        assert found[0]["kind"] == ("FSDP" if accelerator == "fsdp" else "DEEPSPEED")
        difference = ranks.compare(found, alone[case][0])
        assert difference["agree"], case
        assert difference["masks"] == 0, case
        if case != "budget":  # whose first rates are so small that no token moves far
            assert 0.1 < sum(difference["rejected"]) / difference["tokens"] < 0.9
        assert difference["shifts"] < 1e-3, case  # of the bounds
        # a gradient left over from the step before moves these by 3e-2 and 6e-5
        rounding = 1e-4 if case == "budget" else 1e-5  # the length of a step follows from measured KLs
        assert max(difference["first_moment"], difference["second_moment"]) < rounding, case
        assert difference["parameters"] < 1e-5, case
        assert difference["metrics"][0] < 5e-3, (case, difference["metrics"])


@pytest.mark.parametrize("accelerator", ["ddp", "fsdp"])
def test_a_budget_without_curvature_in_ranks(accelerator, tmp_path):
    """Every rank measures the same KL, moves alike and ends alike; one process takes the same steps."""
    model = ranks.policy(tmp_path / "policy")
    cases = {"budget": ({}, {"mode": "off", "budget": {"rule": "target", "nats": 1e-4}})}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    alone = ranks.run(None, 1, model, tmp_path / "one", cases)["budget"][0]
    first, second = ranks.run(accelerator, 2, model, tmp_path / "two", cases)["budget"]
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), name
        if not name.endswith("k_proj.bias"):  # without a gradient but for rounding
            assert (value - alone["parameters"][name]).abs().max() < 1e-5, name
    for row, reference in zip(first["metrics"], alone["metrics"], strict=True):
        assert 0 < row["budget/kl"] <= 1.5e-4
        assert row["budget/kl"] == pytest.approx(reference["budget/kl"], rel=2e-2)
        assert row["budget/passes"] == reference["budget/passes"]


# --- whole runs ------------------------------------------------------------------------------------------------------

ENTRY = """
import json, os, sys
from pathlib import Path
from open_r1_capo import grpo
from open_r1_capo.training import run, trainer
from open_r1_capo.training.generation import choice
sys.path.insert(0, {benchmarks!r})
from rank_worker import shard_on_cpus

choice.vllm_python = lambda: Path(sys.executable)
os.environ["PYTHONPATH"] = {stand_ins!r}  # of the engines, not of this process
make, draw, drawn = run.make_trainer, trainer.CAPOTrainer._generate_and_score_completions, []

def make_sharded(*args, **kwargs):
    shard_on_cpus()
    return make(*args, **kwargs)

def noted(self, inputs):
    batch = draw(self, inputs)
    for ids, mask in zip(batch["completion_ids"], batch["completion_mask"].bool()):
        drawn.append([self.state.global_step, ids[mask].tolist()])
    return batch

run.make_trainer, trainer.CAPOTrainer._generate_and_score_completions = make_sharded, noted
code = grpo.main(sys.argv[2:])
Path(sys.argv[1] + os.environ.get("RANK", "0")).write_text(json.dumps(drawn))
sys.exit(code)
"""


@pytest.fixture
def start(tmp_path, tiny_policy):
    """Run the entry point in some processes: `start(launcher, ranks, root, *overrides)`; what each of them drew."""
    entry = tmp_path / "entry.py"
    entry.write_text(ENTRY.format(benchmarks=str(ROOT / "benchmarks"), stand_ins=str(STAND_INS)))

    def run(launcher, ranks, root, *overrides):
        small = ["completions_per_step=16", "max_completion_length=8", *overrides]
        recipe = [
            "--config-name",
            "capo_aggressive",
            f"output_root={root}",
            f"model_name_or_path={tiny_policy}",
            *small,
        ]
        drawn = tmp_path / f"drawn{ranks}-"
        done = subprocess.run([sys.executable, *launcher, entry, drawn, *recipe], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-6000:]
        return [json.loads(Path(f"{drawn}{rank}").read_text()) for rank in range(ranks)]

    return run


@pytest.mark.parametrize("generation", ["vllm_server", "vllm_colocate"])
def test_two_ranks_draw_the_completions_of_one(generation, start, tiny_policy, tmp_path):
    server = stand_in_vllm().Server(tiny_policy)
    options = [f"generation={generation}", "max_steps=3", "evaluation.problems=0"]
    options += [f"vllm_server_base_url={server.url}"] if generation == "vllm_server" else []
    (one,) = start([], 1, tmp_path / "one", *options)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    first, second = start(torchrun, 2, tmp_path / "two", *options)
    server.close()
    assert len(one) == 3 * 16
    assert len({tuple(ids) for _, ids in one}) > 24
    for step in range(3):
        assert [row for row in first + second if row[0] == step] == [row for row in one if row[0] == step]


def stand_in_vllm():
    spec = importlib.util.spec_from_file_location("stand_in_vllm", STAND_INS / "vllm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_in_shards_ends_and_goes_on(start, tmp_path):
    """FSDP: checkpoints are ordinary folders, and the steps after one are those of the uninterrupted run."""
    config = ROOT / "recipes" / "accelerate_configs" / "fsdp.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 2]
    launcher += ["--main_process_port", 0, "--mixed_precision", "no"]
    options = ["max_steps=3", "save_steps=1", "evaluation.problems=4", "evaluation.samples=1"]
    start([str(word) for word in launcher], 2, tmp_path, *options)
    run = tmp_path / "capo_aggressive" / "lab" / "seed0"
    last = run / "checkpoints" / "checkpoint-3"
    steps, weights = metrics(run), load_file(last / "model.safetensors")
    assert json.loads((run / "summary.json").read_text())
    shutil.rmtree(last)
    (run / "summary.json").unlink()
    start([str(word) for word in launcher], 2, tmp_path, *options)
    assert metrics(run) == steps
    again = load_file(last / "model.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_fsdp_that_shards_nothing_is_said(tiny_policy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert grpo.main(command(tmp_path, tiny_policy, "max_steps=1")) == 0
    assert "FSDP is ignored" in capsys.readouterr().err
