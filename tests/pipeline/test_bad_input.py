"""What a person can get wrong, and what `tristage` says: exit code 2, one paragraph, a mend, nothing left as complete.

A case that is refused before a stage starts runs the command in this process. A stage that starts is run here too, by
its own entry point, because importing its libraries once per case would take minutes; tests/e2e starts real processes.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import runner
from pipeline.artifacts import finish
from pipeline.cli import main
from pipeline.process import Ended, only_one
from pipeline.stage_main import stage_main
from pipeline.stages import STAGES
from tests.pipeline.bad_input_cases import CASES
from tests.tiny_stage import write_rows
from tests.workplace import Workplace, make_workplace


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
            "metrics": {"eval/accuracy": 0.8, "eval/accuracy_low": 0.7, "eval/accuracy_high": 0.9, "eval/pairs": 50},
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

    def run_child(words: Sequence[str], *, lock: int, **how: Any) -> Ended:
        if words[1:2] != ["-m"]:
            return real(words, lock=lock)
        name = next(name for name, spec in STAGES.items() if spec.module == words[2])
        ran.append(name)
        monkeypatch.setattr(sys, "argv", list(words[2:]))
        monkeypatch.syspath_prepend(os.getcwd())
        with pytest.raises(SystemExit) as caught:
            stage_main(name, run=importlib.import_module(words[2]).run)
        assert isinstance(caught.value.code, int)
        return Ended(caught.value.code, None)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(runner, "run_child", run_child)
    yield ran
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


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
