"""lighteval's command line, for a model server of one's own and without a network.

    .venv-eval/bin/python eval/lighteval_offline.py endpoint litellm MODEL.yaml TASKS --custom-tasks eval/tasks.py

Five differences from `lighteval` itself (0.13.0):
1. Its own tasks are not imported: that takes half a minute, and one of them downloads a file.
2. An answer that is empty stays an answer. lighteval asks for it again, and if the first of several answers to a
   problem is still empty, it drops the others.
3. A prompt that leaves less room than the wanted number of tokens gets the room that there is, instead of an error.
4. Answers are kept in answers.jsonl of the working folder, one line a request, and an equal request is not sent again.
   litellm's own cache would need packages that it does not declare, and lighteval's knows neither prompts nor data.
5. Each request has a seed of its own, made of CAPO_EVAL_SEED and the prompt. One seed for all would draw the same
   random numbers for every problem, so that the problems' errors are correlated and all standard errors too small.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

EMPTY = " "  # scores as an empty answer does
NOT_IDENTITY = ("base_url", "api_key", "timeout", "caching")  # the port differs from server to server


class Answers:
    """The answers of earlier requests; a folder belongs to one model and one way of sampling.

    Args:
        path: the file; a last line that was cut off is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self._known: dict[str, list[str]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            self._known[row["key"]] = row["texts"]

    @staticmethod
    def key(request: dict) -> str:
        """A hash of all that decides the answers to a request (the arguments of litellm.completion)."""
        facts = {name: value for name, value in request.items() if name not in NOT_IDENTITY}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def get(self, key: str) -> list[str] | None:
        """The answers to a request; None if it was not answered before."""
        return self._known.get(key)

    def put(self, key: str, texts: list[str]) -> None:
        """Keep the answers to a request."""
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            self._known[key] = texts
            file.write(json.dumps({"key": key, "texts": texts}) + "\n")


def prompt_seed(seed: int, messages: list[dict]) -> int:
    """The seed of one request, below 2³¹, from the evaluation's seed and the prompt."""
    return int(hashlib.sha256(json.dumps([seed, messages]).encode()).hexdigest()[:8], 16) >> 1


def answering(litellm: object, completion: Callable, answers: Answers, seed: int = 0) -> Callable:
    """Wrap litellm's completion function with differences 2 to 5.

    Args:
        litellm: the module.
        completion: its function.
        answers: those of earlier requests.
        seed: of the evaluation.

    Returns:
        A function with the same arguments and result.
    """

    def ask(**request: object) -> object:
        request |= {"caching": False, "seed": prompt_seed(seed, request["messages"])}
        key = Answers.key(request)
        texts = answers.get(key)
        if texts is None:
            try:
                response = completion(**request)
            except litellm.BadRequestError as error:
                if "context length" not in str(error) and "max_tokens" not in str(error):
                    raise
                response = completion(**{**request, "max_tokens": None, "max_completion_tokens": None})
            texts = [choice.message.content or "" for choice in response.choices]
            answers.put(key, texts)
        messages = [{"role": "assistant", "content": text or EMPTY} for text in texts]
        return litellm.ModelResponse(choices=[{"index": i, "message": message} for i, message in enumerate(messages)])

    return ask


def main() -> None:
    """Run lighteval with the arguments of the command line."""
    import torch
    from lighteval.__main__ import app
    from lighteval.tasks.registry import Registry

    Registry._load_from_files = staticmethod(lambda *_: {})
    Registry._load_from_subdirs = staticmethod(lambda *_: {})
    seed = int(os.environ.get("CAPO_EVAL_SEED", "0"))
    torch.manual_seed(seed)
    if "litellm" in sys.argv:
        import litellm

        litellm.completion = answering(litellm, litellm.completion, Answers(Path("answers.jsonl")), seed)
    app()


if __name__ == "__main__":
    main()
