r"""The lab policy's tokenizer: whole words, the numbers 0 to 99, ``\boxed{``, and every byte.

It is a `Qwen2Tokenizer`, because transformers gives this class to every Qwen2 model whatever its files say. That class
splits words and digits in its own way, so the words and numbers are added tokens, which are found before it splits
(leftmost first, then longest); all else goes byte by byte. Decoding gives back any text that was encoded.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from tokenizers import AddedToken, pre_tokenizers
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from open_r1_capo.tasks.lab import task

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"

# A system message is left out on purpose: the policy is trained on prompts of a dozen tokens.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    f"{{%- if message['role'] == 'user' -%}}{{{{- '{USER}' + message['content'] -}}}}"
    f"{{%- elif message['role'] == 'assistant' -%}}{{{{- '{ASSISTANT}' + message['content'] + '{END}' -}}}}"
    "{%- endif -%}{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{- '{ASSISTANT}' -}}}}{{%- endif -%}}"
)


def vocabulary() -> list[str]:
    r"""The words of the task's texts (with the space before), ``", "``, ``\boxed{``, 10 to 99; one token each."""
    rng = random.Random(0)
    texts = [*task.OPENINGS, *task.RAMBLES, *(" " + text for text in task.RAMBLES)]
    texts += [variant.wording(variant.terms(rng)) for variant in task.VARIANTS.values()]
    words = {word for text in texts for word in re.findall(r", | ?[A-Za-z]+", text) if len(word) > 1}
    return [*sorted(words), r"\boxed{", *map(str, range(10, 100))]


def build_tokenizer(model_max_length: int, filler: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Build the tokenizer: chat template, padding on the left, and after all other tokens one for each filler word."""
    tokenizer = Qwen2Tokenizer(
        vocab={byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
        merges=[],
        pad_token=PAD,
        eos_token=END,
        unk_token=PAD,  # no byte is unknown
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in [*vocabulary(), *filler]])
    return tokenizer
