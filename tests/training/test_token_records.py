"""Token records: every number against the trainer's own tensors, and which steps are kept."""

import gzip
import json

import pytest
import torch

import tiny_trainer
from open_r1_capo.settings.capo import ConfigError
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.training.build import build as build_settings
from open_r1_capo.training.token_records import TokenRecords

COLUMNS = {
    "tokens", "prob", "prob_after", "entropy", "policy_shift", "objective_shift", "gradient_norm", "kl", "kl_head",
    "weight", "reason",
}  # fmt: skip


def read(folder, name):
    with gzip.open(folder / f"{name}.json.gz", "rt") as file:
        return json.load(file)


def records(tmp_path, tiny_tokenizer, keep="notable"):
    return TokenRecords(tmp_path / "tokens", keep, tiny_tokenizer)


def test_a_record_holds_what_the_trainer_saw(build, tmp_path, tiny_tokenizer):
    bounds = {"mode": "mask", "max_policy_shift": 6.0, "max_objective_shift": 8.0, "top_k": 20}
    trainer = build(
        bounds, records=records(tmp_path, tiny_tokenizer), max_steps=1, learning_rate=1e-3,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    parts, judge = [], trainer._weigh_tokens
    trainer._weigh_tokens = lambda *args: (parts.append(judge(*args)), parts[-1])[1]
    trainer.train()
    (row,) = tiny_trainer.history(trainer)
    record = read(tmp_path / "tokens", "first")
    assert {path.name for path in (tmp_path / "tokens").iterdir()} == {
        "first.json.gz", "most_rejected.json.gz", "largest_kl.json.gz",
    }  # fmt: skip
    assert (record["step"], record["lr"], record["taken_lr"]) == (1, 1e-3, 1e-3)
    assert record["measured_kl"] == pytest.approx(row["capo/measured_kl"], rel=1e-3)
    assert record["rejected"] == pytest.approx(row["capo/rejected_frac"], rel=1e-3)
    rewards = [completion["reward"] for completion in record["completions"]]
    assert sum(rewards) / len(rewards) == pytest.approx(row["reward"], rel=1e-3)
    completions, log_likelihood = iter(record["completions"]), []
    for part in parts:
        with torch.no_grad():
            out = trainer.model(part.input_ids, attention_mask=part.attention_mask).logits
        log_likelihood.append((out[:, -part.mask.shape[1] - 1 : -1][part.mask] / 0.9).log_softmax(-1))
        for i, length in enumerate(part.mask.sum(1).tolist()):
            check_completion(part, i, next(completions), length, log_likelihood[-1], tiny_tokenizer)
    assert next(completions, None) is None


def check_completion(part, i, completion, length, after, tokenizer):
    """One completion against its micro-batch; `after` (N, V) is the policy after the step."""
    assert {len(completion[name]) for name in COLUMNS} == {length}
    before = sum(part.mask[:i].sum(1).tolist())
    rows, tokens = slice(before, before + length), part.tokens
    ids = part.input_ids[i, -part.mask.shape[1] :][part.mask[i]]
    assert completion["text"] == tokenizer.decode(ids)
    assert completion["tokens"] == [tokenizer.decode([token]) for token in ids.tolist()]
    prompt = part.input_ids[i, : -part.mask.shape[1]][part.attention_mask[i, : -part.mask.shape[1]].bool()]
    assert completion["prompt"] == tokenizer.decode(prompt)
    assert completion["reward"] == pytest.approx(tiny_trainer.token_reward([ids.tolist()])[0], rel=1e-3)
    assert completion["advantage"] == pytest.approx(float(tokens.advantages[before]), rel=1e-3)
    prob = tokens.probs.gather(1, tokens.action_index[:, None])[:, 0] * part.log_mass.exp()
    new = after.gather(1, part.input_ids[:, -part.mask.shape[1] :][part.mask][:, None])[:, 0].exp()
    norm = (tokens.advantages.abs() * tokens.score.norm(dim=1) * tokens.features.norm(dim=1))[rows]
    selection = part.by_rule
    reason = selection.over_policy * 1 + selection.over_objective * 2 + selection.non_finite * 4 + selection.other * 8
    expected = {
        "prob": prob[rows], "prob_after": new[rows], "entropy": part.entropy[rows], "gradient_norm": norm,
        "policy_shift": selection.policy_shift[rows], "objective_shift": selection.objective_shift[rows],
        "weight": selection.weight[rows], "reason": reason[rows],
    }  # fmt: skip
    for name, values in expected.items():
        assert completion[name] == pytest.approx(values.tolist(), rel=1e-3), name
    assert all(w == 0 for w, r in zip(completion["weight"], completion["reason"], strict=True) if r)


def test_unmeasured_tokens_are_null(build, tmp_path, tiny_tokenizer):
    for share, known in ((0.5, 4), (0.0, 0)):
        folder = tmp_path / str(share)
        trainer = build(
            {"mode": "observe", "measure_kl": share}, records=TokenRecords(folder, "all", tiny_tokenizer), max_steps=1
        )
        folder.parent.mkdir(exist_ok=True)
        trainer.train()
        record = read(folder, "step1")
        for name in ("kl", "kl_head", "prob_after"):
            found = [completion[name] is not None for completion in record["completions"]]
            assert found == [True] * known + [False] * (8 - known)
        assert (record["measured_kl"] is None) == (share == 0)
        values = [v for completion in record["completions"] for v in completion["kl"] or []]
        if known:
            assert sum(values) / len(values) == pytest.approx(record["measured_kl"], rel=1e-2)


def test_only_a_step_that_beats_the_kept_one_is_written(build, tmp_path, tiny_tokenizer):
    trainer = build(
        {"mode": "mask", "max_policy_shift": 6.0},
        records=records(tmp_path, tiny_tokenizer),
        max_steps=6,
        learning_rate=1e-3,
    )
    trainer.train()
    rows = tiny_trainer.history(trainer)
    for name, key in (("most_rejected", "capo/rejected_frac"), ("largest_kl", "capo/measured_kl")):
        values = [row[key] for row in rows]
        assert read(tmp_path / "tokens", name)["step"] == 1 + values.index(max(values))
    assert read(tmp_path / "tokens", "first")["step"] == 1


def test_a_warm_ups_first_step_gives_way(build, tmp_path, tiny_tokenizer):
    settings = {"max_steps": 4, "warmup_steps": 2, "lr_scheduler_type": "linear", "learning_rate": 1e-3}
    trainer = build({"mode": "observe"}, records=records(tmp_path, tiny_tokenizer), **settings)
    trainer.train()
    assert [row["learning_rate"] for row in tiny_trainer.history(trainer)][:2] == [0.0, 5e-4]
    assert read(tmp_path / "tokens", "first")["step"] == 2


def test_resuming_forgets_later_records(tmp_path, tiny_tokenizer):
    folder = tmp_path / "tokens"
    folder.mkdir()
    for name, step in (("first", 1), ("most_rejected", 7), ("largest_kl", 4)):
        content = {"step": step, "taken_lr": 1e-3, "rejected": 0.5, "measured_kl": 0.25, "completions": []}
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))
    (folder / "step3.json.gz").write_bytes(b"cut off")
    whole = gzip.compress(json.dumps({"step": 2}).encode())
    (folder / "step2.json.gz").write_bytes(whole[:10] + b"\xff" * 6 + whole[16:])
    found = records(tmp_path, tiny_tokenizer)
    found.resume(4)
    assert sorted(path.name for path in folder.iterdir()) == ["first.json.gz", "largest_kl.json.gz"]
    assert found._beaten({"taken_lr": 1e-2, "rejected": 0.1, "measured_kl": 0.2}) == ["most_rejected"]
    assert found._beaten({"taken_lr": 1e-2, "rejected": 0.1, "measured_kl": 0.3}) == ["largest_kl"]
    assert found._beaten({"taken_lr": 1e-2, "rejected": 0.1, "measured_kl": None}) == []
    found.resume(0)
    assert found._beaten({"taken_lr": 1e-2, "rejected": 0.0, "measured_kl": 0.0}) == ["first"]


def test_every_step_and_no_step(build, tmp_path, tiny_tokenizer):
    build({"mode": "observe"}, records=records(tmp_path, tiny_tokenizer, "all")).train()
    assert {path.name for path in (tmp_path / "tokens").iterdir()} == {f"step{k}.json.gz" for k in (1, 2, 3)}
    off = build({"mode": "off"}, records=TokenRecords(tmp_path / "off", "all", tiny_tokenizer))
    off.train()
    assert not (tmp_path / "off").exists()


def test_the_setting():
    run, _ = build_settings(compose_recipe("capo_aggressive", ["token_records=all"]))
    assert run.token_records == "all"
    with pytest.raises(ConfigError, match="token_records must be one of notable, all, none, got 'some'"):
        build_settings(compose_recipe("capo_aggressive", ["token_records=some"]))
    with pytest.raises(ConfigError, match="token_records has no effect with capo.mode=off"):
        compose_recipe("grpo_aggressive", ["capo.mode=off", "token_records=all"])
