"""The table of bad input: how each case breaks a sound place, and what its refusal must say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.workplace import Workplace, change_rows

Break = Callable[[Workplace], None]


@dataclass(frozen=True)
class Case:
    """One kind of bad input.

    Attributes:
        does: breaks a working directory in which everything is right.
        words: the command after `tristage`, without the recipe.
        says: what the paragraph must name: file and line, key, mend.
        stage: whether the stage's process starts before the refusal.
    """

    does: Break
    words: tuple[str, ...]
    says: tuple[str, ...]
    stage: bool = False


def recipe_with(text: str) -> Break:
    """Appends lines to the recipe."""
    return lambda place: _append(place.path / "recipe.yaml", text)


def recipe_instead(old: str, new: str) -> Break:
    """Replaces a part of the recipe."""

    def change(place: Workplace) -> None:
        file = place.path / "recipe.yaml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return change


def row(file: str, index: int, **values: Any) -> Break:
    """Changes one row of a data file."""
    return lambda place: change_rows(place.path / file, {index: values})


def change_json(file: str, **values: Any) -> Break:
    """Updates keys of a JSON file; a value of None removes the key."""

    def change(place: Workplace) -> None:
        path = place.path / file
        content = json.loads(path.read_text())
        kept = {key: value for key, value in {**content, **values}.items() if value is not None}
        path.write_text(json.dumps(kept))

    return change


def write(file: str, content: str | bytes) -> Break:
    """Replaces a file."""

    def change(place: Workplace) -> None:
        path = place.path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def remove(file: str) -> Break:
    """Deletes a file or a folder."""

    def change(place: Workplace) -> None:
        path = place.path / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def cut(file: str, size: int) -> Break:
    """Cuts a file off before its last `size` bytes."""

    def change(place: Workplace) -> None:
        path = place.path / file
        path.write_bytes(path.read_bytes()[:-size])

    return change


def flip_last_byte(file: str) -> Break:
    """Damages a file without changing its size."""

    def change(place: Workplace) -> None:
        path = place.path / file
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))

    return change


def _append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


def nothing(place: Workplace) -> None:
    """The command line alone is wrong."""


SFT, RM, PPO = ("sft",), ("rm",), ("ppo",)
LONG = " and so on" * 40
LABELS = '{"prompt": "why", "completion": "because", "label": true}\n'

CASES = {
    # the recipe
    "misspelt key": Case(
        recipe_instead("kl_target_per", "kl_targt_per"),
        SFT,
        ("recipe.yaml:", "ppo.kl_targt", "Did you mean 'kl_target_per_sequence'?"),
    ),
    "misspelt section": Case(
        recipe_with("trackin: {}\n"), SFT, ("recipe.yaml:", "trackin: unknown key", "'tracking'?")
    ),
    "wrong type": Case(recipe_instead("updates: 7", "updates: many"), SFT, ("recipe.yaml:", "ppo.updates", "'many'")),
    "truth value for a number": Case(recipe_instead("updates: 7", "updates: yes"), SFT, ("ppo.updates", "number")),
    "value out of bounds": Case(
        nothing, ("sft", "--ppo.gamma", "1.2"), ("command line --ppo.gamma", "less than or equal to 1")
    ),
    "duplicate key": Case(recipe_with("name: again\n"), SFT, ("recipe.yaml:", "'name' is written twice", "line 1")),
    "bad YAML": Case(recipe_with("ppo: [1\n"), SFT, ("recipe.yaml:", "not valid YAML")),
    "recipe of another encoding": Case(write("recipe.yaml", b"name: caf\xe9\n"), SFT, ("recipe.yaml", "UTF-8")),
    "missing recipe": Case(remove("recipe.yaml"), SFT, ("recipe recipe.yaml does not exist",)),
    "minibatches that do not divide": Case(
        recipe_instead("num_minibatches: 2", "num_minibatches: 3"),
        SFT,
        ("recipe.yaml:", "num_minibatches (3)", "make it one"),
    ),
    "unknown trainer key": Case(
        recipe_instead("max_steps", "max_stepz"), SFT, ("recipe.yaml:", "sft.trainer.max_stepz", "'max_steps'?")
    ),
    "option without value": Case(nothing, ("sft", "--seed"), ("--seed has no value",)),
    "unknown stage": Case(nothing, ("run", "--stages", "sft,dpo3"), ("--stages", "'dpo3'", "sft, rm, ppo")),
    # what a stage reads
    "missing data file": Case(remove("sft.jsonl"), SFT, ("data.sft", "sft.jsonl does not exist")),
    "data key not set": Case(
        recipe_instead("  sft: sft.jsonl\n  preferences: rankings.jsonl\n", ""), SFT, ("data.sft is not set",)
    ),
    "unknown kind of data file": Case(
        recipe_instead("sft: sft.jsonl", "sft: length_judge.py"), SFT, ("data.sft", "length_judge.py", ".jsonl")
    ),
    "missing model": Case(
        nothing,
        ("sft", "--model.name_or_path", "runs/mdoel"),
        ("model.name_or_path: runs/mdoel does not exist", "existing directory"),
    ),
    "folder without a model": Case(remove("model/config.json"), SFT, ("model.name_or_path", "no config.json")),
    "earlier stage missing": Case(
        remove("runs/tiny/sft"), RM, ("rm.init_from", "runs/tiny/sft does not exist", "run the stage that makes it")
    ),
    "corrupted manifest": Case(
        cut("runs/tiny/sft/manifest.json", 20), RM, ("sft/manifest.json is corrupted", "--overwrite")
    ),
    "manifest of another version": Case(
        change_json("runs/tiny/sft/manifest.json", version=99), RM, ("manifest.json", "version 99")
    ),
    "wrong artifact kind": Case(
        nothing,
        ("ppo", "--ppo.reward_model", "runs/tiny/sft"),
        ("ppo.reward_model", "holds a 'sft' artifact", "wanted rm"),
    ),
    "changed weight file": Case(
        flip_last_byte("runs/tiny/sft/model.safetensors"), RM, ("rm.init_from", "model.safetensors", "sha256")
    ),
    "missing weight file": Case(
        remove("runs/tiny/rm/model.safetensors"), PPO, ("ppo.reward_model", "model.safetensors is missing")
    ),
    "damaged job file": Case(
        write("runs/tiny/ppo.partial/job.json", "{"), PPO, ("ppo.partial/job.json", "--overwrite")
    ),
    # where a stage writes
    "run directory is a file": Case(
        lambda place: (remove("runs")(place), write("runs", "")(place))[0], SFT, ("runs", "not a directory")
    ),
    "unknown directory in the way": Case(
        write("runs/tiny/ppo/my_notes.txt", "mine"), PPO, ("runs/tiny/ppo", "no manifest.json", "--overwrite")
    ),
    "prepare command that fails": Case(
        recipe_with("prepare: [{makes: new, command: 'false {out}'}]\n"),
        ("sft", "--data.sft", "new/a.jsonl"),
        ("prepare: `false {out}`", "did not make new"),
    ),
    # what the stage itself finds
    "truncated JSONL": Case(cut("sft.jsonl", 20), SFT, ("data.sft", "sft.jsonl:48", "on_error"), stage=True),
    "empty answer": Case(row("sft.jsonl", 4, response=""), SFT, ("sft.jsonl:5", "response"), stage=True),
    "missing column": Case(row("sft.jsonl", 2, response=None), SFT, ("sft.jsonl:3", "response"), stage=True),
    "ranks that do not match": Case(
        row("rankings.jsonl", 6, ranks=[0, 1]), RM, ("rankings.jsonl:7", "ranks"), stage=True
    ),
    "label that is no boolean": Case(
        write("rankings.jsonl", LABELS + LABELS.replace("true", '"yes"')),
        RM,
        ("rankings.jsonl:2", "`label`", "'yes'", "true or false"),
        stage=True,
    ),
    "labels for a reward model": Case(
        write("rankings.jsonl", "".join(LABELS.replace("why", f"why {n}") for n in range(40))),
        RM,
        ("data.preferences", "do not rank answers", "kto"),
        stage=True,
    ),
    "prompt in two splits": Case(
        lambda place: (
            row("sft.jsonl", 0, prompt="x", split="train")(place),
            row("sft.jsonl", 1, prompt="x", split="eval")(place),
        )[0],
        SFT,
        ("sft.jsonl:2", "sft.jsonl:1", "split"),
        stage=True,
    ),
    "prompt too long": Case(
        lambda place: (
            row("sft.jsonl", 3, prompt=LONG)(place),
            recipe_instead("eval_fraction: 0.25", "eval_fraction: 0.25\n  long_prompts: error")(place),
        )[0],
        SFT,
        ("sft.jsonl:4", "max_prompt_tokens"),
        stage=True,
    ),
    "padding is the EOS": Case(
        change_json("model/tokenizer_config.json", pad_token="</s>"),
        SFT,
        ("model", "'</s>'", "model.pad_token"),
        stage=True,
    ),
    "padding token not in the vocabulary": Case(
        nothing, ("sft", "--model.pad_token", "<none>"), ("model.pad_token", "'<none>'", "vocabulary"), stage=True
    ),
    "no tokenizer": Case(remove("model/tokenizer.json"), SFT, ("model", "tokenizer"), stage=True),
    "trainer key of the stage": Case(
        recipe_instead("max_steps: 12\n    save_steps: 3", "max_steps: 12\n    output_dir: x"),
        SFT,
        ("sft.trainer.output_dir", "Remove it"),
        stage=True,
    ),
    "trainer value of a wrong type": Case(
        recipe_instead("max_steps: 12", "max_steps: soon"), SFT, ("sft.trainer.max_steps", "'soon'"), stage=True
    ),
    "reward model of another tokenizer": Case(
        change_json("runs/tiny/rm/manifest.json", tokenizer_sha256="0" * 64),
        PPO,
        ("runs/tiny/rm", "another tokenizer"),
        stage=True,
    ),
    "reward model that guesses": Case(
        change_json("runs/tiny/rm/manifest.json", metrics={"eval/accuracy": 0.5}),
        PPO,
        ("runs/tiny/rm", "held-out accuracy", "--ppo.force true"),
        stage=True,
    ),
    "reward model without normalisation": Case(
        change_json("runs/tiny/rm/manifest.json", normalisation=None),
        PPO,
        ("runs/tiny/rm", "normalisation"),
        stage=True,
    ),
    "judge that cannot be imported": Case(
        recipe_instead("length_judge:characters", "no_judge:characters"), PPO, ("eval.judges", "no_judge"), stage=True
    ),
    "judge without such a function": Case(
        recipe_instead("length_judge:characters", "length_judge:words"), PPO, ("eval.judges", "words"), stage=True
    ),
    "context too short": Case(
        recipe_instead("max_response_tokens: 8", "max_response_tokens: 800"),
        ("generate", "--policy", "model"),
        ("128 positions", "824 tokens"),
        stage=True,
    ),
    "W&B without a key": Case(
        nothing, ("sft", "--tracking.wandb", "online"), ("tracking.wandb", "WANDB_API_KEY", "offline"), stage=True
    ),
}
