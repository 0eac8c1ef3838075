"""Prompts computed once: log-probabilities, gradients, measurements and completions are those of sequences alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

import tiny_trainer
from open_r1_capo.training.features import completion_hidden_states
from open_r1_capo.training.packing import IGNORE, check_packing, pack
from open_r1_capo.training.shared_generation import SharedGeneration

T = 4  # completion tokens at most
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7]]
COMPLETIONS = [[1, 2, 3, 4], [2], [3, 3], [], [4, 2, 9]]


@pytest.fixture(scope="module")
def llama():
    """SmolLM2's architecture, tiny: grouped heads, a head tied to the embeddings."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 16}
    config = LlamaConfig(
        **sizes, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0
    )
    config.initializer_range = 0.5
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture
def batch():
    width = max(map(len, PROMPTS))
    rows = [[0] * (width - len(p)) + p + c + [0] * (T - len(c)) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    keep = [
        [0] * (width - len(p)) + [1] * (len(p) + len(c)) + [0] * (T - len(c))
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    return torch.tensor(rows), torch.tensor(keep)


def alone(model, prompt, completion):
    """The log-probabilities of a completion, from the sequence by itself."""
    ids = torch.tensor([prompt + completion])
    logps = model(input_ids=ids).logits[0].log_softmax(1)
    return logps[range(len(prompt) - 1, ids.shape[1] - 1), completion]


def packed_logps(model, packed):
    logits = model(**packed.rows(0, len(packed.input_ids))).logits.log_softmax(2)
    return packed.unpack(logits.gather(2, packed.labels.clamp(min=0)[..., None])[..., 0])


def test_log_probs_and_gradients_are_those_of_each_sequence_alone(llama, batch):
    packed = pack(*batch, T)
    found = packed_logps(llama, packed)
    wanted = torch.zeros_like(found)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        if completion:
            wanted[row, : len(completion)] = alone(llama, prompt, completion)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    weights = torch.randn(found.shape, dtype=torch.float64)
    parameters = list(llama.parameters())
    gradients = [torch.autograd.grad((x * weights).sum(), parameters, retain_graph=True) for x in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # the norms compute in float32


def test_no_prompt_is_repeated_and_no_completion_padded(batch):
    packed = pack(*batch, T)
    assert packed.input_ids.shape == (2, 2 + 4 + 2 + 3)  # a prompt without its last token, and its completions
    assert int((packed.labels != IGNORE).sum()) == sum(map(len, COMPLETIONS)) == int(packed.mask.sum())


def test_a_measurement_sees_the_same_hidden_states(llama, batch):
    ids, attention = batch
    mask = attention[:, -T:].bool()
    wanted = completion_hidden_states(llama, ids, attention, mask)
    found = completion_hidden_states(llama, ids, attention, mask, share_prompts=True)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)  # the norms compute in float32


def test_greedy_completions_are_those_of_plain_generate(llama):
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=[3, 1], pad_token_id=0)
    found = SharedGeneration(llama, bf16=False).generate(PROMPTS, config)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        ids = llama.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        end = next((i + 1 for i, token in enumerate(ids) if token in (3, 1)), len(ids))
        assert completion == ids[:end]


def test_a_sampler_in_bfloat16_follows_the_policy(llama):
    policy = AutoModelForCausalLM.from_config(llama.config, dtype=torch.float32)
    sampler = SharedGeneration(policy, bf16=True)
    config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        policy.load_state_dict(llama.state_dict())
        sampler.generate(PROMPTS, config)
    for ours, theirs in zip(sampler.model.parameters(), policy.parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs.bfloat16())
    assert sampler.model.lm_head.weight is sampler.model.model.embed_tokens.weight


@pytest.mark.parametrize("capo", [{"mode": "off"}, {"mode": "observe"}])
def test_a_training_run_is_the_unshared_one(tiny_policy, tiny_tokenizer, tmp_path, capo):
    """The first step, before rounding can change what is drawn."""
    steps = []
    for share in (False, True):
        how = {"max_steps": 1, "learning_rate": 1e-3, "share_prompts": share}
        trainer = tiny_trainer.build(tiny_policy, tiny_tokenizer, tmp_path, capo, **how)
        trainer.train()
        steps.append((tiny_trainer.history(trainer)[0], tiny_trainer.parameters(trainer)))
    (plain, theirs), (shared, ours) = steps
    assert shared["grad_norm"] > 1e-3
    measured = [name for name in plain if name.startswith("capo/")]
    assert ("capo/measured_kl" in measured) == (capo["mode"] != "off")
    for name in ("loss", "reward", "entropy", "grad_norm", *measured):
        assert shared[name] == pytest.approx(plain[name], rel=1e-2, abs=1e-6), name
    # Adam's first step is the gradient's sign: where that is nearly zero, rounding decides it
    assert (ours - theirs).abs().gt(1e-4).double().mean() < 0.02


def test_a_model_with_other_attention_is_refused(llama):
    other = LlamaForCausalLM(llama.config)
    other.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="share_prompts=false"):
        check_packing(other)
