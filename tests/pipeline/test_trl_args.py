from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.trl_args import TRAINER_CONFIGS, build_trainer_arguments, trainer_field_names


@dataclass
class Config:
    output_dir: str
    learning_rate: float = 1e-4
    max_steps: int = -1
    bf16: bool = False
    names: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        if self.max_steps == 0:
            raise ValueError("max_steps is zero")


def build(mapping: dict, **defaults: object) -> Config:
    return build_trainer_arguments(Config, mapping, section="sft", fixed={"output_dir": "here"}, **defaults)


def test_the_recipe_beats_our_defaults_and_the_stage_beats_both() -> None:
    built = build({"learning_rate": 0.5}, learning_rate=0.1, max_steps=7)
    assert (built.output_dir, built.learning_rate, built.max_steps) == ("here", 0.5, 7)


def test_values_are_read_as_the_field_s_type() -> None:
    built = build({"learning_rate": "1e-3", "max_steps": 3.0, "names": ["a"]})
    assert (built.learning_rate, built.max_steps, built.names) == (1e-3, 3, ["a"])
    assert type(built.max_steps) is int


@pytest.mark.parametrize(
    ("mapping", "part"),
    [
        ({"learning_rte": 1}, "sft.trainer.learning_rte: Config has no such field. Did you mean 'learning_rate'?"),
        ({"output_dir": "there"}, "sft.trainer.output_dir is set by the stage itself"),
        ({"learning_rate": "fast"}, "sft.trainer.learning_rate: "),
        ({"max_steps": 1.5}, "sft.trainer.max_steps: "),
        ({"names": "a"}, "sft.trainer.names: "),
        ({"names": False}, "In YAML a bare no, off, yes or on is a truth value: put the word in quotes."),
        ({"max_steps": 0}, "sft.trainer: max_steps is zero"),
    ],
)
def test_bad_settings_are_refused_by_key(mapping: dict, part: str) -> None:
    with pytest.raises(UserError) as caught:
        build(mapping)
    assert part in str(caught.value)


@pytest.mark.parametrize("section", TRAINER_CONFIGS)
def test_names_read_from_source_are_those_of_the_class(section: str) -> None:
    """Expected: the dataclass itself, which the code under test never imports."""
    import importlib
    from dataclasses import fields
    from typing import get_type_hints

    from pydantic import TypeAdapter

    module, _, name = TRAINER_CONFIGS[section].rpartition(".")
    config = getattr(importlib.import_module(module), name)
    assert trainer_field_names(TRAINER_CONFIGS[section]) == {item.name for item in fields(config)}
    for hint in get_type_hints(config).values():
        TypeAdapter(hint)


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match="package no_such_package is not installed"):
        trainer_field_names("no_such_package.config.Config")


def test_a_base_class_that_cannot_be_found_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "odd_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "config.py").write_text("class Config(Unknown):\n    a: int\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="Unknown"):
        trainer_field_names("odd_package.config.Config")
