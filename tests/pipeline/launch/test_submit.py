"""`tristage launch`, with stand-ins for Slurm's commands."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.artifacts import write_json
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.launch.slurm import Slurm, parse_job
from tests.tiny_stage import write_rows

RECIPE = """\
name: tiny
model: {name_or_path: model}
data: {sft: sft.jsonl, preferences: pairs.jsonl}
"""
SBATCH = """\
#!/bin/bash
echo "sbatch $*" >>calls
echo "in a job: ${SLURM_JOB_ID:-no}" >>calls
for script; do [[ $script == --job-name=* ]] && name=${script#*=}; done
case "$*" in
    *--test-only*$REFUSED_FIRST) echo "allocation failure: Invalid account" >&2; exit 1 ;;
    *--test-only*) exit 0 ;;
    *$REFUSED) echo "sbatch: error: Batch job submission failed: limit" >&2; exit 1 ;;
esac
number=$(($(cat last 2>/dev/null || echo 40) + 1))
echo $number | tee last
[ -z "$name" ] && name=$(sed -n 's/^#SBATCH --job-name=//p' "$script" | tail -n 1)
echo "$number $name" >>jobs
[ -n "$INTERRUPTS" ] && [[ $script == *$INTERRUPTS ]] && kill -INT $PPID
exit 0
"""
SCONTROL = """\
#!/bin/bash
[ -n "$DOWN" ] && { echo "Unable to contact slurm controller" >&2; exit 1; }
name=$(awk -v job="${@: -1}" '$1 == job { print $2 }' jobs)
[ -z "$name" ] && { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
echo "JobId=${@: -1} JobName=$name UserId=me(1) JobState=${STATE:-PENDING} Reason=Dependency Restarts=0 ExitCode=0:0"
"""
SCANCEL = '#!/bin/bash\necho "scancel $*" >>calls\n'


@dataclass
class Desk:
    """A working directory with a recipe, and Slurm's commands beside it."""

    path: Path

    @property
    def folder(self) -> Path:
        return self.path / "runs" / "tiny" / "slurm"

    def calls(self, word: str = "") -> list[str]:
        file = self.path / "calls"
        return [line for line in file.read_text().splitlines() if line.startswith(word)] if file.exists() else []


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    for name, text in {"sbatch": SBATCH, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    write_rows(tmp_path / "sft.jsonl", [{"prompt": "a", "response": "b"}])
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("REFUSED", "REFUSED_FIRST"):
        monkeypatch.setenv(name, "nothing")
    for name in ("DOWN", "STATE", "INTERRUPTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    return Desk(tmp_path)


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_a_chain_is_submitted_in_order(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    main(["launch", "recipe.yaml", "--seed", "3", "--data.max_prompt_tokens=99"])
    scripts = {stage: f"{desk.folder}/{stage}.sbatch" for stage in ("sft", "rm", "ppo")}
    assert desk.calls("sbatch") == [
        *(f"sbatch --test-only --job-name=tiny-{stage} {script}" for stage, script in scripts.items()),
        f"sbatch --parsable --job-name=tiny-sft {scripts['sft']}",
        f"sbatch --parsable --job-name=tiny-rm --dependency=afterok:41 --kill-on-invalid-dep=yes {scripts['rm']}",
        f"sbatch --parsable --job-name=tiny-ppo --dependency=afterok:42 --kill-on-invalid-dep=yes {scripts['ppo']}",
    ]
    assert set(desk.calls("in a job")) == {"in a job: no"}, "what a surrounding job says reached sbatch"
    noted = json.loads((desk.folder / "jobs.json").read_text())
    assert {stage: (entry["job"], entry["after"], entry["name"]) for stage, entry in noted["jobs"].items()} == {
        "sft": ("41", None, "tiny-sft"),
        "rm": ("42", "sft", "tiny-rm"),
        "ppo": ("43", "rm", "tiny-ppo"),
    }
    assert " ppo recipe.yaml --seed 3 --data.max_prompt_tokens=99 &\n" in (desk.folder / "ppo.sbatch").read_text()
    out = capsys.readouterr().out
    assert "rm: job 42 after sft, log runs/tiny/slurm/rm-42.log\n" in out
    assert "squeue --me --jobs=41,42,43\n" in out
    assert "tristage status runs/tiny\n" in out
    assert "scancel 41 42 43\n" in out


def test_a_dry_run_writes_scripts_and_submits_nothing(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    main(["launch", "recipe.yaml", "--stages", "sft,dpo", "--dry-run"])
    assert desk.calls() == []
    assert sorted(file.name for file in desk.folder.iterdir()) == ["dpo.sbatch", "sft.sbatch"]
    out = capsys.readouterr().out
    assert out.endswith(
        "sft=$(sbatch --parsable --job-name=tiny-sft runs/tiny/slurm/sft.sbatch)\n"
        "dpo=$(sbatch --parsable --job-name=tiny-dpo --dependency=afterok:$sft --kill-on-invalid-dep=yes "
        "runs/tiny/slurm/dpo.sbatch)\n"
    )
    assert "no GPU" not in out


@pytest.mark.parametrize(("words", "said"), [([], True), (["--launch.slurm.gpus", "2"], False)])
def test_that_no_gpu_is_asked_for_is_said(
    desk: Desk, words: list[str], said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["launch", "recipe.yaml", "--stages", "sft", "--launch.processes", "2", *words, "--dry-run"])
    assert ("no GPU is asked for (launch.slurm.gpus)\n" in capsys.readouterr().out) == said


def test_without_sbatch_only_a_dry_run_works(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(desk.path))
    assert "there is no sbatch on this machine. Run this where jobs" in refusal(["launch", "recipe.yaml"], capsys)
    assert not desk.folder.exists()
    main(["launch", "recipe.yaml", "--dry-run"])
    assert "there is no sbatch on this machine" in capsys.readouterr().out


def test_a_chain_that_runs_is_not_launched_again(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    main(["launch", "recipe.yaml", "--stages", "sft,rm"])
    before = len(desk.calls())
    text = refusal(["launch", "recipe.yaml"], capsys)
    assert "launched already: sft (job 41, PENDING), rm (job 42, PENDING)" in text
    assert "`scancel 41 42`" in text
    assert len(desk.calls()) == before


def test_an_option_that_renames_the_job_does_not_hide_it(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    rename = ["--launch.slurm.options", "[--job-name=mine]"]
    main(["launch", "recipe.yaml", "--stages", "sft", *rename])
    assert "#SBATCH --job-name=mine\n" in (desk.folder / "sft.sbatch").read_text()
    assert "launched already: sft (job 41, PENDING)" in refusal(["launch", "recipe.yaml", *rename], capsys)


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_chain_that_is_over_may_be_launched_again(
    desk: Desk, forgotten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["launch", "recipe.yaml"])
    if forgotten:
        (desk.path / "jobs").write_text("")
    monkeypatch.setenv("STATE", "CANCELLED")
    main(["launch", "recipe.yaml", "--stages", "sft"])
    noted = json.loads((desk.folder / "jobs.json").read_text())["jobs"]
    assert {stage: entry["job"] for stage, entry in noted.items()} == {"rm": "42", "ppo": "43", "sft": "44"}


def test_the_number_of_somebody_elses_job_is_no_obstacle(desk: Desk) -> None:
    main(["launch", "recipe.yaml", "--stages", "sft"])
    (desk.path / "jobs").write_text("41 other\n")
    main(["launch", "recipe.yaml", "--stages", "sft"])


def test_nothing_is_submitted_when_slurm_does_not_answer(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["launch", "recipe.yaml"])
    before = len(desk.calls())
    monkeypatch.setenv("DOWN", "1")
    assert "Slurm does not answer: Unable to contact" in refusal(["launch", "recipe.yaml"], capsys)
    assert len(desk.calls()) == before


def test_a_wrong_request_is_refused_before_anything_is_submitted(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REFUSED_FIRST", "ppo.sbatch")
    text = refusal(["launch", "recipe.yaml"], capsys)
    assert "Slurm would refuse the job of ppo: allocation failure: Invalid account. Nothing was submitted" in text
    assert all("--test-only" in call for call in desk.calls("sbatch"))


def test_a_chain_that_is_refused_half_way_is_taken_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REFUSED", "ppo.sbatch")
    assert "sbatch refused the job of ppo" in refusal(["launch", "recipe.yaml"], capsys)
    assert desk.calls("scancel") == ["scancel 41 42"]
    assert not (desk.folder / "jobs.json").exists()


@pytest.mark.parametrize(("script", "taken_back"), [("sft.sbatch", "41"), ("rm.sbatch", "41 42")])
def test_a_chain_that_is_interrupted_is_taken_back(
    desk: Desk, script: str, taken_back: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job that was being submitted too."""
    monkeypatch.setenv("INTERRUPTS", script)
    with pytest.raises(SystemExit) as caught:
        main(["launch", "recipe.yaml"])
    assert caught.value.code == 130
    assert desk.calls("scancel") == [f"scancel {taken_back}"]
    assert not (desk.folder / "jobs.json").exists()


def test_jobs_that_cannot_be_written_down_are_taken_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(file: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr("pipeline.launch.submit.write_json", full)
    assert "jobs.json: the disk is full" in refusal(["launch", "recipe.yaml"], capsys)
    assert desk.calls("scancel") == ["scancel 41 42 43"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--stages", "sft,dqo"], "--stages: unknown stage 'dqo'"),
        (["--launcher", "pbs"], "--launcher: unknown launcher 'pbs'. Known: slurm, jobset"),
        (["--stages", "ppo"], "ppo reads runs/tiny/sft, which does not exist. Put sft before it in --stages"),
        (["--stages", "sft,ppo"], "ppo reads runs/tiny/rm, which does not exist. Put rm before it in --stages"),
        (["--model.name_or_path", "./absent"], "nothing was launched.\nsft: model.name_or_path: absent does not exist"),
        (
            ["--launch.processes", "4", "--launch.slurm.gpus", "2"],
            "launch.processes is 4, but launch.slurm.gpus asks for 2",
        ),
    ],
)
def test_what_could_not_run_is_refused(
    desk: Desk, words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in refusal(["launch", "recipe.yaml", *words], capsys)
    assert desk.calls() == []


def test_an_unfinished_run_of_something_else_is_refused(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    partial = desk.path / "runs" / "tiny" / "sft.partial"
    partial.mkdir(parents=True)
    write_json(partial / "job.json", {"stage": "sft", "fingerprint": {"sha256": "0"}, "spent": {"wall_seconds": 0}})
    text = refusal(["launch", "recipe.yaml"], capsys)
    assert "sft: runs/tiny/sft.partial is an unfinished run of something else" in text
    assert "Move the directory away" in text


def test_jobs_are_read_from_scontrol() -> None:
    text = (
        "JobId=9 JobName=tiny-rm UserId=me(1) Priority=1 JobState=FAILED Reason=NonZeroExitCode Requeue=1 Restarts=2 "
        "ExitCode=3:0 Command=/tmp/JobState=no WorkDir=/tmp/a Restarts=7 b\n"
    )
    state = parse_job("9", text)
    assert (state.name, state.state, state.reason) == ("tiny-rm", "FAILED", "NonZeroExitCode")
    assert (state.restarts, state.exit_code, state.alive) == (2, 3, False)
    killed = parse_job("9", "JobName=x JobState=COMPLETING Reason=None Restarts=0 ExitCode=0:9")
    assert (killed.reason, killed.exit_code, killed.alive) == ("", 137, True)


@pytest.mark.parametrize(("code", "known"), [(0, True), (1, False)])
def test_accounting_is_asked_for_jobs_that_the_controller_has_forgotten(desk: Desk, code: int, known: bool) -> None:
    sacct = desk.path / "bin" / "sacct"
    sacct.write_text(f"#!/bin/bash\necho '77|tiny-rm|CANCELLED by 0|0:15'\nexit {code}\n")
    sacct.chmod(0o755)
    (desk.path / "jobs").write_text("")
    states = Slurm().states(["77"])
    assert [state.state for state in states.values()] == (["CANCELLED"] if known else [])


def test_a_damaged_jobs_file_is_named(desk: Desk) -> None:
    from pipeline.launch.submit import read_jobs

    desk.folder.mkdir(parents=True)
    (desk.folder / "jobs.json").write_text("{")
    with pytest.raises(UserError, match=r"jobs.json is corrupted"):
        read_jobs(desk.folder)
