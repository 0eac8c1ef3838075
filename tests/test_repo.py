"""Rules that the repository keeps: sizes, import directions, and that the README's commands exist."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRACKED = [ROOT / line for line in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()]
PYTHON = [path for path in TRACKED if path.suffix == ".py" and path.is_file()]
PACKAGE = "open_r1_capo"
# who may import what of ours; everything else of the package is off limits
ALLOWED = {
    "capo": {"capo"},
    "features": {"capo"},
    "capo_config": {"capo"},
    "configs": {"capo_config", "lab"},
    "recipes": {"configs"},
    "checkpoint": {"capo"},
    "update": {"capo", "capo_config"},
    "measure": {"capo", "features", "update"},
    "token_records": {"capo", "measure", "update"},
    "model_server": set(),
    "generation": {"generation", "checkpoint", "model_server", "lab"},
    "trainer": {"capo", "features", "capo_config", "checkpoint", "update", "measure", "token_records", "generation"},
    "run_folder": {"checkpoint"},
    "report": {"report", "run_folder"},
    "callbacks": {"trainer", "run_folder"},
    "preemption": set(),
    "node": {"preemption"},
    "job": {"preemption"},
    "layout": {"job", "configs", "recipes"},
    "launch": {"layout", "job", "configs", "recipes"},
    "data": set(),
    "rewards": set(),
    "lab": {"lab"},
    "plan": {"plan", "configs", "recipes", "lab", "run_folder"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path):
    """The parts of the package that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith(PACKAGE + ".")}


@pytest.mark.parametrize("path", sorted((ROOT / "src" / PACKAGE).rglob("*.py")), ids=lambda p: p.name)
def test_imports_point_one_way(path):
    part = path.relative_to(ROOT / "src" / PACKAGE).parts[0].removesuffix(".py")
    if part in ALLOWED:
        assert ours(path) <= ALLOWED[part], f"{part} may import {ALLOWED[part] or 'nothing of ours'}"


def test_capo_needs_torch_alone():
    """The curvature core can be copied into any trainer."""
    import sys

    allowed = set(sys.stdlib_module_names) | {"torch", "triton", PACKAGE}
    for path in (ROOT / "src" / PACKAGE / "capo").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= allowed, (path.name, roots - allowed)
        assert not any(name.startswith("torch.distributed") for name in imports(path))


def test_evaluation_stands_apart():
    for path in (ROOT / "eval").rglob("*.py"):
        allowed = {"data", "rewards", "lab", "experiments", "outcomes", "model_server", "run_folder"}
        # one takes steps, the other makes the policy that a run began with
        more = {"mechanism.py": {"counterfactual", "grpo"}, "model.py": {"configs"}}.get(path.name, set())
        assert ours(path) <= allowed | more, path.name


def test_files_and_functions_stay_small():
    for path in PYTHON:
        text = path.read_text()
        assert len(text.splitlines()) <= 410, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 65, f"{path}:{node.lineno} {node.name}"


def test_nothing_is_left_unfinished():
    for path in PYTHON:
        if path.is_relative_to(ROOT / "src") or path.is_relative_to(ROOT / "eval"):
            assert not re.search(r"TODO|FIXME|XXX|NotImplementedError", path.read_text()), path


def make_verbs():
    texts = [(ROOT / "Makefile").read_text(), *(p.read_text() for p in ROOT.glob("*/*.mk"))]
    return set(re.findall(r"^([a-z-]+):", "\n".join(texts), re.MULTILINE))


def test_make_help_is_one_screen():
    text = subprocess.check_output(["make", "--no-print-directory", "help"], cwd=ROOT, text=True)
    assert len(text.splitlines()) <= 24
    for verb in ("install", "train", "eval", "test", "quality", "style", "figures", "report", "help"):
        assert re.search(rf"^  {verb}\s", text, re.MULTILINE), verb


def documents():
    return [path for path in TRACKED if path.suffix == ".md" and path.is_file()]


def commands():
    """Every line of a shell block in the documentation."""
    for path in documents():
        for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", path.read_text(), re.DOTALL):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                line = line.removeprefix("$ ").split("  #")[0].strip()
                if line and not line.startswith("#"):
                    yield path, line


@pytest.mark.parametrize(("path", "line"), list(commands()), ids=lambda x: getattr(x, "name", x))
def test_documented_commands_exist(path, line):
    """Its make verb, recipe, scale and files exist, and its settings are accepted."""
    from open_r1_capo.settings.recipes import RECIPES, compose_recipe, known_recipes

    words = line.split()
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z]+=", word))
    if words[0] == "make":
        verbs = [word for word in words[1:] if "=" not in word and re.fullmatch(r"[a-z-]+", word)]
        assert verbs, line
        assert set(verbs) <= make_verbs() | {"all"}, line
    recipe = variables.get("RECIPE") or (words[words.index("--config-name") + 1] if "--config-name" in words else None)
    recipes = words[words.index("in") + 1 :] if recipe == "$recipe" else [recipe] if recipe else []
    recipes = [name.rstrip(";") for name in recipes[: next((i + 1 for i, r in enumerate(recipes) if ";" in r), None)]]
    assert set(recipes) <= set(known_recipes()), line
    if "SCALE" in variables:
        assert (RECIPES / "scale" / f"{variables['SCALE']}.yaml").is_file(), line
    arguments = re.search(r'ARGS="([^"]*)"', line)
    settings = arguments.group(1).split() if arguments else []
    if "--config-name" in words:
        settings += [word for word in words if re.match(r"[a-z][\w.]*=", word)]
    if words[0] == "make" and "train" not in words:
        settings = []
    if settings:
        compose_recipe(recipes[0] if recipes else "capo_aggressive", settings)
    for word in words:
        if re.match(r"(recipes|slurm|eval|src|tests|benchmarks|docs)/[\w./-]+$", word):
            assert (ROOT / word).exists(), line


def test_the_readme_names_every_part():
    files = (ROOT / "README.md").read_text().split("## Files")[1]
    parts = [path.name for path in (ROOT / "src" / PACKAGE).iterdir() if path.suffix == ".py" or path.is_dir()]
    parts = [name for name in parts if not name.startswith("__")]
    assert not [name for name in parts if name not in files]


def test_documented_links_exist():
    for path in documents():
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), (path.name, target)


def test_no_path_of_one_machine():
    for path in TRACKED:
        if path.is_file() and path.suffix in (".py", ".yaml", ".md", ".slurm", ".mk", ".toml"):
            assert not re.search(r"(?<![\w.])/(home|root|Users|scratch)/", path.read_text()), path
