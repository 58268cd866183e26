"""Reads a recipe: YAML file plus `--section.key value` overrides -> `Recipe`, with errors that name file and line.

The command line beats the file wherever it stands. Unknown and duplicate keys are refused with a suggestion.
"""

from __future__ import annotations

import difflib
import hashlib
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.trl_args import TRAINER_CONFIGS, trainer_field_names

RESOLVED = "recipe.resolved.yaml"
DEEPEST = 50
Path_ = tuple[str | int, ...]
LEFT_OUT = dict.fromkeys(
    ("rollout.top_p", "rollout.top_k"),
    "there is no such key: with the tail of the softmax cut off, every importance ratio would be biased by the "
    "probability mass that survives (huggingface/trl issue 6789). Take it out; rollout.temperature is the only "
    "sampling setting.",
)
"""Keys that people expect, and why there are none."""


@dataclass(frozen=True)
class Origin:
    """Where every key of the recipe was written: `file:line` or the command-line option."""

    places: dict[Path_, str]

    def of(self, path: Path_) -> str:
        """The place of `path`, or of the nearest section around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the recipe at `path` and applies `overrides` (`["--ppo.kl_coef", "0.1", "--seed=3"]`).

    Errors:
        UserError: file missing or not YAML, unknown, duplicate or ill-typed keys, broken cross-field rules.
    """
    file = Path(path)
    if not file.is_file():
        near = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        raise UserError(
            f"recipe {file} does not exist.",
            mend=f"Shipped recipes: {', '.join(near)}." if near else "Give the path of a recipe.",
        )
    tree, places = _read_yaml(file)
    for dotted, text, option in _override_pairs(overrides):
        _assign(tree, dotted, _parse_value(text, option), option)
        places[tuple(dotted)] = option
    return _validate(tree, Origin(places), file)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every default spelt out, as YAML that loads back to an equal recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Quotes texts with YAML's rarer line breaks, which it would otherwise write as they are and read as spaces."""


def _quoted(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if set("\x85\u2028\u2029") & set(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)


def recipe_sha256(recipe: Recipe) -> str:
    """Hash of the resolved recipe."""
    return hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[Path_, str]]:
    places: dict[Path_, str] = {}
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"recipe {file} is empty or not a mapping.", mend="See recipes/demo.yaml.")
        _walk(node, (), file, places)
        return yaml.safe_load(text), places
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {file} is not UTF-8 text: {error}.", mend="Save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise UserError(
            f"recipe {file}:{line} is not valid YAML: {error.problem}.",
            mend="Check the indentation, the colons and the quotes there.",
        ) from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"recipe {file} is not valid YAML: {reason}.", mend="Remove that character.") from error


def _walk(node: yaml.Node, path: Path_, file: Path, places: dict[Path_, str]) -> None:
    if len(path) > DEEPEST:
        raise UserError(f"recipe {file} is nested without end.", mend="Remove the alias that contains itself.")
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                dotted = ".".join(map(str, (*path, key)))
                raise UserError(
                    f"{file}:{line}: key '{dotted}' is written twice (first at line {seen[key]}).",
                    mend="Keep one of the two.",
                )
            seen[key] = line
            places[(*path, key)] = f"{file}:{line}"
            _walk(value_node, (*path, key), file, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*path, index)] = f"{file}:{item.start_mark.line + 1}"
            _walk(item, (*path, index), file, places)


def _override_pairs(overrides: Sequence[str]) -> Iterator[tuple[list[str], str, str]]:
    items = list(overrides)
    while items:
        option = items.pop(0)
        if not option.startswith("--"):
            raise UserError(
                f"unexpected argument '{option}'.",
                mend="Overrides are written --section.key value.",
            )
        name, sign, value = option[2:].partition("=")
        if not sign:
            if not items:
                flag = " Did you mean --overwrite?" if difflib.get_close_matches(name, ["overwrite"]) else ""
                raise UserError(f"option --{name} has no value.", mend=f"Write --{name} VALUE.{flag}")
            value = items.pop(0)
        yield name.split("."), value, f"command line --{name}"


def _parse_value(text: str, option: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{option}: value '{text}' cannot be read.", mend="Quote it.") from error


def _assign(tree: dict[str, Any], dotted: list[str], value: Any, option: str) -> None:
    for part in dotted[:-1]:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            raise UserError(f"{option}: '{part}' is not a section.", mend="See `tristage show`.")
    tree[dotted[-1]] = value


def _validate(tree: dict[str, Any], origin: Origin, file: Path) -> Recipe:
    sections = {key: value for key, value in tree.items() if value is not None or key not in Recipe.model_fields}
    try:
        recipe = Recipe.model_validate(sections)
    except ValidationError as error:
        items = [dict(item) for item in error.errors()]
        lines = [_explain(item, origin, file) for item in items if not _is_other_branch(item)]
        raise UserError("\n".join(lines)) from error
    for section, config in TRAINER_CONFIGS.items():
        known = trainer_field_names(config)
        for key in recipe.model_dump()[section]["trainer"]:
            if key not in known:
                place = origin.of((section, "trainer", key))
                raise UserError(
                    f"{place}: {section}.trainer.{key}: {config.rpartition('.')[2]} has no such field.",
                    mend=_suggest(key, known, "Its documentation lists the fields."),
                )
    return recipe


def _is_other_branch(item: dict[str, Any]) -> bool:
    """Whether pydantic reports the form of `data.<key>` that was not meant: a path, or a mapping with a path."""
    if item["loc"][:1] != ("data",) or len(item["loc"]) != 3:
        return False
    form, is_mapping = item["loc"][2], isinstance(item["input"], dict)
    return (form == "str" and is_mapping) or (form == "DataSource" and not is_mapping)


def _explain(item: dict[str, Any], origin: Origin, file: Path) -> str:
    path: Path_ = tuple(item["loc"])
    if path[:1] == ("data",) and len(path) > 2:
        path = (*path[:2], *path[3:])
    dotted = ".".join(map(str, path))
    place = origin.of(path) or str(file)
    if item["type"] == "extra_forbidden":
        if dotted in LEFT_OUT:
            return f"{place}: {dotted}: {LEFT_OUT[dotted]}"
        known = _keys_of(path[:-1])
        return f"{place}: {dotted}: unknown key. " + _suggest(dotted.rpartition(".")[2], known, "See `tristage show`.")
    if item["type"] == "missing":
        return f"{place}: {dotted}: this key is required. Add it to {file}."
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "a section of keys and values is wanted"
    message = message[:1].lower() + message[1:]
    shown = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
    return f"{place}: {dotted and dotted + ': '}{message}{shown}. Mend this value."


def _suggest(key: str, known: set[str], otherwise: str) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
    return f"Did you mean '{near[0]}'?" if near else f"{otherwise} Keys here: {', '.join(sorted(known)[:12])}."


def _keys_of(path: Path_) -> set[str]:
    """Keys of the recipe section at `path`, read from the models' annotations."""
    model: type[BaseModel] = Recipe
    for part in path:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        inner = _section_class(model.model_fields[part].annotation)
        if inner is not None:
            model = inner
    return set(model.model_fields)


def _section_class(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for argument in typing.get_args(annotation):
            found = _section_class(argument)
            if found is not None:
                return found
    return None
