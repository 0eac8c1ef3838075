"""The lab: problems and texts, the tokenizer, the cache of pretrained policies, and the held-out measurement."""

import copy
import json
import random
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.rewards import accuracy_reward

from open_r1_capo.tasks.cache import CACHE_VARIABLE, CacheError
from open_r1_capo.tasks.held_out import held_out_accuracy, suite_accuracy
from open_r1_capo.tasks.lab import policy, task
from open_r1_capo.tasks.lab.policy import POLICY, base_policy, cache_key
from open_r1_capo.tasks.lab.pretrain import IGNORE, encode, pretrain, pretraining_text
from open_r1_capo.tasks.lab.settings import LabSettings, Mixture
from open_r1_capo.tasks.lab.tokenizer import build_tokenizer
from open_r1_capo.tasks.source import problem_source

TINY = LabSettings(hidden_size=64, intermediate_size=64, layers=1, heads=2, kv_heads=1, steps=3, batch_size=8)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(256)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(cache):
    return base_policy(seed=0, cache_dir=cache, settings=TINY)


def as_completions(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


# ------------------------------------------------------------------ the task


@pytest.mark.parametrize("variant", task.VARIANTS)
def test_problems_depend_on_their_seed_only(variant):
    first = task.problems("test", 20, seed=3, variant=variant)
    assert first == task.problems("test", 20, seed=3, variant=variant)
    assert first[:5] == task.problems("test", 5, seed=3, variant=variant)
    assert first != task.problems("test", 20, seed=4, variant=variant)
    assert first != task.problems("train", 20, seed=3, variant=variant)


def test_one_split_for_every_order_and_wording_of_the_same_terms():
    rng = random.Random(0)
    for name in task.VARIANTS:
        for split in task.SPLITS:
            terms = list(task.draw_terms(rng, split, name))
            rng.shuffle(terms)
            assert task.split_of(tuple(terms)) == split


def test_no_test_problem_is_pretrained_on_or_in_the_train_split():
    rng = random.Random(0)
    seen = {pretraining_text(rng, Mixture())[0] for _ in range(4000)}
    for variant in task.VARIANTS:
        held_out = {row["problem"] for row in task.problems("test", 300, variant=variant)}
        assert not held_out & seen
        assert not held_out & {row["problem"] for row in task.problems("train", 300, variant=variant)}


def test_unknown_split_and_variant_are_named():
    with pytest.raises(ValueError, match="split must be one of train, test"):
        task.problems("dev", 1)
    with pytest.raises(ValueError, match="variant must be one of base"):
        task.problems("test", 1, variant="harder")


def test_worked_solution_shows_each_running_sum():
    rng = random.Random(0)
    assert task.worked_solution((3, 5, 7), rng) == r"3+5=8, 8+7=15, \boxed{15}"
    assert task.worked_solution((9, 4, -6), rng) == r"9+4=13, 13-6=7, \boxed{7}"
    assert task.worked_solution((3, 5, 7), rng, shortcut=1.0) == r"3+5+7=15, \boxed{15}"
    assert task.worked_solution((3, 5, 7), rng, slip=1.0) != task.worked_solution((3, 5, 7), rng)


def test_styles_come_in_their_shares():
    rng, mixture = random.Random(0), Mixture()
    texts = [pretraining_text(rng, mixture)[1] for _ in range(4000)]
    worked = sum(text[0].isdigit() for text in texts) / len(texts)
    silent = sum("boxed" not in text for text in texts) / len(texts)
    assert worked == pytest.approx(mixture.worked, abs=0.03)
    assert silent == pytest.approx(1 - mixture.worked - mixture.direct, abs=0.03)


@pytest.mark.parametrize("variant", task.VARIANTS)
def test_the_real_reward_scores_every_variant(variant):
    rows = task.problems("test", 10, variant=variant)
    answers = [row["answer"] for row in rows]
    assert accuracy_reward(as_completions(map(task.boxed, answers)), answers) == [1.0] * 10
    wrong = [task.boxed(int(answer) + 1) for answer in answers]
    assert accuracy_reward(as_completions(wrong), answers) == [0.0] * 10
    assert accuracy_reward(as_completions(task.RAMBLES), answers[: len(task.RAMBLES)]) == [0.0] * len(task.RAMBLES)


# ------------------------------------------------------------------ the tokenizer


def test_texts_come_back_as_they_were(tokenizer):
    rng = random.Random(0)
    texts = [text for _ in range(500) for text in pretraining_text(rng, Mixture())]
    texts += [row["problem"] for name in task.VARIANTS for row in task.problems("test", 20, variant=name)]
    texts += ["".join(map(chr, range(32, 127))), "05, 123 and\n1000", "σ ≤ 1"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_texts_are_short_in_tokens(tokenizer):
    rng = random.Random(0)
    for _ in range(500):
        problem, completion = pretraining_text(rng, Mixture())
        ids, labels = encode(problem, completion, tokenizer)
        assert sum(label != IGNORE for label in labels) <= 40
        assert len(ids) <= 80
        assert ids[-1] == tokenizer.eos_token_id


def test_chat_template_leaves_the_system_message_out(tokenizer):
    user = {"role": "user", "content": "What is 3+5?"}
    alone = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    system = {"role": "system", "content": "Think first."}
    assert alone == "<|user|>What is 3+5?<|assistant|>"
    assert tokenizer.apply_chat_template([system, user], add_generation_prompt=True, tokenize=False) == alone


# ------------------------------------------------------------------ the policy and its cache


def test_pretraining_is_deterministic_and_leaves_torch_as_it_was(tokenizer):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first, again, other = (pretrain(TINY, tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert torch.equal(before, torch.get_rng_state())
    assert threads == torch.get_num_threads()


def test_pretraining_learns(tokenizer, capsys):
    pretrain(replace(TINY, steps=60, learning_rate=1e-2), tokenizer, 0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "loss" in line]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert losses[-1] < 0.6 * losses[0]


def test_folder_is_an_ordinary_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tok = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen2"
    assert model.config.hidden_size // model.config.num_attention_heads >= 32
    assert not model.config.tie_word_embeddings
    assert model.generation_config.do_sample
    assert model.generation_config.eos_token_id == tok.eos_token_id
    assert model.config.vocab_size == len(tok)
    assert tok.padding_side == "left"
    reference, text = build_tokenizer(256), r"What is 12+7? 12+7=19, \boxed{19}"
    assert tok(text)["input_ids"] == reference(text)["input_ids"]
    messages = [{"role": "user", "content": text}]
    assert tok.apply_chat_template(messages, tokenize=False) == reference.apply_chat_template(messages, tokenize=False)


def test_cache_key_changes_with_everything_that_matters(monkeypatch):
    key = cache_key(TINY, 0)
    assert key == cache_key(TINY, 0)
    others = [cache_key(TINY, 1), cache_key(replace(TINY, steps=4), 0)]
    others.append(cache_key(replace(TINY, mixture=Mixture(slip=0.2)), 0))
    monkeypatch.setattr(torch, "__version__", "0")
    others.append(cache_key(TINY, 0))
    assert len({key, *others}) == 5


def test_second_use_does_not_train(folder, cache, monkeypatch):
    monkeypatch.setattr(policy.pretrain, "pretrain", lambda *_: pytest.fail("trained again"))
    assert base_policy(0, cache, TINY) == folder


def test_environment_names_the_cache(folder, cache, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    assert base_policy(0, settings=TINY) == folder


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_damaged_folder_is_rebuilt(folder, cache, damage, capsys):
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(good[:100])
    elif damage == "delete":
        weights.unlink()
    else:
        (folder / POLICY.manifest).write_text("{")
    assert not POLICY.is_sound(folder)
    assert base_policy(0, cache, TINY) == folder
    assert POLICY.is_sound(folder)
    assert weights.read_bytes() == good
    assert "damaged" in capsys.readouterr().err


def test_files_added_by_other_tools_do_not_matter(folder):
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("x")
    assert POLICY.is_sound(folder)


def test_interrupted_training_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(policy.pretrain, "pretrain", interrupt)
    with pytest.raises(KeyboardInterrupt):
        base_policy(0, tmp_path, TINY)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_full_disk_is_one_clear_sentence(tmp_path, monkeypatch):
    class Model:
        def save_pretrained(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(policy.pretrain, "pretrain", lambda *_: Model())
    with pytest.raises(CacheError, match=r"No space left on device.*OPEN_R1_CAPO_CACHE"):
        base_policy(0, tmp_path, TINY)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_unwritable_cache_is_one_clear_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot keep the lab policy"):
        base_policy(0, tmp_path / "file", TINY)


def test_two_makers_at_once_give_one_whole_folder(tmp_path, folder, monkeypatch):
    ready, model = threading.Barrier(2), AutoModelForCausalLM.from_pretrained(folder)  # not in threads: it patches

    def make(*_):
        ready.wait(timeout=10)  # both train at the same time, as where files cannot be locked
        return copy.deepcopy(model)

    monkeypatch.setattr(policy.pretrain, "pretrain", make)
    target = tmp_path / folder.name
    makers = [
        threading.Thread(target=POLICY.make, args=(target, lambda made: policy.train(made, TINY, 0))) for _ in range(2)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert POLICY.is_sound(target)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert json.loads((target / POLICY.manifest).read_text())["settings"]["hidden_size"] == TINY.hidden_size
    shutil.rmtree(target)


# ------------------------------------------------------------------ the measurement


@pytest.fixture(scope="module")
def loaded(cache):
    path = base_policy(seed=0, cache_dir=cache, settings=TINY)
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def test_measurement_leaves_random_state_and_mode_alone(loaded):
    model, tok = loaded
    rows, before = task.problems("test", 5), torch.get_rng_state()
    model.train()
    first = held_out_accuracy(model, tok, rows, accuracy_reward, max_new_tokens=8, seed=1)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert held_out_accuracy(model.eval(), tok, rows, accuracy_reward, max_new_tokens=8, seed=1) == first
    assert not model.training
    assert 1 <= first["mean_completion_length"] <= 8


def test_measurement_counts_by_problem(loaded):
    model, tok = loaded
    seen = []

    def reward(completions, solution):
        seen.extend(completions)
        return [1.0, 0.0, 1.0, 1.0, None, None]

    out = held_out_accuracy(model, tok, task.problems("test", 3), reward, samples=2, max_new_tokens=4, batch_size=4)
    assert out["accuracy"] == 0.75
    assert out["n"] == 2
    assert out["standard_error"] == pytest.approx(0.25)
    assert len(seen) == 6
    assert seen[0][0]["role"] == "assistant"
    with pytest.raises(ValueError, match="no problem"):
        held_out_accuracy(model, tok, task.problems("test", 1), lambda completions, solution: [None], max_new_tokens=2)


def test_greedy_measurement_ignores_the_seed(loaded):
    model, tok = loaded
    rows = task.problems("test", 4)
    first, second = (
        held_out_accuracy(model, tok, rows, accuracy_reward, temperature=0, max_new_tokens=6, seed=seed)
        for seed in (0, 1)
    )
    assert first == second


def sets(count):
    return problem_source("lab").suite(count)


def test_suite_is_the_mean_of_the_variants(loaded):
    model, tok = loaded
    before, right = torch.get_rng_state(), {}

    def reward(completions, solution):
        right["solution"] = solution
        return [float(int(i < 8) or i % 4 == 0) for i in range(len(solution))]  # 4 problems x 2 samples a variant

    out = suite_accuracy(model.train(), tok, sets(4), reward, samples=2, max_new_tokens=3, batch_size=48)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    wanted = [row["answer"] for name in task.VARIANTS for row in task.problems("test", 4, variant=name) for _ in "12"]
    assert right["solution"] == wanted
    assert list(out["tasks"]) == list(task.VARIANTS)
    assert out["tasks"]["base"] == {"accuracy": 1.0, "stderr": 0.0}
    assert out["tasks"]["story"]["accuracy"] == 0.25  # problems score 1/2, 0, 1/2, 0
    assert out["tasks"]["story"]["stderr"] == pytest.approx((1 / 12) ** 0.5 / 2)
    assert out["test"] == pytest.approx((1 + 7 * 0.25) / 8)
    assert out["test_stderr"] == pytest.approx((7 / 48) ** 0.5 / 8)
    with pytest.raises(ValueError, match="no problem"):
        suite_accuracy(model, tok, sets(1), lambda completions, solution: [None] * len(solution), max_new_tokens=2)
