from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from pipeline.artifacts import (
    finish,
    identity,
    json_safe,
    may_be_hub_id,
    open_artifact,
    read_manifest,
    recover_replaced,
    refuse_missing_files,
    write_json,
)
from pipeline.errors import UserError

CONTENT = {"kind": "sft", "fingerprint": {"sha256": "a" * 64}}


def unfinished(final: Path, text: str = "weights") -> Path:
    partial = final.with_name(final.name + ".partial")
    (partial / "state" / "checkpoint-3").mkdir(parents=True)
    (partial / "state" / "checkpoint-3" / "big.pt").write_text("optimiser")
    (partial / "critic").mkdir()
    (partial / "critic" / "config.json").write_text("{}")
    (partial / "model.safetensors").write_text(text)
    (partial / ".model.safetensors.tmp").write_text("half")
    (partial / "job.json").write_text("{}")
    return partial


def weights(final: Path) -> str:
    return (final / "model.safetensors").read_text()


def tree(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_finish_leaves_the_artifact_alone_with_the_hash_of_every_file(tmp_path: Path) -> None:
    finish(unfinished(tmp_path / "sft"), tmp_path / "sft", CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]
    assert tree(tmp_path / "sft") == {"manifest.json", "model.safetensors", "critic/config.json"}
    assert read_manifest(tmp_path / "sft")["files"] == {
        "model.safetensors": hashlib.sha256(b"weights").hexdigest(),
        "critic/config.json": hashlib.sha256(b"{}").hexdigest(),
    }


def test_finish_replaces_an_older_artifact(tmp_path: Path) -> None:
    for text in ("old", "new"):
        finish(unfinished(tmp_path / "sft", text), tmp_path / "sft", CONTENT)
    assert weights(tmp_path / "sft") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("older", [True, False], ids=["replacing", "first"])
@pytest.mark.parametrize("survived", range(12))
def test_a_kill_between_any_two_steps_of_finish_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int, older: bool
) -> None:
    """Every deletion and rename of `finish` is counted; the process "dies" before number `survived`."""
    final = tmp_path / "sft"
    if older:
        finish(unfinished(final, "old"), final, CONTENT)
    partial = unfinished(final, "new")
    done = 0

    def deadly(original):
        def step(*args, **kwargs):
            nonlocal done
            if done == survived:
                raise Killed
            done += 1
            return original(*args, **kwargs)

        return step

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", deadly(shutil.rmtree))
        for name in ("unlink", "rename", "replace"):
            patched.setattr(Path, name, deadly(getattr(Path, name)))
        with contextlib.suppress(Killed):
            finish(partial, final, CONTENT)
    resumable = (partial / "job.json").exists() and (partial / "state" / "checkpoint-3" / "big.pt").exists()
    recover_replaced(final)
    if not final.exists() or weights(final) == "old":
        assert resumable
        assert final.exists() == older
    else:
        assert weights(final) == "new"
        open_artifact(final, kinds=["sft"], wanted_as="x")
        assert [path.name for path in tmp_path.iterdir()] == ["sft"]


def test_an_older_artifact_comes_back_when_nothing_newer_is_complete(tmp_path: Path) -> None:
    finish(unfinished(tmp_path / "sft", "old"), tmp_path / "sft", CONTENT)
    (tmp_path / "sft").rename(tmp_path / "sft.replaced")
    partial = unfinished(tmp_path / "sft", "new")
    recover_replaced(tmp_path / "sft")
    assert weights(tmp_path / "sft") == "old"
    assert (partial / "job.json").exists()


def test_open_artifact_reads_kind_and_manifest(tmp_path: Path) -> None:
    finish(unfinished(tmp_path / "sft"), tmp_path / "sft", {**CONTENT, "seed": 3})
    artifact = open_artifact(tmp_path / "sft", kinds=["rm", "sft"], wanted_as="ppo.policy")
    assert (artifact.kind, artifact.manifest["seed"]) == ("sft", 3)


def test_a_foreign_checkpoint_and_a_hub_id_are_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    assert open_artifact("base", kinds=["model"], wanted_as="x").kind == "model"
    assert open_artifact("owner/name", kinds=["model"], wanted_as="x").path == "owner/name"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", True),
        ("owner/name", True),
        ("here/name", False),
        ("/abs/name", False),
        ("a/b/c", False),
        ("./a", False),
    ],
)
def test_a_missing_path_in_a_local_folder_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert may_be_hub_id(text) is expected


@pytest.mark.parametrize(
    "damage",
    [
        "not json",
        "[]",
        "{}",
        '{"version": 1}',
        '{"version": 99, "kind": "sft", "files": {}, "fingerprint": {"sha256": "x"}}',
        '{"version": 1, "kind": "sft", "files": [], "fingerprint": {"sha256": "x"}}',
        '{"version": 1, "kind": "sft", "files": {}, "fingerprint": "x"}',
        '{"version": 1, "kind": 7, "files": {}, "fingerprint": {"sha256": "x"}}',
    ],
)
def test_a_damaged_manifest_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    (tmp_path / "manifest.json").write_text(damage)
    with pytest.raises(UserError, match=r"manifest\.json .*(corrupted|version)"):
        read_manifest(tmp_path)


def test_changed_and_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    finish(unfinished(tmp_path / "sft"), tmp_path / "sft", CONTENT)
    file = tmp_path / "sft" / "critic" / "config.json"
    file.write_text("{ }")
    refuse_missing_files(tmp_path / "sft")
    open_artifact(tmp_path / "sft", kinds=["sft"], wanted_as="x", verify=False)
    with pytest.raises(UserError, match=r"critic/config\.json does not have the sha256"):
        open_artifact(tmp_path / "sft", kinds=["sft"], wanted_as="x")
    file.unlink()
    with pytest.raises(UserError, match=r"critic/config\.json is missing"):
        open_artifact(tmp_path / "sft", kinds=["sft"], wanted_as="x")
    with pytest.raises(UserError, match=r"critic/config\.json is missing"):
        refuse_missing_files(tmp_path / "sft")


def test_identity_depends_on_contents_not_on_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"0" * 100)
    assert identity(tmp_path / "a") == identity(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"0" * 50 + b"1" + b"0" * 49)
    assert identity(tmp_path / "a") != identity(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"0" * 100)
    (tmp_path / "b" / "merges.txt").write_text("x")
    assert identity(tmp_path / "a") != identity(tmp_path / "b")
    assert identity("owner/name") == {"hub": "owner/name"}


def test_identity_of_a_large_file_samples_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.artifacts._WHOLE_BYTES", 1 << 20)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(40 << 20))
    before = identity(tmp_path)
    with file.open("r+b") as stream:
        stream.seek(20 << 20)
        stream.write(b"1" * 65536)
    assert identity(tmp_path) != before


def test_identity_of_an_artifact_is_its_manifest(tmp_path: Path) -> None:
    finish(unfinished(tmp_path / "sft"), tmp_path / "sft", CONTENT)
    sha256 = hashlib.sha256((tmp_path / "sft" / "manifest.json").read_bytes()).hexdigest()
    assert identity(tmp_path / "sft") == {"manifest": sha256}


def test_json_holds_non_finite_numbers_as_text(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", json_safe({"a": [float("nan"), 1.5], "b": {"c": float("-inf")}, "d": (1, None)}))
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": ["nan", 1.5], "b": {"c": "-inf"}, "d": [1, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
