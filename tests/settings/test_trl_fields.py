"""TRL's fields are kept as data, so that settings need neither TRL nor torch."""

import subprocess
import sys

import pytest

from open_r1_capo.settings import trl_fields
from open_r1_capo.settings.recipes import compose_recipe
from open_r1_capo.settings.run import RunConfig, read
from open_r1_capo.settings.trl_fields import TRL_FIELDS
from open_r1_capo.settings.values import ConfigError, convert, kinds, schema
from open_r1_capo.training.build import build


def test_the_stored_fields_are_those_of_the_installed_trl():
    command = "python -m open_r1_capo.settings.trl_fields"
    assert trl_fields.installed() == TRL_FIELDS, f"TRL has changed: run {command}"


def test_settings_need_no_torch():
    code = (
        "import sys; from open_r1_capo.settings.recipes import compose_recipe;"
        "from open_r1_capo.settings.run import read;"
        "read(compose_recipe('capo_aggressive', ['seed=3']), processes=2);"
        "print(sorted({'torch', 'trl', 'transformers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (int, ("int",)),
        (float | None, ("float", "null")),
        (list[str] | str | None, ("list", "str", "null")),
        (dict[str, int] | str | None, ("dict", "str", "null")),
    ],
)
def test_kinds(hint, expected):
    assert kinds(hint) == expected


def test_convert_takes_known_values_only():
    names = {"a": ("float",), "b": ("list",), "c": (), "g": ("group",), "g.d": ("bool", "null")}
    settings = {"a": 1, "b": "x", "c": {"any": 1}, "g": {"d": None}, "other": 1}
    assert convert(settings, names) == {"a": 1.0, "b": ["x"], "c": {"any": 1}, "g": {"d": None}}
    assert isinstance(convert(settings, names)["a"], float)
    assert schema(RunConfig)["lab.mixture.slip"] == ("float",)


@pytest.mark.parametrize(
    "overrides",
    [
        ["generation_kwargs.min_p=0.1", "generation_kwargs.top_k=5"],
        ["generation_kwargs={min_p:0.1,top_k:5}"],
        ["generation_kwargs={min_p: 0.1}", "generation_kwargs.top_k=5"],
        ["""generation_kwargs='{"min_p": 0.1, "top_k": 5}'"""],
    ],
)
def test_values_by_name_are_written_in_three_ways(overrides):
    _, trl = read(compose_recipe("grpo_aggressive", overrides))
    assert trl["generation_kwargs"] == {"min_p": 0.1, "top_k": 5}


@pytest.mark.parametrize(
    "override", ["generation_kwargs=5", "model_init_kwargs=bfloat16", "lr_scheduler_kwargs='{num_cycles: 1}'"]
)
def test_values_by_name_that_are_not_are_refused(override):
    name = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{name} takes values by name: write {name}\.<key>=<value>"):
        read(compose_recipe("grpo_aggressive", [override]))


def test_a_misspelt_setting_of_the_sampler_is_refused():
    with pytest.raises(ConfigError, match=r"generation_kwargs\.temprature is no setting .* did you mean temperature"):
        build(compose_recipe("grpo_aggressive", ["generation_kwargs.temprature=0.9"]))
    build(compose_recipe("grpo_aggressive", ["generation_kwargs.temperature=0.9"]))


def test_a_file_of_values_stays_a_path():
    _, trl = read(compose_recipe("grpo_aggressive", ["deepspeed=recipes/zero.json"]))
    assert trl["deepspeed"] == "recipes/zero.json"
