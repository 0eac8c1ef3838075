"""What CAPO reads of a causal language model: its hidden states and its policy on a small support.

The only file that knows a model's inside. The LM head is fused into TRL's loss and never called as a module, so
the hidden states are taken from the backbone's output, at the positions whose logits predict the completion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.trainer.utils import maybe_gather_lm_head_ctx

from open_r1_capo.budget.kl import has_dropout
from open_r1_capo.capo.curvature import VocabularySums
from open_r1_capo.training.packing import pack

LOGITS_BYTES = 64 * 2**20  # bound of one chunk's float32 logits; two or three of that size live at once
SCALED_HEADS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
UNKNOWN_TO_TRL = ("logits_soft_cap", "output_logit_soft_cap")  # caps that its fused loss leaves out
PROBE = 4  # tokens of the pass that compares a model's logits with its head's
ROUNDING = 0.02  # of the largest logit; bfloat16 keeps three digits


@dataclass(frozen=True)
class Support:
    """The policy of N tokens on its K most likely ids and the sampled one.

    Attributes:
        token_ids: (N, K) int64; a slot without an id repeats the action and has probability 0.
        probs: (N, K) float32, renormalised over the support; 0 on empty slots.
        action_index: (N,) int64, column of the sampled token.
        log_mass: (N,) float32, log of the full policy's probability of the support (0 if it is the vocabulary).
        sums: over the full vocabulary, for the SGD model's closed form; None unless asked for.
    """

    token_ids: Tensor
    probs: Tensor
    action_index: Tensor
    log_mass: Tensor
    sums: VocabularySums | None = None


def check_head(model: PreTrainedModel) -> None:
    """Refuse models whose logits are not W h (+ b): the last-layer model would be another function.

    Known names are asked for, and a pass of a few tokens is compared, where the weights are whole.

    Raises:
        ValueError: the model changes its logits after the head, or reads another hidden state than its last.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    for setting in (*SCALED_HEADS, *UNKNOWN_TO_TRL):
        value = getattr(config, setting, None)
        if value in (None, 1.0):
            continue
        if setting in UNKNOWN_TO_TRL:
            raise ValueError(f"{name} caps its logits ({setting}={value}), which TRL's loss does not: choose another")
        raise ValueError(
            f"{name} changes its logits after the LM head ({setting}={value}), but CAPO's last-layer model needs "
            "plain logits W h; train it with capo.mode=off"
        )
    if not any(p.is_meta or hasattr(p, "ds_id") or isinstance(p, DTensor) for p in model.parameters()):
        _compare_logits(model)


@torch.no_grad()
def _compare_logits(model: PreTrainedModel) -> None:
    """Raise ValueError if the model's logits are not those of its head on what `captured_hidden_states` finds."""
    training = model.training
    model.eval()
    try:
        ids = torch.arange(PROBE, device=model.device)[None]
        with captured_hidden_states(model) as captured:
            theirs = model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        model.train(training)
    ours = [logits for _, logits in _logit_chunks(model, captured[0][0], 1.0)] if captured else []
    if not ours or (torch.cat(ours) - theirs).abs().max() > ROUNDING * theirs.abs().max():
        raise ValueError(
            f"the logits of {type(model).__name__} are not those of its LM head on its last hidden state, which CAPO "
            "and TRL's loss both take them for: choose another model"
        )


def stop_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0: TRL's `disable_dropout` leaves those that a model applies as a function."""
    for owner in [*model.modules(), model.config]:
        for key, value in list(vars(owner).items()):
            if "dropout" in key and isinstance(value, float):
                setattr(owner, key, 0.0)
        if isinstance(owner, torch.nn.Dropout):
            owner.p = 0.0


def frozen(model: PreTrainedModel) -> bool:
    """Whether the LM head is not trained, as under LoRA."""
    return not model.get_output_embeddings().weight.requires_grad


def head_input(model: PreTrainedModel, hidden: Tensor, temperature: float) -> Tensor:
    """The features x of hidden states (N, D): h/τ, and for a head with a bias one more column 1/τ, as [W b] x."""
    bias = model.get_output_embeddings().bias
    x = hidden if bias is None else torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)
    return x / temperature


def head_output(x: Tensor, temperature: float, width: int) -> Tensor:
    """(N, D), of features (N, D or D + 1) the hidden states that they were made of."""
    return x[:, :width] * temperature


def check_dropout(model: torch.nn.Module, what: str = "a KL budget") -> None:
    """Refuse a model whose log-probabilities differ from one pass to the next (ValueError); `what` measures them."""
    if has_dropout(model):
        raise ValueError(
            f"{what} measures the policy of the backward pass, which dropout makes a random one: set "
            "disable_dropout=True (and lora_dropout=0)"
        )


@contextmanager
def captured_hidden_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect what the LM head reads: each forward's last hidden state (B, L, D), detached, in a list that is yielded.

    The model comes without wrappers. Its backbone is `base_model`; OPT's own forward calls the decoder in it directly.
    """
    captured: list[Tensor] = []

    def keep(module, args, output):
        captured.append(output.last_hidden_state.detach())

    backbone = getattr(model.base_model, "decoder", model.base_model)
    handle = backbone.register_forward_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()


@torch.no_grad()
def completion_hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, share_prompts: bool = False
) -> Tensor:
    """(M, D), by one more forward pass: the hidden states that predict the M completion tokens in `mask`.

    `input_ids` and `attention_mask` are (B, L), prompt and completion; `mask` (B, T) bool is of the last T positions.
    """
    packed = pack(input_ids, attention_mask, mask.shape[1]) if share_prompts else None
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if packed:
        inputs = packed.rows(0, len(packed.input_ids))
    with captured_hidden_states(model) as captured:  # FSDP knows the end of a pass by the whole model's
        model(**inputs, use_cache=False, logits_to_keep=1)
    reshard(model)
    return packed.predicting(captured[0], mask) if packed else predicting(captured[0], mask)


def reshard(model: PreTrainedModel) -> None:
    """Let FSDP put the last norm and the head back into shards, which it keeps whole until a backward pass.

    Otherwise `zero_grad` does not find the gradients of their shards, and the next step's are added to them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def predicting(hidden: Tensor, mask: Tensor) -> Tensor:
    """(N, D), of hidden states (B, L, D) those at the positions that predict the last T tokens in `mask` (B, T)."""
    return hidden[:, -mask.shape[1] - 1 : -1][mask]


def one_late(hidden: Tensor, mask: Tensor) -> Tensor:
    """(N, D), as `predicting`, but each token's own hidden state, which predicts the token after it."""
    return hidden[:, -mask.shape[1] :][mask]


@torch.no_grad()
def policy_support(
    model: PreTrainedModel, hidden: Tensor, actions: Tensor, temperature: float, top_k: int, with_sums: bool = False
) -> Support:
    """The policy on its top k and the sampled token, without ever holding all N×V logits.

    `hidden` is (N, D), from `predicting`; `actions` (N,) int64 are the sampled tokens; `temperature` τ divides the
    logits; K is `top_k` + 1, or V if that covers the vocabulary; `with_sums` adds those of the SGD model. The head's
    shards are gathered.
    """
    parts = [
        _chunk_support(logits, actions[part], top_k, with_sums)
        for part, logits in _logit_chunks(model, hidden, temperature)
    ]
    if not parts:  # no completion token at all
        return _chunk_support(
            hidden.new_zeros(0, model.config.get_text_config().vocab_size), actions, top_k, with_sums
        )
    sums = (
        VocabularySums(*(torch.cat(x) for x in zip(*(vars(p.sums).values() for p in parts), strict=True)))
        if with_sums
        else None
    )
    ids, probs, index, mass = (
        torch.cat([getattr(p, name) for p in parts]) for name in ("token_ids", "probs", "action_index", "log_mass")
    )
    return Support(ids, probs, index, mass, sums)


@torch.no_grad()
def support_log_probs(model: PreTrainedModel, hidden: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """(N, K) float32, the full policy's log-probabilities at `token_ids` (N, K), from hidden states (N, D)."""
    out = torch.empty(token_ids.shape, dtype=torch.float32, device=hidden.device)
    for part, logits in _logit_chunks(model, hidden, temperature):
        out[part] = logits.gather(1, token_ids[part]) - logits.logsumexp(1, keepdim=True)
    return out


def _logit_chunks(model: PreTrainedModel, hidden: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    with _gathered_head(model, hidden.dtype) as (weight, bias):
        size = max(1, LOGITS_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(hidden), size):
            part = slice(start, min(start + size, len(hidden)))
            logits = _wide_product(hidden[part], weight)
            logits = logits if bias is None else logits.add_(bias)
            yield part, logits.float().div_(temperature)


def _wide_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """The logits (N, V) of (N, D) and (V, D), in float32 at least: rounded to bfloat16, they would hide small KLs."""
    if weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):  # a product that other devices lack
        return torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.mm(hidden.to(wide), weight.to(wide).T)


@contextmanager
def _gathered_head(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The LM head's weight (V, D) and bias, whole; every rank must enter, also one without a single token."""
    head = model.get_output_embeddings()
    if isinstance(head.weight, DTensor):  # FSDP computes in the hidden states' dtype, whatever that of its shards
        yield tuple(None if x is None else x.detach().to(dtype).full_tensor() for x in (head.weight, head.bias))
        return
    with maybe_gather_lm_head_ctx(head.weight, head.bias):  # ZeRO-3
        yield head.weight, head.bias


def _chunk_support(logits: Tensor, actions: Tensor, top_k: int, with_sums: bool) -> Support:
    normaliser = logits.logsumexp(1)
    sums = VocabularySums.of((logits - normaliser[:, None]).exp(), actions) if with_sums else None
    if top_k >= logits.shape[1]:
        ids = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        return Support(ids, logits.softmax(1), actions, torch.zeros_like(normaliser), sums)
    values, ids = logits.topk(top_k, dim=1)
    hit = ids == actions[:, None]
    inside = hit.any(1)
    # the last slot holds an action outside the top k; otherwise it is empty
    extra = logits.gather(1, actions[:, None]).masked_fill(inside[:, None], -torch.inf)
    values, ids = torch.cat([values, extra], 1), torch.cat([ids, actions[:, None]], 1)
    action_index = torch.where(inside, hit.int().argmax(1), top_k)
    return Support(ids, values.softmax(1), action_index, values.logsumexp(1) - normaliser, sums)
