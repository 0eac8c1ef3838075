"""Recipes compose, every key is checked, and the batch arithmetic holds."""

import math

import pytest
from omegaconf import OmegaConf

from open_r1_capo.capo.rules import RULES
from open_r1_capo.runs.folder import RunFolder
from open_r1_capo.settings.capo import capo_config
from open_r1_capo.settings.recipes import RECIPES, compose_recipe, known_recipes
from open_r1_capo.settings.run import policy_settings, read
from open_r1_capo.settings.values import ConfigError
from open_r1_capo.tasks.lab.settings import LabSettings, Mixture
from open_r1_capo.training.build import build

PAPER = {  # Table 4
    "capo_aggressive": (1e-4, 1e-2),
    "drcapo_aggressive": (1e-3, 5e-4),
    "reincapo_aggressive": (1e-5, 1e-1),
}
NO_GPU = {"needs_gpu": False, "bf16": False}  # bf16 asks for one too


RULE_FILES = sorted((RECIPES / "rule").glob("*.yaml"))
SCALES = sorted(path.stem for path in (RECIPES / "scale").glob("*.yaml"))
OWN_TABLES = [scale for scale in SCALES if not scale.startswith("lab_")]  # the lab's others change its policy alone


@pytest.mark.parametrize(
    ("recipe", "scale"),
    [(recipe, scale) for recipe in known_recipes() for scale in OWN_TABLES]
    + [("capo_planned", scale) for scale in SCALES if scale not in OWN_TABLES],
)
def test_every_recipe_composes_at_every_scale(recipe, scale):
    settings = compose_recipe(recipe, [f"scale={scale}"])
    own = {"model_name_or_path": "models/mine"} if scale == "own" else {}
    run, args = build(settings | NO_GPU | own)
    assert (run.recipe, run.scale) == (recipe, scale)
    assert args.generation_batch_size == run.completions_per_step
    assert settings["recipe"] == recipe


@pytest.mark.parametrize(
    ("scale", "choice", "expected"),
    [
        ("lab", None, {}),
        ("lab_words", None, {}),
        ("qwen2.5-math-1.5b", None, {"use_vllm": True, "vllm_mode": "colocate", "vllm_enable_sleep_mode": True}),
        ("qwen2.5-math-7b", "vllm_server", {"use_vllm": True, "vllm_mode": "server", "vllm_server_timeout": 1800}),
        ("qwen2.5-math-7b", "transformers", {}),
        ("lab", "vllm_server", {"use_vllm": True, "vllm_mode": "server", "vllm_server_timeout": 1800}),
    ],
)
def test_a_scale_has_its_generation_and_another_can_be_chosen(scale, choice, expected):
    settings = compose_recipe("capo_aggressive", [f"scale={scale}", *([f"generation={choice}"] if choice else [])])
    correction = {"vllm_importance_sampling_correction": False} if expected else {}
    assert {key: value for key, value in settings.items() if "vllm" in key} == expected | correction
    assert settings["generation"] == (choice or ("vllm_colocate" if "qwen" in scale else "transformers"))
    build(settings | NO_GPU)


def test_the_recipes():
    assert set(known_recipes()) == set(METHODS)


@pytest.mark.parametrize("size", ["1.5b", "7b"])
@pytest.mark.parametrize("recipe", PAPER)
def test_the_papers_settings(recipe, size):
    """Tables 2, 3 and 4."""
    settings = compose_recipe(recipe, [f"scale=qwen2.5-math-{size}"])
    run, args = build(settings | NO_GPU)
    assert (run.capo.rule.max_policy_shift, run.capo.rule.max_objective_shift) == PAPER[recipe]
    assert run.capo.rule.min_objective_shift is None
    assert (run.capo.optimizer_model, run.capo.top_k, run.capo.denominator) == ("adam", 50, "kept")
    assert (args.learning_rate, run.completions_per_step, args.max_steps, args.num_generations) == (1.5e-5, 96, 100, 8)
    assert (args.temperature, args.max_completion_length, args.warmup_steps, args.beta) == (0.9, 1024, 0.1, 0.0)
    conservative = compose_recipe("grpo_conservative", [f"scale=qwen2.5-math-{size}"])
    assert (conservative["learning_rate"], conservative["completions_per_step"]) == (3e-6, 1152)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rte=1", "no setting 'learning_rte'; did you mean learning_rate?"),
        ("capo.max_polcy_shift=1", "did you mean capo.max_policy_shift?"),
        ("data.pth=x", "did you mean data.path?"),
        ("xxyyzz=1", "neither a field of TRL's configuration nor ours"),
        ("scale=huge", "no scale 'huge'; there are lab, lab_heavy, .*, own, qwen2.5-math-1.5b, qwen2.5-math-7b"),
        ("capo.max_policy_shift=0", "max_policy_shift must be greater than 0"),
        ("capo.max_policy_shift=-1e-4", "max_policy_shift must be greater than 0"),
        ("capo.step_policy_shift=0", "step_policy_shift must be greater than 0"),
        ("capo.mode=msk", "capo.mode must be one of off, observe, mask, scale"),
        ("capo.measure_kl=2", "share between 0 and 1"),
        ("capo.top_k=0", "capo.top_k must be at least 1"),
        ("capo=off", "capo is a group of settings"),
        ("num_generations=7", r"completions_per_step \(96\) must be a multiple of num_generations \(7\)"),
        ("per_device_train_batch_size=7", "must be a multiple of per_device_train_batch_size"),
        ("completions_per_step=0", "completions_per_step must be at least 1"),
        ("learning_rate=abc", "learning_rate must be a number, got 'abc'"),
        ("learning_rate=-1", "learning_rate must be greater than 0"),
        ("max_steps=1.5", "max_steps must be a whole number"),
        ("use_vllm=maybe", "use_vllm must be true or false"),
        ("output_dir=x", "set output_root instead"),
        ("reward_funcs=[]", "name at least one reward"),
        ("advantage_baseline=mean", "advantage_baseline must be"),
        ("loss_type=dapo", "capo.denominator=kept is defined for the losses grpo, dr_grpo, bnpo, not for dapo"),
        ("lr_scheduler_type=square", "TRL refuses these settings"),
        ("capo.step_feedback=false", r"capo.step_feedback has no effect with capo.step_policy_shift=inf"),
        ("vllm_gpu_memory_utilization=0.5", "has no effect with use_vllm=false"),
        ("optim=sgd", "optimizer_model=adam does not describe the steps of optim=sgd"),
        ("optim=adafactor", "does not describe the steps of optim=adafactor: use an Adam"),
        ("loss_type=drgrpo", "loss_type must be one of dapo, grpo, dr_grpo, .*, got 'drgrpo'"),
        ("scale_rewards=grp", "scale_rewards must be one of group, batch, none"),
        ("importance_sampling_level=seq", "must be one of token, sequence"),
        ("top_entropy_quantile=-0.5", "top_entropy_quantile must be greater than 0 and at most 1"),
        ("top_entropy_quantile=2", "at most 1, got 2"),
        ("learning_rate", "an override is written key=value"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ConfigError, match=message):
        build(compose_recipe("capo_aggressive", [override]))


@pytest.mark.parametrize(
    "override",
    [
        "num_generations=0", "num_generations=1", "reward_funcs=5", "capo.min_objective_shift=abc", "data.path=5",
        "num_threads=abc", "num_threads=-1", "completions_per_step=abc", "output_root=null", "save_steps=0",
        "temperature=0", "temperature=-1", "top_p=2", "top_k=-5", "data.problems=0", "evaluation.samples=0",
        "evaluation.problems=-1", "logging_steps=5", "logging_strategy=no", "adam_beta1=1", "num_iterations=0",
        "learning_rate=inf", "max_steps=0", "max_steps=-1", "seed=-1", "max_completion_length=0", "recipe=foo",
        "system_prompt=5", "resume_from_checkpoint=x", "save_only_model=true", "save_total_limit=1",
        "entropy_coef=0.1", "data.split=test", "data.name=other", "capo.step_policy_shift=abc",
        "capo.min_objective_shift=2", "data.max_prompt_tokens=0", "use_cpu=5", "capo.step_policy_shift=1e-3",
    ],
)  # fmt: skip
def test_no_value_gives_a_traceback(override):
    with pytest.raises(ConfigError):
        build(compose_recipe("capo_aggressive", [override]))


def test_more_bad_combinations():
    for overrides in (
        ["per_device_train_batch_size=3", "gradient_accumulation_steps=2"],
        ["num_iterations=2", "save_steps=3"],
        ["capo.step_feedback=true", "capo.step_policy_shift=abc"],
    ):
        with pytest.raises(ConfigError):
            build(compose_recipe("capo_aggressive", overrides))


def test_what_cannot_act_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="capo.denominator has no effect with loss_type=dr_grpo"):
        compose_recipe("drcapo_aggressive", ["capo.denominator=all"])
    with pytest.raises(ConfigError, match="make it a multiple of 3"):
        build(compose_recipe("grpo_aggressive", ["steps_per_generation=6", "gradient_accumulation_steps=4"]))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="skip_gradient_norm cannot stop DeepSpeed's step.* --accelerator fsdp"):
        build(compose_recipe("grpo_norm_skip", []))


def test_the_model_is_that_of_the_optimizer():
    with pytest.raises(ConfigError, match="it needs capo.optimizer_model=adam"):
        build(compose_recipe("grpo_planned", ["capo.optimizer_model=sgd"]))
    for name, overrides in {
        "grpo_planned": ["capo.optimizer_model=sgd", "optim=sgd"],
        "grpo_aggressive": ["capo.mode=off", "optim=adafactor"],
        "capo_aggressive": ["capo.optimizer_model=sgd"],  # the paper's Figure 6
        "reincapo_aggressive": ["optim=adamw_torch_fused"],
    }.items():
        build(compose_recipe(name, overrides))


def test_values_take_their_annotated_type():
    run, args = build(
        compose_recipe("capo_aggressive", ["data.max_prompt_tokens=null", "reward_funcs=accuracy", "beta=1"])
    )
    assert run.data.max_prompt_tokens is None
    assert run.reward_funcs == ["accuracy"]
    assert isinstance(args.beta, float)


METHODS = {  # loss_type, scale_rewards, advantage_baseline, capo.mode, capo.denominator
    "grpo_conservative": ("grpo", "group", "group", "observe", "kept"),
    "grpo_aggressive": ("grpo", "group", "group", "observe", "kept"),
    "drgrpo_aggressive": ("dr_grpo", "none", "group", "observe", "kept"),
    "reinforce_aggressive": ("grpo", "none", "none", "observe", "kept"),
    "capo_aggressive": ("grpo", "group", "group", "mask", "kept"),
    "drcapo_aggressive": ("dr_grpo", "none", "group", "mask", "kept"),
    "reincapo_aggressive": ("grpo", "none", "none", "mask", "kept"),
    "capo_scale_aggressive": ("grpo", "group", "group", "scale", "all"),
    "grpo_planned": ("grpo", "group", "group", "observe", "kept"),
    "drgrpo_planned": ("dr_grpo", "none", "group", "observe", "kept"),
    "reinforce_planned": ("grpo", "none", "none", "observe", "kept"),
    "capo_planned": ("grpo", "group", "group", "mask", "kept"),
    "capo_scale_planned": ("grpo", "group", "group", "scale", "all"),
    "drcapo_scale_aggressive": ("dr_grpo", "none", "group", "scale", "all"),
    "reincapo_scale_aggressive": ("grpo", "none", "none", "scale", "all"),
    "grpo_probability": ("grpo", "group", "group", "probability", "all"),
    "grpo_covariance": ("grpo", "group", "group", "covariance", "all"),
    "grpo_token_norm": ("grpo", "group", "group", "gradient_norm", "all"),
    "grpo_entropy": ("grpo", "group", "group", "observe", "kept"),
    "grpo_norm_skip": ("grpo", "group", "group", "observe", "kept"),
    "grpo_adapted": ("grpo", "group", "group", "observe", "kept"),
    "grpo_kl": ("grpo", "group", "group", "observe", "kept"),
    "grpo_budget": ("grpo", "group", "group", "observe", "kept"),
    "drgrpo_budget": ("dr_grpo", "none", "group", "observe", "kept"),
    "reinforce_budget": ("grpo", "none", "none", "observe", "kept"),
    "capo_budget": ("grpo", "group", "group", "mask", "kept"),
}


@pytest.mark.parametrize("scale", ["lab", "qwen2.5-math-7b"])
@pytest.mark.parametrize("recipe", METHODS)
def test_what_each_recipe_trains(recipe, scale):
    settings = compose_recipe(recipe, [f"scale={scale}"])
    run, args = build(settings | NO_GPU)
    found = (args.loss_type, args.scale_rewards, run.advantage_baseline, run.capo.mode, run.capo.denominator)
    assert found == METHODS[recipe]
    assert settings["regime"] == ("conservative" if "conservative" in recipe else "aggressive")
    assert run.capo.step.acts == (recipe.endswith("_planned") or recipe == "grpo_adapted")
    assert run.budget.on == recipe.endswith("_budget")
    assert run.capo.absent_rows == ("decay" if recipe.endswith("_planned") else "hold")
    own = {
        "grpo_entropy": args.top_entropy_quantile < 1, "grpo_kl": args.beta > 0,
        "grpo_norm_skip": math.isfinite(run.capo.skip_gradient_norm), "grpo_adapted": run.capo.step.name == "adapt",
        "grpo_token_norm": run.capo.mode == "gradient_norm",
    }  # fmt: skip
    assert own == {name: name == recipe for name in own}
    assert run.capo.moment_average == "per_logit"
    assert (args.optim, str(args.lr_scheduler_type), args.weight_decay) == ("adamw_torch", "SchedulerType.COSINE", 0)
    if scale != "lab":
        assert (args.top_k, run.data.max_prompt_tokens, run.data.name) == (50, 512, "math_train_7500")
        assert run.model_name_or_path == "Qwen/Qwen2.5-Math-7B"
        assert args.num_iterations == 1
        assert run.system_prompt is None
        assert settings["needs_gpu"]
        assert args.per_device_train_batch_size == 12


@pytest.mark.parametrize(
    ("recipe", "groups", "same"),
    [
        ("grpo_aggressive", ["rule=probability"], "grpo_probability"),
        ("grpo_aggressive", ["rule=mask", "budget=planned"], "capo_planned"),
        ("capo_scale_aggressive", ["method=drgrpo"], "drcapo_scale_aggressive"),
        ("capo_budget", ["rule=observe", "budget=none", "regime=conservative"], "grpo_conservative"),
    ],
)
@pytest.mark.parametrize("scale", ["lab", "qwen2.5-math-7b"])
def test_groups_can_be_chosen_on_any_recipe(recipe, groups, same, scale):
    chosen = compose_recipe(recipe, [f"scale={scale}", *groups])
    assert chosen == compose_recipe(same, [f"scale={scale}"]) | {"recipe": recipe}


def test_a_rule_meets_every_budget_and_method():
    for path in RULE_FILES:
        for budget in ("planned", "adapted", "norm_skip", "target", "verify"):
            build(compose_recipe("reinforce_aggressive", [f"rule={path.stem}", f"budget={budget}"]))


def test_every_rule_has_its_group():
    modes = {compose_recipe("grpo_aggressive", [f"rule={path.stem}"])["capo"]["mode"] for path in RULE_FILES}
    assert modes == set(RULES)


def test_the_names_of_groups_do_not_make_another_run(tmp_path):
    """Runs from before rules and budgets were groups."""
    settings = compose_recipe("capo_planned", [])
    before = {key: value for key, value in settings.items() if key != "rule"} | {"method": "capo_planned"}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(before)))
    assert RunFolder(tmp_path).differences(settings) == {}
    assert "capo" in RunFolder(tmp_path).differences(compose_recipe("grpo_planned", []))


def test_unused_thresholds_are_refused():
    with pytest.raises(ConfigError, match="no effect with capo.mode=observe"):
        compose_recipe("grpo_aggressive", ["capo.max_policy_shift=1e-3"])
    with pytest.raises(ConfigError, match="no effect with capo.mode=off"):
        compose_recipe("grpo_aggressive", ["capo.mode=off", "capo.top_k=3"])
    with pytest.raises(ConfigError, match="no effect with capo.mode=probability"):
        compose_recipe("grpo_probability", ["capo.max_policy_shift=1e-3"])
    with pytest.raises(ConfigError, match="no effect with capo.mode=mask"):
        compose_recipe("capo_aggressive", ["capo.probability_alpha=0.1"])
    with pytest.raises(ConfigError, match="capo.denominator has no effect with capo.mode=observe"):
        compose_recipe("grpo_aggressive", ["capo.denominator=all"])
    with pytest.raises(ConfigError, match="evaluation.every has no effect with evaluation.suite=0"):
        compose_recipe("capo_aggressive", ["evaluation.every=5"])
    with pytest.raises(ConfigError, match="evaluation.samples has no effect with evaluation.problems=0"):
        compose_recipe("capo_aggressive", ["evaluation.problems=0", "evaluation.samples=4"])
    with pytest.raises(ConfigError, match="no effect with capo.step_rule=adapt"):
        compose_recipe("grpo_adapted", ["capo.step_feedback=false"])
    with pytest.raises(ConfigError, match="no effect with capo.step_policy_shift=inf"):
        compose_recipe("grpo_aggressive", ["capo.step_rule=plan"])
    with pytest.raises(ConfigError, match="budget.nats has no effect with budget.rule=none"):
        compose_recipe("grpo_aggressive", ["budget.nats=1e-3"])
    compose_recipe("grpo_covariance", ["capo.covariance_frac=1e-3", "capo.covariance_low=0.5"])


def test_unknown_recipe_lists_the_known():
    with pytest.raises(
        ConfigError, match="there is no recipe 'cap'; the recipes are capo_aggressive, capo_budget, capo_planned"
    ):
        compose_recipe("cap", [])
    with pytest.raises(ConfigError, match="there is no recipe 'grpo_bugdet'; did you mean grpo_budget?"):
        compose_recipe("grpo_bugdet", [])


def test_coarse_granularity_needs_one_forward_pass():
    with pytest.raises(ConfigError, match="one process with per_device_train_batch_size=96"):
        build(compose_recipe("capo_aggressive", ["capo.granularity=batch", "per_device_train_batch_size=48"]))
    build(compose_recipe("capo_aggressive", ["capo.granularity=batch"]))


def test_any_field_of_trl_can_be_set():
    _, args = build(
        compose_recipe("capo_aggressive", ["epsilon_high=0.28", "+beta=0.1", "gradient_accumulation_steps=4"])
    )
    assert (args.epsilon_high, args.beta) == (0.28, 0.1)
    assert (args.gradient_accumulation_steps, args.per_device_train_batch_size) == (4, 24)


def test_processes_share_the_completions(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"\(5 × 3\)"):
        build(compose_recipe("capo_aggressive", ["per_device_train_batch_size=5"]))


def test_reading_asks_neither_the_machine_nor_the_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "7")
    settings = compose_recipe("grpo_norm_skip", ["scale=qwen2.5-math-7b"])
    run, trl = read(settings, processes=4)
    assert (trl["per_device_train_batch_size"], trl["gradient_accumulation_steps"]) == (12, 2)
    assert (trl["bf16"], trl["beta"], trl["epsilon"]) == (True, 0.0, 0.2)
    assert run.needs_gpu
    assert run.policy_settings is None
    lab = {"lab": {"steps": 7, "mixture": {"filler_words": 3}}}
    assert policy_settings("lab", lab) == LabSettings(steps=7, mixture=Mixture(filler_words=3.0))
    assert policy_settings("models/x", lab) is None


def test_feedback_needs_a_measurement():
    with pytest.raises(ConfigError, match="needs the measured KL"):
        capo_config(mode="observe", absent_rows="decay", step_policy_shift=1e-3, measure_kl=0)
    capo_config(mode="observe", absent_rows="decay", step_policy_shift=1e-3, measure_kl=0, step_feedback=False)
    assert not capo_config(mode="observe", step_policy_shift=math.inf).step.acts


@pytest.mark.parametrize("override", ["learning_rate=1e-3", "lr_scheduler_type=linear", "warmup_steps=5"])
def test_a_rate_that_a_budget_replaces_is_refused(override):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key} has no effect with budget.rule=target"):
        compose_recipe("grpo_budget", [override])
    assert compose_recipe("grpo_budget", [override, "budget.rule=verify"])[key]


def test_deepspeed_and_a_budget_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="budget.rule=target cannot stop DeepSpeed's step"):
        build(compose_recipe("grpo_budget", []))


def test_what_a_budget_measures_is_its_own_share():
    with pytest.raises(ConfigError, match="capo.measure_kl has no effect with budget.rule=target"):
        compose_recipe("grpo_budget", ["capo.measure_kl=0.1"])


def test_a_path_without_a_name_is_that_file():
    """The scale's own set and its held-out problems are another task's."""
    for scale in ("lab", "qwen2.5-math-7b"):
        settings = compose_recipe("grpo_budget", [f"scale={scale}", "data.path=mine.jsonl"])
        run, _ = read(settings)
        assert (run.data.name, run.data.path, run.evaluation.problems) == (None, "mine.jsonl", 0)
    named = compose_recipe("grpo_budget", ["scale=qwen2.5-math-7b", "data.path=x", "data.name=math_train_7500"])
    assert named["data"]["name"] == "math_train_7500"
    asked = compose_recipe("grpo_budget", ["data.path=x", "evaluation.problems=5"])
    with pytest.raises(ConfigError, match="evaluation.problems needs held-out problems"):
        read(asked)


def test_a_reward_can_be_named_alone():
    settings = compose_recipe("grpo_budget", ["reward=mine.py:good"])
    assert read(settings)[0].reward_funcs == ["mine.py:good"]
