"""lighteval's command line, made fit for an evaluation server of one's own.

    .venv-eval/bin/python eval/lighteval_offline.py endpoint litellm MODEL.yaml TASKS --custom-tasks eval/tasks.py

Three differences to `lighteval` itself (0.13.0):
1. Its own tasks are not imported: that takes half a minute, and one of them downloads a file.
2. An answer that is empty stays an answer. lighteval asks for it again, and if the first of several answers to a
   problem is still empty, it drops the others.
3. A prompt that leaves less room than the wanted number of tokens gets the room that there is, instead of an error.
"""

from __future__ import annotations

import os
import sys

import torch
from lighteval.__main__ import app
from lighteval.tasks.registry import Registry

EMPTY = " "  # scores as an empty answer does


def answering(completion: object) -> object:
    """Wrap litellm's completion function with differences 2 and 3.

    Args:
        completion: litellm.completion.

    Returns:
        A function with the same arguments and result.
    """

    def ask(**request: object) -> object:
        import litellm

        try:
            response = completion(**request)
        except litellm.BadRequestError as error:
            if "context length" not in str(error) and "max_tokens" not in str(error):
                raise
            response = completion(**{**request, "max_tokens": None, "max_completion_tokens": None})
        for choice in response.choices:
            choice.message.content = choice.message.content or EMPTY
        return response

    return ask


def main() -> None:
    """Run lighteval with the arguments of the command line."""
    Registry._load_from_files = staticmethod(lambda *_: {})
    Registry._load_from_subdirs = staticmethod(lambda *_: {})
    torch.manual_seed(int(os.environ.get("CAPO_EVAL_SEED", "0")))
    if "litellm" in sys.argv:
        import litellm

        litellm.completion = answering(litellm.completion)
    app()


if __name__ == "__main__":
    main()
