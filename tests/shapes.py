"""Models and workloads of a known shape, shared by the tests of `capacity`."""

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from open_r1_capo.capacity.shapes import ModelShape
from open_r1_capo.capacity.workload import Machines, read
from open_r1_capo.settings.recipes import compose_recipe

TINY = ModelShape("tiny", layers=2, hidden=64, intermediate=160, heads=4, kv_heads=2, head_dim=16, vocabulary=96)


def config(shape, kind=Qwen2Config):
    return kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )


def workload(recipe, *overrides, **machines):
    """A recipe's workload, of the 7B scale unless an override says otherwise."""
    return read(compose_recipe(recipe, ["scale=qwen2.5-math-7b", *overrides]), Machines(**machines))


def model(shape, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(shape), dtype=dtype)


def padded(rows=3, length=12):
    """A batch with padding, as TRL makes it: with a mask, sdpa takes no grouped heads."""
    ids, mask = torch.randint(5, 90, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}
