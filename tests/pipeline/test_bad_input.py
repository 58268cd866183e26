"""What a person can get wrong, and what `tristage` says: exit code 2, one paragraph, a mend, nothing left as complete.

A case that is refused before a stage starts runs the command in this process. A stage that starts is run here too, by
its own entry point, because importing its libraries once per case would take minutes; tests/e2e starts real processes.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline import runner
from pipeline.artifacts import finish
from pipeline.cli import main
from pipeline.process import Ended, only_one
from pipeline.stage import stage_main
from pipeline.stages import STAGES
from tests.tiny_stage import write_rows
from tests.workplace import Workplace, change_rows, make_workplace

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
    "data key not set": Case(recipe_instead("  sft: sft.jsonl\n", ""), SFT, ("data.sft is not set",)),
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


@pytest.fixture(scope="session")
def sound_place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace whose sft and rm stages look finished; only to be copied."""
    from pipeline.recipe import ModelSection
    from pipeline.tokens import load_tokenizer, tokenizer_sha256

    place = make_workplace(tmp_path_factory.mktemp("sound") / "work")
    tokenizer = load_tokenizer(place.path / "model", ModelSection(name_or_path="model"))
    for name in ("sft", "rm"):
        partial = place.run / f"{name}.partial"
        shutil.copytree(place.path / "model", partial)
        manifest = {
            "kind": name,
            "fingerprint": {"sha256": "made by hand"},
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "normalisation": {"mean": 0.0, "std": 1.0},
        }
        finish(partial, place.run / name, manifest)
    return place


@pytest.fixture
def place(sound_place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    shutil.copytree(sound_place.path, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return Workplace(tmp_path / "work")


@pytest.fixture
def stages_run_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A stage's entry point is called here instead of in a process of its own; yields the stages that ran."""
    ran: list[str] = []
    real = runner.run_child

    def run_child(words: Sequence[str], *, lock: int) -> Ended:
        if words[1:2] != ["-m"]:
            return real(words, lock=lock)
        name = next(name for name, spec in STAGES.items() if spec.module == words[2])
        ran.append(name)
        monkeypatch.setattr(sys, "argv", list(words[2:]))
        monkeypatch.syspath_prepend(os.getcwd())
        with pytest.raises(SystemExit) as caught:
            stage_main(name, importlib.import_module(words[2]).run)
        assert isinstance(caught.value.code, int)
        return Ended(caught.value.code, None)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(runner, "run_child", run_child)
    yield ran
    signal.signal(signal.SIGTERM, before)


def refused(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs the command, which must be refused as promised, and returns the paragraph."""
    with pytest.raises(SystemExit) as caught:
        main([words[0], "recipe.yaml", *words[1:]])
    err = capsys.readouterr().err
    assert caught.value.code == 2, err
    paragraphs = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(paragraphs) == 1, err
    assert err.rstrip().endswith(paragraphs[0]), err
    assert "Traceback" not in err
    return paragraphs[0]


def complete_stages(place: Workplace) -> set[str]:
    return {path.parent.name for path in place.path.glob("runs/*/*/manifest.json")}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, place: Workplace, stages_run_here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    for stage in ("sft", "rm"):
        if case.words[0] in (stage, "run"):
            shutil.rmtree(place.run / stage)
    case.does(place)
    before = complete_stages(place)
    said = refused(case.words, capsys)
    for part in case.says:
        assert part in said
    assert complete_stages(place) == before
    assert stages_run_here == ([case.words[0]] if case.stage else [])


def test_there_are_more_than_twenty_kinds() -> None:
    assert len(CASES) + 6 >= 20


def test_the_sound_place_is_refused_nothing(
    place: Workplace, stages_run_here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The other cases fail for the reason they name: without it the stage trains."""
    shutil.rmtree(place.run / "sft")
    main(["sft", "recipe.yaml"])
    assert "sft: complete" in capsys.readouterr().out
    assert "sft" in complete_stages(place)


def test_a_stage_that_another_process_runs(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(place.run / "sft")
    with only_one(place.run / ".sft.lock"):
        said = refused(("sft",), capsys)
    assert "another process is running the stage sft in runs/tiny" in said


def test_a_finished_stage_made_from_something_else(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(("sft", "--seed", "3"), capsys)
    assert "runs/tiny/sft was made from something else" in said
    assert "--overwrite" in said


@contextmanager
def mounted(directory: Path, options: str) -> Iterator[None]:
    """A file system of our own on `directory`."""
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_full_disk_at_the_start(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    (place.path / "small").mkdir()
    with mounted(place.path / "small", "size=16k"):
        with pytest.raises(OSError, match="No space left"):
            (place.path / "small" / "ballast").write_bytes(bytes(1 << 20))
        said = refused(("sft", "--output_dir", "small"), capsys)
        assert not list((place.path / "small").rglob("manifest.json"))
    assert "small" in said
    assert "the disk is full" in said


@pytest.mark.parametrize("size", ["32k", "96k", "160k"])
def test_a_disk_that_fills_while_the_stage_runs(
    place: Workplace, stages_run_here: list[str], capsys: pytest.CaptureFixture[str], size: str
) -> None:
    """The checkpoint, the weights or the log no longer fit; afterwards the same command completes the stage."""
    (place.path / "small").mkdir()
    with mounted(place.path / "small", f"size={size}"):
        said = refused(("sft", "--output_dir", "small"), capsys)
        assert not list((place.path / "small").rglob("manifest.json"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(place.path / "small")], check=True)
        main(["sft", "recipe.yaml", "--output_dir", "small"])
        assert list((place.path / "small").rglob("manifest.json"))
    assert stages_run_here == ["sft", "sft"]
    assert "the disk is full" in said


def test_a_read_only_run_directory(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    (place.path / "fixed").mkdir()
    with mounted(place.path / "fixed", "ro,size=1m"):
        said = refused(("sft", "--output_dir", "fixed"), capsys)
    assert "fixed" in said
    assert "the file system is read-only" in said


def test_no_permission_to_write(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root; the read-only mount covers this")
    (place.path / "locked").mkdir(mode=0o500)
    assert "permission is denied" in refused(("sft", "--output_dir", "locked"), capsys)


def test_data_that_are_all_bad_rows(
    place: Workplace, stages_run_here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(place.run / "sft")
    write_rows(place.path / "sft.jsonl", [{"prompt": "a", "response": ""}] * 3)
    said = refused(("sft", "--data.on_error", "skip"), capsys)
    assert "all 3 rows were skipped" in said
