"""A tiny policy and the means to train it, shared by the tests."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def transformers_stays_whole():
    """Loading a model replaces its tying for a while; two threads that load at once can leave it replaced for good."""
    tying = PreTrainedModel.tie_weights
    yield
    found, PreTrainedModel.tie_weights = PreTrainedModel.tie_weights, tying  # one culprit, not all tests after it
    assert found is tying


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory) -> Path:
    """A random Qwen2 with the lab's tokenizer, saved as an ordinary folder."""
    from open_r1_capo.tasks.lab.pretrain import build_model
    from open_r1_capo.tasks.lab.settings import LabSettings
    from open_r1_capo.tasks.lab.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "policy"
    settings = LabSettings()
    tokenizer = build_tokenizer(64)
    build_model(settings, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_policy):
    return AutoTokenizer.from_pretrained(tiny_policy, padding_side="left")


@pytest.fixture(scope="session")
def lab_policy(tmp_path_factory) -> Path:
    """A lab policy after a few seconds of pretraining: one completion in twenty is right, enough for a reward."""
    from open_r1_capo.tasks.lab.policy import base_policy
    from open_r1_capo.tasks.lab.settings import LabSettings

    return base_policy(cache_dir=tmp_path_factory.mktemp("cache"), settings=LabSettings(steps=120, batch_size=32))


@pytest.fixture
def build(tiny_policy, tiny_tokenizer, tmp_path):
    """Build a trainer on the random policy: `build(capo, **changes)`, see `tiny_trainer.build`."""
    import tiny_trainer

    return lambda *args, **kwargs: tiny_trainer.build(tiny_policy, tiny_tokenizer, tmp_path, *args, **kwargs)
