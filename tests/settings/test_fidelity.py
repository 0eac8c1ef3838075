"""`fidelity=paper`: one switch for everything in which the authors' runs differ and that can be set."""

import pytest

from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.settings.run import read
from open_r1_capo.settings.values import ConfigError
from open_r1_capo.tasks.data import DataError
from open_r1_capo.training.build import build

SCALE = "scale=qwen2.5-math-7b"
NO_GPU = {"needs_gpu": False, "bf16": False}


@pytest.fixture
def prompts(tmp_path):
    """The two overrides that name files, one with a line end after its text."""
    (tmp_path / "system.txt").write_text("Think.\n")
    (tmp_path / "user one.txt").write_text("Solve {problem}\n\nNow.")
    return [f"system_prompt=@{tmp_path}/system.txt", f"evaluation.prompt=@{tmp_path}/user one.txt"]


def test_ours_is_the_default_and_changes_nothing():
    chosen, default = (compose_recipe("capo_aggressive", [SCALE, *more]) for more in (["fidelity=ours"], []))
    assert chosen == default
    run, trl = read(default)
    assert (run.capo.hidden_states, run.data.long_prompts, run.reward_funcs) == ("aligned", "leave_out", ["accuracy"])
    assert (run.evaluation.prompt, run.evaluation.max_length) == (None, None)
    assert (trl["temperature"], trl["generation_kwargs"], trl["use_vllm"], trl["max_steps"]) == (0.9, None, True, 100)


@pytest.mark.parametrize(
    ("recipe", "completions", "steps", "warmup"),
    [("grpo_conservative", 1152, 52, 6), ("capo_aggressive", 96, 100, 10)],
)
def test_paper_is_what_the_authors_ran(prompts, recipe, completions, steps, warmup):
    run, args = build(compose_recipe(recipe, [SCALE, "fidelity=paper", *prompts]) | NO_GPU)
    assert (run.completions_per_step, args.max_steps, args.get_warmup_steps(steps)) == (completions, steps, warmup)
    assert (args.temperature, args.generation_kwargs, args.top_k, args.use_vllm) == (
        1.0,
        {"temperature": 0.9},
        50,
        False,
    )
    assert (run.capo.hidden_states, run.data.long_prompts, run.data.max_prompt_tokens) == ("one_late", "cut_left", 512)
    assert run.reward_funcs == ["strict_accuracy"]
    assert run.system_prompt == "Think."
    assert (run.evaluation.prompt, run.evaluation.max_length) == ("Solve {problem}\n\nNow.", 4096)


def test_what_is_set_beside_it_has_the_last_word(prompts):
    overrides = [SCALE, "fidelity=paper", "generation=vllm_colocate", "max_steps=9", "capo.hidden_states=aligned"]
    run, trl = read(compose_recipe("capo_aggressive", [*overrides, *prompts, "generation_kwargs.temperature=0.7"]))
    assert (trl["use_vllm"], trl["max_steps"], run.capo.hidden_states) == (True, 9, "aligned")
    assert trl["generation_kwargs"] == {"temperature": 0.7}


def test_the_authors_prompts_have_to_be_given(prompts):
    for given, missing in (
        ([], r"system_prompt=@<file> and evaluation\.prompt=@<file> \("),
        (prompts[:1], r"set evaluation\.prompt=@<file> \("),
        (prompts[1:], r"set system_prompt=@<file> \("),
    ):
        with pytest.raises(ConfigError, match=missing):
            read(compose_recipe("capo_aggressive", [SCALE, "fidelity=paper", *given]))
    read(compose_recipe("capo_aggressive", ["fidelity=paper"]))  # the lab has none


def test_a_prompt_that_cannot_be_used_is_one_sentence(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name, reason in (("nowhere", "No such file"), ("latin", "it is not UTF-8 text")):
        with pytest.raises(DataError, match=f"the prompt in .*{name} cannot be read .{reason}"):
            compose_recipe("capo_aggressive", [f"system_prompt=@{tmp_path}/{name}"])
    with pytest.raises(
        ConfigError, match=r"evaluation\.prompt must hold \{problem\} where the problem goes, got 'Solve'"
    ):
        read(compose_recipe("capo_aggressive", ["evaluation.prompt=Solve"]))
    with pytest.raises(ConfigError, match="hidden_states must be one of aligned, one_late"):
        read(compose_recipe("capo_aggressive", ["capo.hidden_states=late"]))
    with pytest.raises(ConfigError, match="share_prompts=true leaves out"):
        read(compose_recipe("capo_aggressive", ["capo.hidden_states=one_late", "share_prompts=true"]))
    with pytest.raises(ConfigError, match=r"data\.long_prompts must be leave_out or cut_left"):
        read(compose_recipe("capo_aggressive", ["data.long_prompts=cut"]))
