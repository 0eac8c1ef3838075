"""One or several vLLM servers on CPUs, which read each step's weights from a folder that they share with the trainer.

A server is vLLM's own OpenAI-compatible one with its development endpoints on (`make serve`): weights go in by
`POST /collective_rpc` (reload_weights), completions come from `POST /v1/completions`, as token ids with their
log-probabilities.
"""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

from open_r1_capo.cluster.vllm import DIRECT, answers
from open_r1_capo.training.generation.backend import (
    WAITS,
    Backend,
    Completion,
    GenerationError,
    Sampling,
    Unavailable,
    retry,
)

AT_ONCE = 64  # requests to one server; it batches them itself
CALL_SECONDS = 1800.0  # of one request: a long completion of a large model on a busy CPU


class _NotFound(Unavailable):
    """A server has no such address, or (after a restart) no model of that name."""


class VLLMServers(Backend):
    """vLLM servers that somebody else started with `model`; `start` waits `timeout` seconds for them."""

    shared = True

    def __init__(self, urls: Sequence[str], model: str, timeout: float, sleep: Callable[[float], None] = time.sleep):
        self.urls, self.model, self.timeout, self.sleep = [url.rstrip("/") for url in urls], model, timeout, sleep
        self.names: dict[str, str] = {}
        self.instances: dict[str, str] = {}  # which start of each server was given the weights
        self.weights: Path | None = None

    def start(self) -> None:
        """Wait for every server; raises GenerationError if one is not there in time, or serves another model."""
        deadline = time.monotonic() + self.timeout
        for url in self.urls:
            while not answers(f"{url}/health"):
                if time.monotonic() > deadline:
                    raise GenerationError(
                        f"no vLLM server answers at {url} after {self.timeout:.0f} s: start one with make serve "
                        f"MODEL={self.model}, or set vllm_server_base_url"
                    )
                self.sleep(min(1.0, self.timeout / 10))
            self.names[url] = self._name(url)

    def sync(self, folder: Path) -> None:
        """As `Backend.sync`, for every server; `folder` must be on a disk that they see under the same path."""
        self.weights = folder.resolve()
        self._each([(url, lambda url=url: self._reload(url)) for url in self.urls])

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """As `Backend.generate`, equal neighbours in one request."""
        requests, first = [], 0
        for prompt, equal in groupby(prompts):
            count = len(list(equal))
            body = {"prompt": prompt, "n": count, "seed": seed + first, "return_token_ids": True, **sampling.request()}
            url = self.urls[len(requests) % len(self.urls)]
            requests.append((url, lambda url=url, body=body: self._complete(url, body)))
            first += count
        for _ in WAITS:
            before = dict(self.instances)
            answers = self._each(requests)
            if self._each([(url, lambda url=url: self._instance(url)) for url in before]) == list(before.values()):
                return [completion for answer in answers for completion in answer]
            self.sync(self.weights)  # a server that was started again answered some requests with the base weights
        raise GenerationError("the vLLM servers lose the weights again and again: they are being restarted")

    def close(self) -> None:
        """Nothing: the servers belong to whoever started them."""

    def _each(self, calls: list[tuple[str, Callable[[], Any]]]) -> list[Any]:
        """Make calls side by side, each as often as it takes; their results in order."""
        with ThreadPoolExecutor(min(len(calls), AT_ONCE * len(self.urls)) or 1) as pool:
            return list(pool.map(lambda call: self._patiently(*call), calls))

    def _patiently(self, url: str, action: Callable[[], Any]) -> Any:
        try:
            return retry(action, lambda: self._recover(url), sleep=self.sleep)
        except Unavailable as error:
            raise GenerationError(f"the vLLM server at {url} is gone ({error})") from None

    def _recover(self, url: str) -> None:
        """Give a server the step's weights before it is asked again: if it was restarted, it has the base weights."""
        if not answers(f"{url}/health"):
            raise Unavailable("it does not answer")
        self.names[url] = self._name(url)
        if self.weights:
            self._reload(url)

    def _name(self, url: str) -> str:
        """The name under which a server serves the model."""
        (card, *_) = self._call(url, "/v1/models")["data"]
        there = card.get("root") or card["id"]
        cached = f"models--{self.model.replace('/', '--')}"  # a hub id's folder in the hub's cache
        if Path(there).resolve() != Path(self.model).resolve() and cached not in Path(there).parts:
            raise GenerationError(
                f"the vLLM server at {url} serves {there}, not {self.model}: stop it and run make serve "
                f"MODEL={self.model}"
            )
        return card["id"]

    def _instance(self, url: str) -> str:
        """What tells one start of a server from the next."""
        return self._call(url, "/server_info?config_format=json")["vllm_config"]["instance_id"]

    def _reload(self, url: str) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(self.weights)}}
        try:
            self.instances[url] = self._instance(url)  # before the weights: a restart in between shows afterwards
            self._call(url, "/collective_rpc", body)
        except _NotFound:
            raise GenerationError(
                f"the vLLM server at {url} takes no new weights: start it with make serve, which sets "
                "VLLM_SERVER_DEV_MODE=1"
            ) from None
        self._call(url, "/reset_prefix_cache", {})  # what it holds was computed with the old weights

    def _complete(self, url: str, body: dict[str, Any]) -> list[Completion]:
        answer = self._call(url, "/v1/completions", {"model": self.names[url], **body})
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != body["n"]:
            raise Unavailable(f"it returned {len(choices)} completions where {body['n']} were asked for")
        return [_completion(choice) for choice in choices]

    def _call(self, url: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET or, with a body, POST; the parsed answer, None if it is empty."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
        try:
            with DIRECT.open(request, timeout=CALL_SECONDS) as answer:
                text = answer.read()
                return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise _NotFound(f"it knows no {path}") from None
            said = " ".join(error.read().decode(errors="replace").split())[:300]
            if 400 <= error.code < 500:  # asking again would not help
                raise GenerationError(f"the vLLM server at {url} refuses a request: {said}") from None
            raise Unavailable(f"{path} failed with {error.code}: {said}") from None
        except (OSError, ValueError) as error:
            raise Unavailable(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from None


def _completion(choice: dict[str, Any]) -> Completion:
    logps = [math.nan if value is None else float(value) for value in choice["logprobs"]["token_logprobs"]]
    return Completion(list(choice["token_ids"]), logps)
