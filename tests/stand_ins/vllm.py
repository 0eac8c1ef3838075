"""What the generation backends use of vLLM, on transformers: exact log-probabilities, one seed a completion."""

import json
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)


class SamplingParams:
    def __init__(self, seed, max_tokens, temperature, stop_token_ids, **others):
        self.seed, self.max_tokens, self.temperature, self.stop = seed, max_tokens, temperature, stop_token_ids


class LLM:
    def __init__(self, model, **others):
        print("loading", model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        weights = dict(kwargs["weights_iterator"]) if "weights_iterator" in kwargs else None
        weights = weights or load_file(kwargs["weights_path"] + "/model.safetensors")
        unknown = self.model.load_state_dict(weights, strict=False).unexpected_keys
        assert not unknown

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling_params, use_tqdm=False):
        rows = zip((p["prompt_token_ids"] for p in prompts), sampling_params, strict=True)
        for _, group in groupby(rows, key=lambda row: row[0]):
            for ids, logps in self._draw(*zip(*group, strict=True)):
                entries = [{i: SimpleNamespace(logprob=value)} for i, value in zip(ids, logps, strict=True)]
                yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=entries)])

    @torch.no_grad()
    def _draw(self, prompts, params):
        """Completions of equal prompts: inverse transform sampling with a generator each."""
        first, generators = params[0], [torch.Generator().manual_seed(one.seed) for one in params]
        ids, logps = torch.tensor(prompts), []
        for _ in range(first.max_tokens):
            law = (self.model(ids).logits[:, -1] / first.temperature).log_softmax(-1)
            drawn = torch.stack([torch.rand(1, generator=generator) for generator in generators])
            token = (law.exp().cumsum(-1) < drawn).sum(-1, keepdim=True).clamp(max=law.shape[1] - 1)
            logps.append(law.gather(1, token))
            ids = torch.cat([ids, token], 1)
        for tokens, values in zip(ids[:, len(prompts[0]) :].tolist(), torch.cat(logps, 1).tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in first.stop), len(tokens))
            yield tokens[:end], values[:end]


class Server:
    """vLLM's HTTP server in a thread; `broken` counts the completion requests that it will answer with an error."""

    def __init__(self, model, port=0, root=None, development=True):
        self.llm, self.broken, self.requests, self.lock = LLM(str(model)), 0, [], threading.Lock()
        self.root, self.development, self.instance = str(root or model), development, uuid.uuid4().hex
        handler = type("Handler", (_Handler,), {"server_state": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path, body):
        self.requests.append((path, body))
        if path == "/health":
            return 200, None
        if path == "/v1/models":
            return 200, {"data": [{"id": "policy", "root": self.root}]}
        if path == "/reset_prefix_cache":
            return 200, None
        if path == "/server_info?config_format=json" and self.development:
            return 200, {"vllm_config": {"instance_id": self.instance}}
        if path == "/collective_rpc" and self.development:
            return 200, self.llm.collective_rpc(body["method"], body["kwargs"])
        if path == "/v1/completions" and body["model"] == "policy":
            if self.broken:
                self.broken -= 1
                return 500, {"error": "the engine died"}
            return 200, {"choices": list(self._choices(body))}
        return 404, {"error": "not found"}

    def _choices(self, body):
        params = [SamplingParams(**{**body, "seed": body["seed"] + i}) for i in range(body["n"])]
        answers = self.llm.generate([{"prompt_token_ids": body["prompt"]}] * body["n"], params)
        for index, answer in enumerate(answers):
            (one,) = answer.outputs
            logps = [entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs, strict=True)]
            yield {"index": index, "token_ids": one.token_ids, "logprobs": {"token_logprobs": logps}}


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._reply(None)

    def do_POST(self):
        self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _reply(self, body):
        with self.server_state.lock:
            code, answer = self.server_state.answer(self.path, body)
        data = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    server = Server(sys.argv[1], int(sys.argv[2]))
    threading.Event().wait()
