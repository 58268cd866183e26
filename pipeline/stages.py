"""The stages: how each is started, what it reads, and the fingerprint of what decides its result.

Stages are named by module string and none is imported: planning costs neither torch nor trl.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from pipeline.artifacts import identity, sha256_file
from pipeline.errors import UserError
from pipeline.recipe import TRAINED, DataSource, Recipe
from pipeline.recipe_direct import DIRECT
from pipeline.sources import fingerprint as source_fingerprint
from pipeline.sources import locate
from pipeline.surroundings import tristage_version


@dataclass(frozen=True)
class Input:
    """An input of a stage: the key that overrides it, or the stage that makes it."""

    key: str
    made_by: str | None
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class StageSpec:
    """How a stage is started, what it reads and which recipe sections decide its result."""

    module: str
    inputs: Mapping[str, Input]
    sections: tuple[str, ...]
    data: tuple[str, ...]


POLICIES = ("model", "sft", "ppo", *DIRECT)
"""Kinds of artifacts that hold a policy."""
STAGES: dict[str, StageSpec] = {
    "sft": StageSpec(
        "policy.sft",
        {"model": Input("sft.init_from", None, POLICIES)},
        ("model", "data", "sft"),
        ("sft",),
    ),
    "rm": StageSpec(
        "reward_model.train",
        {"policy": Input("rm.init_from", "sft", POLICIES)},
        ("model", "data", "rm", "rollout"),
        ("preferences", "prompts"),
    ),
    "ppo": StageSpec(
        "policy.ppo.stage",
        {
            "policy": Input("ppo.policy", "sft", POLICIES),
            "reward_model": Input("ppo.reward_model", "rm", ("rm",)),
        },
        ("model", "data", "ppo", "rollout", "eval"),
        ("prompts",),
    ),
    **{
        name: StageSpec(
            "policy.preference",
            {"policy": Input(f"{name}.policy", "sft", POLICIES)},
            ("model", "data", name, "rollout", "eval"),
            ("preferences", "prompts"),
        )
        for name in DIRECT
    },
    "generate": StageSpec(
        "rollout.generate",
        {"policy": Input("generate.policy", "ppo", POLICIES)},
        ("model", "data", "rollout", "eval"),
        ("prompts",),
    ),
    "evaluate": StageSpec(
        "policy.evaluate",
        {
            "policy": Input("evaluate.policy", "ppo", POLICIES),
            "reference": Input("evaluate.reference", "sft", POLICIES),
            "reward_model": Input("eval.reward_model", None, ("rm",)),
        },
        ("model", "data", "rollout", "eval", "ppo"),
        ("sft", "preferences", "prompts"),
    ),
}
ORDER = ("sft", "rm", "ppo")
NOT_DECISIVE = {
    "model": {"name_or_path"},
    "data": {"sft", "preferences", "prompts"},
    "sft": {"init_from"},
    "rm": {"init_from"},
    "ppo": {
        "policy",
        "reward_model",
        "max_tokens_per_micro_batch",
        "gradient_checkpointing",
        "save_every",
        "max_skipped_steps",
        "force",
        "shard",
        "keep_states",
    },
    **{name: {"policy", "reference"} for name in DIRECT},
    "rollout": {"kv_cache_gib", "gpu_memory_utilization", "logprob_tolerance", "mode", "server"},
    "eval": {"reward_model"},
}
"""Keys outside the fingerprint: paths, for which the contents they lead to stand in, and what no result depends on."""
NOT_DECISIVE_TRAINER = ("save_", "logging_")
FROM_PAIRS = ("dpo", "ipo", "simpo", "orpo", "contrast")
"""Stages whose result `data.ranking_pairs` decides."""
CRITIC_STARTS = ("reward_model", "policy", "shared")
"""Values of `ppo.critic` that are no path."""


def run_directory(recipe: Recipe) -> Path:
    """`output_dir/name`, relative to the working directory."""
    return Path(recipe.output_dir) / recipe.name


def stage_inputs(recipe: Recipe, name: str) -> dict[str, Input]:
    """The inputs of stage `name` by role: those of the table; of the models of `ppo.rewards`, those that it names."""
    inputs = dict(STAGES[name].inputs)
    if name in (section for section, _ in references(recipe)):
        inputs["reference"] = Input(f"{name}.reference", None, POLICIES)
    if name not in ("ppo", "evaluate"):
        return inputs
    with_score = name == "ppo" or recipe.with_score
    if not (with_score and recipe.ppo.with_trained_model):
        del inputs["reward_model"]
    if with_score:
        inputs |= _named_models(recipe)
    if name == "ppo" and recipe.ppo.critic not in CRITIC_STARTS:
        inputs["critic"] = Input("ppo.critic", None, ("model", "rm"))
    return inputs


def _named_models(recipe: Recipe) -> dict[str, Input]:
    """The reward models that `ppo.rewards` names by their path."""
    named = [name for name, source in recipe.ppo.rewards.items() if source.model not in (None, TRAINED)]
    return {f"rewards.{name}": Input(f"ppo.rewards.{name}.model", None, ("rm",)) for name in named}


def sections(recipe: Recipe, name: str) -> tuple[str, ...]:
    """The recipe sections that decide the result of stage `name`."""
    of_stage = STAGES[name].sections
    if name == "evaluate" and not recipe.with_score:
        return tuple(section for section in of_stage if section != "ppo")
    return of_stage


def references(recipe: Recipe) -> list[tuple[str, str]]:
    """The direct methods whose recipe names a reference, and its path."""
    found = {"dpo": recipe.dpo.reference, "ipo": recipe.ipo.reference, "kto": recipe.kto.reference}
    return [(name, path) for name, path in found.items() if path is not None]


def input_paths(recipe: Recipe, name: str, overrides: Mapping[str, str]) -> dict[str, str]:
    """Where stage `name` reads each input from: an override, the recipe's key, or the stage that makes it."""
    dumped = recipe.model_dump()
    paths = {}
    for role, entry in stage_inputs(recipe, name).items():
        chosen = overrides.get(role) or reduce(lambda tree, key: (tree or {}).get(key), entry.key.split("."), dumped)
        default = recipe.model.name_or_path if entry.made_by is None else str(run_directory(recipe) / entry.made_by)
        paths[role] = str(chosen or default)
    return paths


def wanted_as(recipe: Recipe, name: str, role: str, path: str) -> str:
    """The recipe key that says where an input lies."""
    entry = stage_inputs(recipe, name)[role]
    by_default = entry.made_by is None and path == recipe.model.name_or_path
    return "model.name_or_path" if by_default else entry.key


def sources(recipe: Recipe, name: str) -> dict[str, str | DataSource]:
    """The data sources that stage `name` reads; sft falls back to preferences, prompts to these, then to sft.

    PPO reads the demonstrations too where `ppo.ptx_coef` weighs the loss on them; IFT reads them alone where there are
    no preferences; `evaluate` reads what there is.
    """
    data = recipe.data
    prompts = data.prompts or data.preferences or data.sft
    fallback = {"sft": data.sft or data.preferences, "preferences": data.preferences, "prompts": prompts}
    found = {}
    with_sft = name == "ppo" and recipe.ppo.ptx_coef > 0.0
    keys = (*STAGES[name].data, "sft") if with_sft else STAGES[name].data
    if name == "ift" and data.preferences is None:
        keys = ("sft", "prompts")
    if name == "evaluate":
        given = {"sft": data.sft, "preferences": data.preferences}
        keys = (*(key for key, source in given.items() if source is not None), "prompts")
    for key in keys:
        source = fallback[key]
        if source is None:
            raise UserError(f"{name}: data.{key} is not set.", mend=f"Set data.{key} in the recipe.")
        found[key] = source
    return found


def named_files(recipe: Recipe, name: str) -> list[str]:
    """Texts of the recipe that may name a file whose contents count.

    They are the chat template, the arguments of judges and reward functions, the reward functions' source files, and
    the judges' where nothing is trained.
    """
    named = [recipe.model.chat_template] if recipe.model.chat_template else []
    read = sections(recipe, name)
    with_judges = "eval" in read
    called = [judge for judge in recipe.eval.judges.values() if judge.function and with_judges]
    if name == "evaluate":  # what its judges say is its result
        named += [_source_file(judge.function or "") for judge in called]
    if "ppo" in read:
        functions = [source for source in recipe.ppo.rewards.values() if source.function]
        named += [_source_file(source.function or "") for source in functions]
        called += functions
    return named + [v for entry in called for v in entry.kwargs.values() if isinstance(v, str)]


def _source_file(function: str) -> str:
    """Where `module:function` stands, if the module is one of the working directory."""
    module = function.partition(":")[0].replace(".", "/")
    package = f"{module}/__init__.py"
    return package if os.path.isfile(package) else f"{module}.py"


def wanted_paths(recipe: Recipe, name: str, inputs: Mapping[str, str]) -> list[str]:
    """Every path or hub id that the stage would read."""
    data = [source if isinstance(source, str) else source.path for source in sources(recipe, name).values()]
    return [*inputs.values(), *data, *named_files(recipe, name)]


def fingerprint(recipe: Recipe, name: str, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What decides a stage's result: recipe sections, seed, inputs, data files and the code's version.

    Models and data count by their contents, not by where they lie.
    """
    dumped = recipe.model_dump(mode="json")
    data = {key: source_fingerprint(locate(source, f"data.{key}")) for key, source in sources(recipe, name).items()}
    content = {
        "stage": name,
        "seed": recipe.seed,
        "sections": {section: _decisive(name, section, dumped[section]) for section in sections(recipe, name)},
        "inputs": {role: identity(path) for role, path in inputs.items()},
        "data": {key: {k: v for k, v in entry.items() if k != "path"} for key, entry in data.items()},
        "files": {path: sha256_file(Path(path)) for path in named_files(recipe, name) if _is_file(path)},
        "version": tristage_version(),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {"sha256": digest, **content}


def _decisive(stage: str, section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if key not in NOT_DECISIVE.get(section, ())}
    if section == "data" and stage not in FROM_PAIRS:
        del kept["ranking_pairs"]
    if section == "ppo":
        kept["critic"] = kept["critic"] if kept["critic"] in CRITIC_STARTS else "a directory"
        kept["rewards"] = {name: {**source, "model": None} for name, source in kept["rewards"].items()}
        kept = {"rewards": kept["rewards"]} if stage == "evaluate" else kept
    if section == "eval":
        kept["judges"] = {
            name: {"function": judge["function"], "kwargs": judge["kwargs"]}
            for name, judge in kept["judges"].items()
            if judge["function"] is not None
        }
    if "trainer" in kept:
        kept["trainer"] = {k: v for k, v in kept["trainer"].items() if not k.startswith(NOT_DECISIVE_TRAINER)}
    return kept


def _is_file(path: str) -> bool:
    """Whether a text is the path of a file; a template is one that is too long, or has line breaks."""
    return len(path) < 1024 and "\n" not in path and os.path.isfile(path)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in the recipe's words."""
    found = _changed_keys({"seed": before.get("seed")}, {"seed": now["seed"]})
    found += _changed_keys(before.get("sections", {}), now["sections"])
    words = {"inputs": "the contents of the input {}", "data": "the contents of data.{}", "files": "the file {}"}
    for part, text in words.items():
        old, new = before.get(part, {}), now[part]
        found += [text.format(key) for key in {**old, **new} if old.get(key) != new.get(key)]
    if before.get("version") != now["version"]:
        found.append(f"tristage's version ({before.get('version')} -> {now['version']})")
    return found or ["the form of the fingerprint"]


def _changed_keys(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = {**before, **now}
        return [
            item
            for key in keys
            for item in _changed_keys(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if before == now else [f"{path} ({_brief(before)} -> {_brief(now)})"]


def _brief(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
