"""What pip installs from a wheel, without the repository: the recipes are in it, and compose."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The content of the wheel, in a folder."""
    pytest.importorskip("setuptools", minversion="77")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__", "*.so"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def python(installed, code):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r}); {code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=installed).stdout


def test_every_recipe_is_in_it(installed):
    ours = {path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml")}
    theirs = installed / "open_r1_capo" / "recipes"
    assert {path.relative_to(theirs) for path in theirs.rglob("*.yaml")} == ours


def test_recipes_and_experiments_are_found(installed):
    code = "from open_r1_capo.settings import recipes; from open_r1_capo.experiments import spec; "
    code += "print(recipes.RECIPES, spec.EXPERIMENTS); "
    code += "print(recipes.compose_recipe('grpo_budget', ['scale=own'])['budget']['rule'])"
    recipes = installed / "open_r1_capo" / "recipes"
    assert python(installed, code).split() == [str(recipes), str(recipes / "experiments"), "target"]


def test_the_pages_and_the_inner_loop_are_in_it(installed):
    home = installed / "open_r1_capo"
    assert (home / "report" / "style.css").is_file()
    assert (home / "settings" / "trl_fields.json").is_file()
    assert list((home / "capo" / "engines").glob("_native*.so"))
