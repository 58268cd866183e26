from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import open_artifact
from pipeline.errors import UserError, disk_error_in
from pipeline.exits import print_error
from pipeline.stage import Stage, read_job
from pipeline.surroundings import tristage_version
from tests.tiny_stage import prepare_stage

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = {"name": "tiny", "seed": 5, "model": {"name_or_path": "model"}}
SCRIPT = """\
import os, signal, sys, time
from pipeline.errors import UserError
from pipeline.stage_main import stage_main

def run(stage):
    stage.say("hello from the stage")
    stage.tracker.log(1, {"loss": 1.0})
    what = os.environ["WHAT"]
    if what == "user error":
        raise UserError("data.sft:3 is wrong [here].", mend="Mend it.")
    if what == "bug":
        raise KeyError("a bug")
    if what == "disk":
        with open("/dev/full", "w") as stream:
            stream.write("x")
    if what == "wait":
        (stage.out / "waiting").touch()
        time.sleep(600)
    if what == "finaliser":
        class Waits:
            def __del__(self):
                (stage.out / "waiting").touch()
                time.sleep(600)
        Waits()
        stage.say("not interrupted")
    return {"loss": float("nan")}

stage_main("sft", run=run)
"""


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return prepare_stage(tmp_path / "run" / "sft.partial", RECIPE, "sft", {"model": model})


def start(prepared: Path, what: str) -> subprocess.Popen[str]:
    script = prepared.parent / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(prepared)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "WHAT": what},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_complete_writes_all_that_the_manifest_must_name(prepared: Path) -> None:
    stage = Stage(prepared)
    stage.record(data={"sft": {"split_seed": 0}}, tokenizer_sha256="t", chat_template_sha256=None)
    stage.tracker.log(1, {"loss": 2.0})
    stage.state.mkdir()
    (stage.state / "checkpoint").write_text("x")
    (stage.out / "model.safetensors").write_text("w")
    final = stage.complete({"loss": 2.0, "ratio": float("inf")})
    manifest = json.loads((final / "manifest.json").read_text())
    assert final == prepared.parent / "sft"
    assert sorted(path.name for path in prepared.parent.iterdir()) == ["sft"]
    assert set(manifest["files"]) == {"log.txt", "metrics.jsonl", "model.safetensors", "recipe.resolved.yaml"}
    assert manifest["kind"] == "sft"
    assert manifest["seed"] == 5
    assert manifest["metrics"] == {"loss": 2.0, "ratio": "inf"}
    assert manifest["inputs"] == {"model": {"path": "../../model"}}
    assert manifest["tokenizer_sha256"] == "t"
    assert manifest["command"] == "tristage sft"
    assert manifest["packages"]["torch"] == metadata.version("torch")
    assert manifest["packages"]["tristage"] == tristage_version()
    assert manifest["device"].startswith("cpu") or manifest["device"]
    for key in ("wall_seconds", "cpu_seconds", "peak_memory_gib"):
        assert manifest[key] > 0
    assert open_artifact(final, kinds=["sft"], wanted_as="x").kind == "sft"


def test_a_signal_after_the_last_hash_leaves_the_log_as_it_was(prepared: Path) -> None:
    stage = Stage(prepared)
    stage.say("one line")
    stage.close_log()
    before = (prepared / "log.txt").read_bytes()
    assert b"one line" in before
    stage.log_traceback()
    assert (prepared / "log.txt").read_bytes() == before


def test_time_and_memory_of_earlier_runs_count_once(prepared: Path) -> None:
    job = read_job(prepared)
    spent = {"wall_seconds": 1000.0, "cpu_seconds": 500.0, "peak_memory_gib": 77.0}
    (prepared / "job.json").write_text(json.dumps({**job, "spent": spent}))
    stage = Stage(prepared)
    for _ in range(3):
        stage.note_time_spent()
    noted = read_job(prepared)["spent"]
    assert 1000.0 <= noted["wall_seconds"] < 1100.0
    assert 500.0 < noted["cpu_seconds"] <= 500.0 + sum(os.times()[:4]) + 0.1
    assert noted["peak_memory_gib"] == 77.0
    again = Stage(prepared)
    manifest = json.loads((again.complete({}) / "manifest.json").read_text())
    assert 1000.0 <= manifest["wall_seconds"] < 1200.0


def test_success_prints_where_it_lies(prepared: Path) -> None:
    code, out, err = end(start(prepared, "success"))
    assert (code, err) == (0, "")
    assert "hello from the stage" in out
    assert f"sft: complete, written to {prepared.parent / 'sft'}" in out
    assert "hello from the stage" in (prepared.parent / "sft" / "log.txt").read_text()
    assert json.loads((prepared.parent / "sft" / "manifest.json").read_text())["metrics"] == {"loss": "nan"}


def test_a_user_error_is_one_paragraph_and_the_log_has_the_traceback(prepared: Path) -> None:
    code, _, err = end(start(prepared, "user error"))
    assert (code, err) == (2, "error: data.sft:3 is wrong [here]. Mend it.\n")
    assert "Traceback" in (prepared / "log.txt").read_text()
    assert not (prepared.parent / "sft").exists()


def test_a_bug_keeps_its_traceback(prepared: Path) -> None:
    code, _, err = end(start(prepared, "bug"))
    assert code == 1
    assert "KeyError: 'a bug'" in err


def test_a_disk_error_in_the_middle_is_one_paragraph(prepared: Path) -> None:
    code, _, err = end(start(prepared, "disk"))
    assert code == 2
    assert err.startswith("error: cannot write or read ")
    assert "the disk is full" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("where", ["wait", "finaliser"])
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_stage_in_order(prepared: Path, number: signal.Signals, expected: int, where: str) -> None:
    """A finaliser is a place where Python ignores exceptions, KeyboardInterrupt too."""
    process = start(prepared, where)
    while not (prepared / "waiting").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    code, out, err = end(process)
    assert code == expected
    assert "not interrupted" not in out
    assert err.splitlines()[-1].startswith("error: sft was interrupted. Run the same command again")
    assert ("Traceback" in err) == (where == "finaliser")
    assert read_job(prepared)["spent"]["wall_seconds"] > 0


@pytest.mark.parametrize(
    ("damage", "part"),
    [(None, "holds no job.json"), ("{", "job.json is corrupted"), ("[]", "job.json is corrupted"), ("{}", "corrupted")],
)
def test_a_directory_that_was_not_prepared_is_refused(prepared: Path, damage: str | None, part: str) -> None:
    (prepared / "job.json").unlink() if damage is None else (prepared / "job.json").write_text(damage)
    code, _, err = end(start(prepared, "success"))
    assert code == 2
    assert part in err
    assert "Traceback" not in err


def test_a_directory_of_another_stage_is_refused(prepared: Path) -> None:
    job = read_job(prepared)
    (prepared / "job.json").write_text(json.dumps({**job, "stage": "rm"}))
    code, _, err = end(start(prepared, "success"))
    assert code == 2
    assert "was prepared for the stage rm, not sft" in err


def test_errors_stay_on_one_line_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a path /" + "x" * 300 + " [bold] and \\ more"
    print_error(text)
    assert capsys.readouterr().err == f"error: {text}\n"


def test_the_version_is_known_without_an_installed_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    line = next(text for text in (ROOT / "pyproject.toml").read_text().splitlines() if text.startswith("version = "))
    monkeypatch.setattr(metadata, "version", absent)
    assert line == f'version = "{tristage_version()}"'


def chained(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left"), errno.ENOSPC),
        (chained(RuntimeError("torch"), OSError(errno.EROFS, "Read-only")), errno.EROFS),
        (ValueError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (OSError(errno.ENOENT, "absent"), None),
        (ValueError("os error"), None),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), errno.EIO),
        (UserError("x"), None),
    ],
)
def test_disk_errors_are_recognised_through_libraries(
    error: BaseException, expected: int | None, tmp_path: Path
) -> None:
    found: Any = disk_error_in(error, tmp_path)
    assert (found.errno if found else None) == expected
