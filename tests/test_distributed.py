"""Two ranks are one: the same masks, moments and parameters as a single process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import json, sys, torch
sys.path.insert(0, {tests!r})
import conftest, training
from transformers import AutoTokenizer
from pathlib import Path
policy, out, capo, micro = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")

def greedy_words(completion_ids, **kwargs):
    return [sum(ids) % 7 / 7 for ids in completion_ids]

trainer = training.build(policy, tokenizer, out, capo, reward=greedy_words, per_device_train_batch_size=micro,
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
judge = trainer._judge
def judged(hidden, input_ids, attention_mask, entropies):
    part = judge(hidden, input_ids, attention_mask, entropies)
    weights = part.selection.weight.split(part.mask.sum(1).tolist())
    for ids, mask, weight in zip(input_ids, part.mask, weights):
        texts[str(trainer.state.global_step) + str(ids[-part.mask.shape[1]:][mask].tolist())] = weight.tolist()
    return part
trainer._judge = judged
trainer.train()
rank = trainer.accelerator.process_index
state = trainer.step_model.state_dict()
torch.save({{"weights": texts, "parameters": training.parameters(trainer), "state": state,
    "metrics": training.history(trainer) if rank == 0 else None}}, out / f"rank{{rank}}.pt")
"""


@pytest.fixture
def launch(tmp_path, tiny_policy):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(tests=str(Path(__file__).parent)))

    def launch(ranks, capo):
        out = tmp_path / f"ranks{ranks}"
        out.mkdir()
        runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        start = runner if ranks > 1 else [sys.executable]
        arguments = [str(worker), str(tiny_policy), str(out), json.dumps(capo), str(16 // ranks)]
        done = subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
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
    ],
    ids=["mask", "scale-planned"],
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
    if capo["mode"] == "mask":
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
