"""Rules that the repository keeps: sizes, import directions, and that the README's commands exist."""

import ast
import itertools
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRACKED = [ROOT / line for line in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()]
PYTHON = [path for path in TRACKED if path.suffix == ".py" and path.is_file()]
PACKAGE = "open_r1_capo"
HOME = ROOT / "src" / PACKAGE
# what each room may import of ours: every room has its row, and a room never imports one that is listed below it
ALLOWED = {
    "runs": set(),
    "capo": set(),
    "budget": set(),
    "plugins": {"budget"},
    "tasks": {"runs"},
    "report": {"runs"},
    "settings": {"runs", "capo", "budget", "tasks"},
    "cluster": {"runs", "settings", "tasks"},
    "capacity": {"runs", "settings", "tasks"},
    "training": {"runs", "capo", "budget", "tasks", "report", "settings", "cluster", "capacity"},
    "evaluation": {"runs", "tasks", "settings", "cluster"},
    "experiments": {"runs", "capo", "tasks", "settings", "cluster", "training"},
    "grpo": {"runs", "settings", "training", "cluster"},
    "sft": {"settings", "training"},
}
LIGHT = ("runs", "report", "settings", "cluster")  # rooms without torch, trl and transformers
HEAVY = ("torch", "trl", "transformers")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path):
    return path.relative_to(HOME).parts[0].removesuffix(".py")


def modules():
    """Every module of the package, by its dotted name."""
    names = {}
    for path in sorted(HOME.rglob("*.py")):
        parts = path.relative_to(HOME.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def test_every_room_has_a_row():
    rooms = {room_of(path) for path in HOME.rglob("*.py")} - {"__init__"}
    assert rooms == set(ALLOWED)
    order = list(ALLOWED)
    for room, allowed in ALLOWED.items():
        assert all(order.index(other) < order.index(room) for other in allowed), room


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    for path in HOME.rglob("*.py"):
        if room_of(path) == room:
            ours = {name.split(".")[1] for name in imports(path) if name.startswith(PACKAGE + ".")}
            assert ours <= ALLOWED[room] | {room}, (
                f"{path.name}: {room} may import {ALLOWED[room] or 'nothing of ours'}"
            )


def test_no_circles_of_files():
    names = modules()
    arrows = defaultdict(set)
    for name, path in names.items():
        for imported in imports(path):
            parts = imported.split(".")
            module = next((m for k in range(len(parts), 0, -1) if (m := ".".join(parts[:k])) in names), None)
            if module and module != name:
                arrows[name].add(module)
    done, stack = set(), []

    def visit(name):
        assert name not in stack, " → ".join([*stack[stack.index(name) :], name])
        if name not in done:
            stack.append(name)
            for other in sorted(arrows[name]):
                visit(other)
            done.add(stack.pop())

    for name in names:
        visit(name)


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_start_without_torch(room):
    """Of every module of the room, in a fresh process."""
    names = [name for name, path in modules().items() if room_of(path) == room and not name.endswith("__main__")]
    code = f"import sys, importlib; [importlib.import_module(name) for name in {names!r}]; "
    code += f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []


def test_nobody_imports_the_command_lines():
    for path in [*HOME.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        imported = set(imports(path)) | {n.rpartition(".")[0] for n in imports(path)}
        assert not imported & {f"{PACKAGE}.grpo", f"{PACKAGE}.sft"}, path


def test_generation_on_cpus_is_a_leaf():
    """Only the factory of `training/build.py` uses it: whether it stays is decided by measurement."""
    for path in HOME.rglob("*.py"):
        if "generation" not in path.parts and path.name != "build.py":
            assert not any("training.generation" in name for name in imports(path)), path


@pytest.mark.parametrize("room", ["capo", "budget"])
def test_the_method_needs_torch_alone(room):
    """It can be copied into any trainer."""
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", PACKAGE}
    for path in (HOME / room).rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= allowed, (path.name, roots - allowed)
        assert not any(name.startswith("torch.distributed") for name in imports(path))


def test_no_file_asks_which_source_it_has():
    """ "Is this the lab?" is answered by `tasks/source.py` alone."""
    for path in HOME.rglob("*.py"):
        if room_of(path) != "tasks":
            assert not re.search(r"""[!=]= ?["']lab["']|startswith\(["']lab|lab\.json""", path.read_text()), path


def test_files_and_functions_stay_small():
    for path in PYTHON:
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 65, f"{path}:{node.lineno} {node.name}"


def test_nothing_is_left_unfinished():
    for path in itertools.chain(HOME.rglob("*.py"), (ROOT / "eval").rglob("*.py")):
        assert not re.search(r"TODO|FIXME|XXX|NotImplementedError", path.read_text()), path
        assert "sys.path" not in path.read_text(), path


def make_verbs():
    texts = [(ROOT / "Makefile").read_text(), *(p.read_text() for p in ROOT.glob("*/*.mk"))]
    return set(re.findall(r"^([a-z-]+):", "\n".join(texts), re.MULTILINE))


def outside_make():
    """The environment without what `make test` hands down to a make in it: its own variables and flags."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


def test_make_help_is_one_screen():
    text = subprocess.check_output(["make", "help"], cwd=ROOT, text=True, env=outside_make())
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


def test_named_files_exist():
    """Files of ours that a document names in backticks, from the root or from the package."""
    for path in documents():
        for name in re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.py)`", path.read_text()):
            assert any((base / name).exists() for base in (ROOT, HOME, path.parent)), (path.name, name)


def test_no_path_of_one_machine():
    for path in TRACKED:
        if path.is_file() and path.suffix in (".py", ".yaml", ".md", ".slurm", ".mk", ".toml"):
            assert not re.search(r"(?<![\w.])/(home|root|Users|scratch)/", path.read_text()), path
