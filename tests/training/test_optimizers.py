"""Optimizers of pytorch-optimizer in the trainer, and a rate that follows the length of completions."""

import pytest
import torch

from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.settings.run import ConfigError, read

pytest.importorskip("pytorch_optimizer")


def test_the_named_optimizer_takes_the_steps(build):
    trainer = build({"mode": "off"}, optimizer="prodigy", learning_rate=1.0)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    inner = trainer.optimizer.optimizer
    assert type(inner).__name__ == "Prodigy"
    assert inner.param_groups[0]["betas"] == (0.9, 0.999) and inner.param_groups[0]["lr"] == 1.0
    assert any(not torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=prodigy"], "optimizer=prodigy takes steps that CAPO does not model: use capo.mode=off"),
        (["optimizer=prodigy", "budget=target"], "does not model"),
    ],
)
def test_an_optimizer_that_is_not_modelled_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        read(compose_recipe("grpo_aggressive", overrides))


def test_an_unknown_optimizer_is_named_with_the_nearest(build):
    with pytest.raises(ValueError, match=r"no optimizer 'prodgy'; did you mean prodigy\?"):
        build({"mode": "off"}, optimizer="prodgy")


def test_a_rate_follows_the_length_of_completions(build):
    """A ratio that any fluctuation exceeds halves the rate; the state is in the checkpoint."""
    capo = {"mode": "observe", "step_rule": "length", "length_ratio": 1.0001}
    trainer = build(capo, max_steps=4, max_completion_length=12)
    lengths = iter([8.0, 4.0, 9.0, 9.0])
    trainer._mean_length = lambda: next(lengths)
    trainer.train()
    factors = [row["capo/step_scale"] for row in trainer.state.log_history if "capo/step_scale" in row]
    assert factors == [1.0, 1.0, 0.5, 0.5]
    numbers = trainer._state()[1]
    assert numbers["calibration"] == 0.5 and numbers["usual_length"] == pytest.approx(9.0)
