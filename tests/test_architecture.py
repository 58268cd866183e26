"""Rules of the house that a machine can check: layers, sizes, names, start-up cost, nothing local in tracked files."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from pipeline.recipe import DataSource, Prepare, Recipe
from pipeline.recipe_judges import Judge, LlmJudge
from pipeline.recipe_ppo import RewardSource

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "policy", "reward_model", "rollout")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KEYS = 185
ROWS = (DataSource, Judge, LlmJudge, Prepare, RewardSource)
PURE = (
    "policy/tensors.py",
    "policy/losses/__init__.py",
    "policy/losses/pairs.py",
    "policy/losses/dpo.py",
    "policy/losses/ipo.py",
    "policy/losses/simpo.py",
    "policy/losses/orpo.py",
    "policy/losses/kto.py",
    "policy/losses/ift.py",
    "policy/losses/contrast_sft.py",
    "policy/ppo/maths.py",
    "policy/ppo/controllers.py",
    "reward_model/losses.py",
    "rollout/batch.py",
)


def tracked_files() -> list[Path]:
    """Files under version control, and those that would be if they were added now."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_import_layers_hold() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_has_a_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layered = {name.strip() for layer in contracts[0]["layers"] for name in re.split(r"[|:]", layer)}
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in python_files(*PACKAGES)}
    modules = {name for name in modules if not name.endswith("__init__")}
    without = {name for name in modules if not any(name == layer or name.startswith(f"{layer}.") for layer in layered)}
    assert not without, f"name a layer for them in pyproject.toml: {sorted(without)}"
    gone = {name for name in layered if not any(m == name or m.startswith(f"{name}.") for m in modules)}
    assert not gone, f"layers of modules that do not exist: {sorted(gone)}"


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in python_files(*PACKAGES, "scripts", "tests"):
        text = path.read_text()
        lines = len(text.splitlines())
        if lines > MAX_FILE_LINES:
            long.append(f"{relative(path)}: {lines} lines")
        for node in functions(ast.parse(text)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                long.append(f"{relative(path)}:{node.lineno}: {node.name} has {length} lines")
    assert not long, "\n".join(long)


def is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException") for kind in kinds)


def defensive_code(path: Path) -> Iterator[str]:
    """Broad handlers that neither raise nor say `noqa: BLE001` with a reason, and `getattr(x, "name", default)`."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler) and is_broad(node):
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if not raises and not re.search(r"noqa: BLE001 \S", lines[node.lineno - 1]):
                yield f"{relative(path)}:{node.lineno}: broad except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            named = len(node.args) == 3 and isinstance(node.args[1], ast.Constant)
            if named:
                yield f"{relative(path)}:{node.lineno}: getattr with a default"


def test_errors_propagate() -> None:
    found = [line for path in python_files(*PACKAGES, "scripts") for line in defensive_code(path)]
    assert not found, "\n".join(found)


def test_annotations_are_lazy_everywhere() -> None:
    line = "from __future__ import annotations"
    without = [p for p in python_files(*PACKAGES, "scripts", "tests") if (t := p.read_text()).strip() and line not in t]
    assert not without, [relative(path) for path in without]


def test_the_maths_imports_only_torch_and_the_maths() -> None:
    allowed = {"__future__", "collections", "dataclasses", "math", "typing", "jaxtyping", "torch", "policy"}
    for name in PURE:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            foreign = {module for module in modules if module.partition(".")[0] not in allowed}
            assert not foreign, f"{name} imports {foreign}"


def sections(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in ROWS:
                yield name, kind


def recipe_keys() -> dict[str, str]:
    """Dotted key -> attribute name, for every key of the recipe; lists and mappings of rows count once per field."""
    nested = dict(sections(Recipe))
    keys = {name: name for name in Recipe.model_fields if name not in nested}
    keys |= {f"{section}.{name}": name for section, kind in nested.items() for name in kind.model_fields}
    for row in ROWS:
        keys |= {f"{row.__name__}.{name}": name for name in row.model_fields}
    return keys


def attributes_read() -> set[str]:
    """Attribute names that the packages read, and names given as strings (`entry.key` of a stage's inputs)."""
    found = set()
    for path in python_files(*PACKAGES):
        if relative(path) == "pipeline/recipe.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count(".") == 1:
                found.add(node.value.partition(".")[2])
    return found


def test_every_recipe_key_is_read_and_there_are_few() -> None:
    keys = recipe_keys()
    assert len(keys) <= MAX_KEYS, len(keys)
    read = attributes_read()
    unread = [key for key, attribute in keys.items() if attribute not in read]
    assert not unread, f"nobody reads {unread}"


@pytest.mark.parametrize("words", [["--help"], ["show", "recipes/demo.yaml"], ["plan", "recipes/demo.yaml"]])
def test_help_show_and_plan_start_without_torch(words: list[str], tmp_path: Path) -> None:
    """Importing torch or trl costs seconds; these three commands are asked for all the time."""
    script = (
        "import sys\n"
        "from pipeline.cli import main\n"
        "try:\n"
        f"    main({words!r})\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code, ended.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'accelerate', 'datasets', 'vllm', 'wandb', 'matplotlib', 'numpy'}\n"
        "found = ' '.join(sorted(heavy & set(sys.modules)))\n"
        "sys.exit(f'imported {found}' if found else 0)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


LOCAL = re.compile(
    r"(?<![\w.])/(?:work|root|home/\w+|opt|Users/\w+)/"  # machine paths
    r"|pypi\.org|files\.pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|deb\.debian\.org"
)
NOT_TEXT = {".safetensors", ".png", ".gz", ".parquet", ".bin", ".pt", ".npz", ".zip"}


def test_tracked_files_name_no_machine_and_no_registry() -> None:
    found = []
    for path in tracked_files():
        if path.suffix in NOT_TEXT or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = LOCAL.search(line)
            if match:
                found.append(f"{relative(path)}:{number}: {match.group()}")
    assert not found, "\n".join(found)


def test_no_tracked_file_is_large() -> None:
    large = {relative(path): path.stat().st_size for path in tracked_files() if path.stat().st_size > 12 * 2**20}
    assert not large


def test_the_readme_lists_every_module() -> None:
    """Under `## Layout`, one line per file: `name.py` and what it is for."""
    text = (ROOT / "README.md").read_text()
    layout = text.partition("\n## Layout")[2].partition("\n## ")[0]
    assert layout, "README.md has no section '## Layout'"
    listed = re.findall(r"[\w.-]+\.py\b", layout)
    modules = [path for path in python_files(*PACKAGES, "scripts") if path.name != "__init__.py"]
    counts = {path.name: sum(other.name == path.name for other in modules) for path in modules}
    missing = sorted({relative(path) for path in modules if listed.count(path.name) < counts[path.name]})
    assert not missing, f"README's layout does not list {missing}"
    gone = sorted(set(listed) - {path.name for path in tracked_files()})
    assert not gone, f"README's layout lists files that do not exist: {gone}"
