"""`trainer:` mappings of a recipe: checked by name without importing trl, built into the config class on the node.

trl and transformers cost seconds to import and their config classes raise on machines without the right hardware, so
the names are read from the installed source text; values are checked and the object is built in the stage's process.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import UserError

TRAINER_CONFIGS = {
    "sft": "trl.trainer.sft_config.SFTConfig",
    "rm": "trl.trainer.reward_config.RewardConfig",
    **dict.fromkeys(
        ("dpo", "ipo", "kto", "simpo", "orpo", "ift", "contrast"), "transformers.training_args.TrainingArguments"
    ),
}
"""Recipe section -> config class that its `trainer:` mapping is checked against."""


@cache
def trainer_field_names(config: str) -> set[str]:
    """Field names of the dataclass `package.module.Class` and its bases, read from source without importing it."""
    module, _, class_name = config.rpartition(".")
    tree = ast.parse(_source_of(module).read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            names |= {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
            for base in node.bases:
                if isinstance(base, ast.Name):
                    names |= trainer_field_names(_resolve(tree, module, base.id))
    return names


def _resolve(tree: ast.Module, module: str, name: str) -> str:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            package = ".".join(module.split(".")[: -node.level]) if node.level else ""
            source = ".".join(part for part in (package, node.module) if part)
            return f"{'transformers.training_args' if source == 'transformers' else source}.{name}"
    raise UserError(
        f"cannot find where {module} imports {name} from.",
        mend="Run `tristage doctor`: trl's version does not fit.",
    )


def _source_of(module: str) -> Path:
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"package {top} is not installed.", mend="Run `make setup`.")
    return Path(spec.submodule_search_locations[0]).joinpath(*rest).with_suffix(".py")


def build_trainer_arguments(
    config_class: type,
    mapping: Mapping[str, Any],
    *,
    section: str,
    fixed: Mapping[str, Any],
    **defaults: Any,
) -> Any:
    """Builds `config_class(**defaults, **mapping, **fixed)` after checking names and types of the user's `mapping`.

    Args:
        mapping: the recipe's `<section>.trainer`; beats `defaults`.
        fixed: arguments that the stage itself decides (output_dir, seed ...); the user may not set them.

    Errors:
        UserError: naming `<section>.trainer.<key>`.
    """
    known = {field.name for field in fields(config_class)}
    hints = get_type_hints(config_class)
    checked: dict[str, Any] = {}
    for key, value in mapping.items():
        place = f"{section}.trainer.{key}"
        if key in fixed:
            raise UserError(f"{place} is set by the stage itself.", mend="Remove it from the recipe.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            mend = f"Did you mean '{near[0]}'?" if near else "See its documentation."
            raise UserError(f"{place}: {config_class.__name__} has no such field.", mend=mend)
        try:
            checked[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            bare = "In YAML a bare no, off, yes or on is a truth value: put the word in quotes."
            mend = bare if isinstance(value, bool) else "Mend this value."
            raise UserError(f"{place}: {error.errors()[0]['msg']} (got {value!r}).", mend=mend) from error
    try:
        return config_class(**{**defaults, **checked, **fixed})
    except (ValueError, TypeError) as error:
        raise UserError(f"{section}.trainer: {error}", mend="Mend this section of the recipe.") from error
