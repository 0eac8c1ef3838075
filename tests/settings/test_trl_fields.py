"""TRL's fields are kept as data, so that settings need neither TRL nor torch."""

import subprocess
import sys

import pytest

from open_r1_capo.settings import trl_fields
from open_r1_capo.settings.run import RunConfig
from open_r1_capo.settings.trl_fields import TRL_FIELDS
from open_r1_capo.settings.values import convert, kinds, schema


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
        (dict | str | None, ()),
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
