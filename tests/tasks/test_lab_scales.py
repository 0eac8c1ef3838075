"""The lab's variants: filler in its texts, the settings that choose a policy, and the default as it always was."""

import hashlib
import random
from dataclasses import replace

import pytest
import torch
from trl.rewards import accuracy_reward

from open_r1_capo.settings.recipes import RECIPES, compose_recipe
from open_r1_capo.settings.values import ConfigError
from open_r1_capo.tasks.lab import task
from open_r1_capo.tasks.lab.policy import base_policy
from open_r1_capo.tasks.lab.pretrain import _batch, _loss, _weights, build_model, pretraining_text
from open_r1_capo.tasks.lab.settings import LabSettings, Mixture
from open_r1_capo.tasks.lab.tokenizer import build_tokenizer, vocabulary
from open_r1_capo.training.build import build, load_dataset

FILLED = Mixture(filler_words=5, filler_vocabulary=40)
SCALES = sorted(path.stem for path in (RECIPES / "scale").glob("lab_*.yaml"))


def digest(items):
    return hashlib.sha256("".join(map(repr, items)).encode()).hexdigest()[:16]


def split_words(text, words):
    """The filler words of a text, and the text without them."""
    found = [word for word in text.split() if f"{word} " in words]
    return found, "".join(part for part in text.split(" ") if f"{part} " not in words)


# ------------------------------------------------------------------ the default


def test_the_default_policy_reads_what_it_always_read():
    """The stream and the vocabulary of the first release: every result on the lab hangs on them."""
    rng, mixture = random.Random("pretrain/0"), LabSettings().mixture_at(1)
    assert digest(pretraining_text(rng, mixture) for _ in range(3000)) == "a2deaebf15ae356f"
    assert digest([vocabulary()]) == "66479d674d60d15d"
    assert len(build_tokenizer(256)) == 405


def test_recipes_of_the_lab_train_the_default():
    run, _ = build(compose_recipe("capo_aggressive", []))
    assert run.lab == LabSettings()
    assert run.data.variant == "base"


# ------------------------------------------------------------------ filler


def test_filler_words_are_different_and_of_zipf_frequency():
    words = task.filler_vocabulary(300)
    assert len(set(words)) == 300
    assert words[:40] == task.filler_vocabulary(40)
    assert len(task.filler_vocabulary(task.FILLER_WORDS)) == task.FILLER_WORDS
    rng, draw = random.Random(0), task.zipf_filler(20, 300, 1.0)
    drawn = [word + " " for _ in range(4000) for word in draw(rng).split()]
    total = sum(1 / rank for rank in range(1, 301))
    assert len(drawn) / 4000 == pytest.approx(20, abs=0.3)
    for rank in (1, 2, 10, 100):
        assert drawn.count(words[rank - 1]) / len(drawn) == pytest.approx(1 / rank / total, rel=0.1)


def test_small_means_hold_too():
    rng, draw = random.Random(0), task.zipf_filler(0.3, 10, 1.0)
    assert sum(len(draw(rng).split()) for _ in range(4000)) / 4000 == pytest.approx(0.3, abs=0.03)


def test_without_its_filler_a_text_is_one_of_the_lab():
    """Every part is preceded by words, and what is left is a text of the same styles."""
    rng, words = random.Random(0), set(FILLED.filler_tokens)
    worked = task.worked_solution((3, 5, 7), rng, filler=FILLED.filler)
    found, left = split_words(worked, words)
    assert left == task.worked_solution((3, 5, 7), rng).replace(" ", "")
    assert len(found) == 3 * 5
    assert worked.startswith(tuple(words))
    for text in (task.direct_answer((3, 5), rng, 1.0, FILLED.filler), task.ramble(rng, FILLED.filler)):
        assert text.startswith(tuple(words))
        assert split_words(text, words)[0]


def test_the_reward_finds_the_answer_in_filler():
    rng, rows = random.Random(0), task.problems("test", 10)
    texts = [task.direct_answer((int(row["answer"]), 0), rng, 1.0, FILLED.filler) for row in rows]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert accuracy_reward(completions, [row["answer"] for row in rows]) == [1.0] * 10
    silent = [[{"role": "assistant", "content": task.ramble(rng, FILLED.filler)}] for _ in rows]
    assert accuracy_reward(silent, [row["answer"] for row in rows]) == [0.0] * 10


def test_filler_is_one_token_a_word_and_comes_last_in_the_vocabulary():
    plain, filled = build_tokenizer(256), build_tokenizer(256, FILLED.filler_tokens)
    assert len(filled) == len(plain) + 40
    text = "".join(FILLED.filler_tokens)
    assert filled(text)["input_ids"] == list(range(len(plain), len(filled)))
    rng = random.Random(0)
    for _ in range(300):
        problem, completion = pretraining_text(rng, FILLED)
        assert filled.decode(filled(completion)["input_ids"], skip_special_tokens=True) == completion
        assert filled(problem)["input_ids"] == plain(problem)["input_ids"]


def test_filler_grows_in_the_first_steps_and_texts_stay_within_the_length():
    settings = LabSettings(steps=10, filler_ramp=0.5, max_length=64, mixture=replace(FILLED, filler_words=30))
    assert [settings.mixture_at(step).filler_words for step in (1, 5, 10)] == pytest.approx([6, 30, 30])
    assert replace(settings, filler_ramp=0.0).mixture_at(1) == settings.mixture
    ids, labels = _batch(random.Random(0), settings, build_tokenizer(64, FILLED.filler_tokens), 10)
    assert ids.shape == labels.shape == (64, 64)


def test_the_loss_is_the_weighted_mean():
    settings = LabSettings(hidden_size=64, layers=1, heads=2, batch_size=4, filler_weight=0.25, mixture=FILLED)
    tokenizer = build_tokenizer(256, FILLED.filler_tokens)
    model = build_model(settings, tokenizer, 0).double()
    ids, labels = _batch(random.Random(1), settings, tokenizer, settings.steps)
    logp = model(ids).logits[:, :-1].log_softmax(-1)
    total = weight = 0.0
    for row, targets in enumerate(labels[:, 1:]):
        for position, token in enumerate(targets.tolist()):
            if token != -100:
                w = 0.25 if token >= 405 else 1.0
                total, weight = total - w * logp[row, position, token].item(), weight + w
    assert weight % 1 > 0  # there are words among them
    found = _loss(model, ids, labels, _weights(settings, tokenizer).double())
    assert found.item() == pytest.approx(total / weight, rel=1e-12)
    assert _weights(LabSettings(), tokenizer) is None
    torch.testing.assert_close(
        _loss(model, ids, labels, None), _loss(model, ids, labels, torch.ones(len(tokenizer)).double())
    )


def test_a_policy_with_filler_knows_the_words(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "layers": 1, "heads": 2, "kv_heads": 1}
    folder = base_policy(0, tmp_path, LabSettings(**sizes, steps=1, batch_size=2, mixture=FILLED))
    assert FILLED.filler_tokens[0] in (folder / "tokenizer.json").read_text()


# ------------------------------------------------------------------ settings


def test_scales_of_the_lab():
    assert set(SCALES) == {f"lab_{name}" for name in ("heavy", "light", "long", "more", "sharp", "wide", "words")}
    base = compose_recipe("capo_aggressive", [])
    for scale in SCALES:
        settings = compose_recipe("capo_aggressive", [f"scale={scale}"])
        run, args = build(settings)
        assert run.lab != LabSettings() or run.data.variant != "base", scale
        assert run.lab.hidden_size // run.lab.heads >= 32, scale  # vLLM on a CPU
        assert run.lab.max_length >= args.max_completion_length + 64, scale
        for name in ("learning_rate", "completions_per_step", "capo", "evaluation"):
            assert settings[name] == base[name], (scale, name)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lab.hiden_size=64", "did you mean lab.hidden_size?"),
        ("lab.mixture.filler_word=3", "did you mean lab.mixture.filler_words?"),
        ("lab.hidden_size=abc", "lab.hidden_size must be a whole number"),
        ("lab.mixture.filler_words=abc", "lab.mixture.filler_words must be a number"),
        ("lab=5", "lab is a group of settings"),
        ("lab.mixture=5", "lab.mixture is a group of settings"),
        ("lab.hidden_size=130", "lab.hidden_size must be a multiple of 2 x heads"),
        ("lab.kv_heads=3", "lab.heads must be a multiple of kv_heads"),
        ("lab.steps=0", "lab.steps must be at least 1"),
        ("lab.max_length=8", "lab.max_length must be at least 64"),
        ("lab.head_balance=0", "lab.head_balance must be greater than 0"),
        ("lab.filler_ramp=2", "lab.filler_ramp is a share"),
        ("lab.filler_weight=-1", "lab.filler_weight is a share"),
        ("lab.mixture.filler_words=-1", "lab.mixture.filler_words must be at least 0"),
        ("lab.mixture.filler_vocabulary=5000", "lab.mixture.filler_vocabulary must be from 1 to 4900"),
        ("lab.mixture.filler_exponent=-1", "lab.mixture.filler_exponent must be from 0 to 10"),
        ("lab.mixture.worked=0.8", "lab.mixture.worked and direct are shares of one whole"),
        ("lab.mixture.slip=2", "lab.mixture.slip is a share"),
        ("data.variant=minus", "data.variant must be one of base, fewer_terms"),
    ],
)
def test_bad_settings(override, message):
    with pytest.raises(ConfigError, match=message):
        build(compose_recipe("capo_aggressive", [override]))


def test_settings_that_another_policy_does_not_read_are_refused():
    with pytest.raises(ConfigError, match="lab.steps has no effect with model_name_or_path=models/x: set that to lab"):
        build(compose_recipe("capo_aggressive", ["lab.steps=2", "model_name_or_path=models/x"]))
    with pytest.raises(ConfigError, match=r"data.variant has no effect with data.path=x.jsonl"):
        compose_recipe("capo_aggressive", ["data.path=x.jsonl", "data.variant=story"])


def test_the_training_problems_are_of_the_variant(tiny_tokenizer):
    run, _ = build(compose_recipe("capo_aggressive", ["scale=lab_more", "data.problems=5"]))
    rows = load_dataset(run, tiny_tokenizer, 3)
    wanted = task.problems("train", 5, seed=3, variant="more_terms")
    assert [row["prompt"][-1]["content"] for row in rows] == [row["problem"] for row in wanted]
    assert all(row["problem"].count("+") == 5 for row in wanted)
