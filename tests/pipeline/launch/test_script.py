"""The job script: its text, and what it does when it is signalled, with stand-ins for Slurm's commands."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.launch.slurm import render
from pipeline.recipe import Recipe
from tests.pipeline.launch.conftest import job_of

HERE = Path(__file__).parent
RecipeOf = Callable[[str], Recipe]
FULL = """{machines: 2, processes: 8, slurm: {partition: gpu, account: me, qos: long, time: "2-00:00:00", gpus: 8,
  cpus_per_task: 12, memory: 900G, constraint: "a100|h100", modules: [cuda/13.0], signal_seconds: 300,
  env: {NCCL_DEBUG: WARN, NOTE: 'two words; $HOME `x` "'}, options: [--exclusive, "--exclude=n[7-8]"],
  setup: [source /sw/envs/rlhf/bin/activate, ulimit -l unlimited]}}"""
NASTY = """it's $HOME "quoted" `date`; rm -rf * \\ end"""


def test_every_setting_has_its_line(recipe_of: RecipeOf) -> None:
    job = job_of("ppo", Path("/data/it's 100% here"), "--seed", "7")
    text = render(recipe_of(FULL), job)
    assert text.startswith((HERE / "full.sbatch").read_text())
    assert "\ntristage ppo recipe.yaml --seed 7 &\n" in text
    assert "its 16 processes with srun" in text


def test_a_script_without_settings(recipe_of: RecipeOf) -> None:
    text = render(recipe_of("{}"), job_of("sft", Path("/data")))
    assert text == (HERE / "minimal.sbatch").read_text().replace("PYTHON", shlex.quote(sys.executable))


@pytest.mark.parametrize("launch", ["{}", FULL])
def test_bash_reads_the_script(recipe_of: RecipeOf, launch: str) -> None:
    text = render(recipe_of(launch), job_of("ppo", Path("/data/it's"), "--name", NASTY))
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_template_of_the_users_own(recipe_of: RecipeOf, tmp_path: Path) -> None:
    template = tmp_path / "own.sbatch"
    template.write_text("#!/bin/sh\n{{ start | map('sh') | join(' ') }} {{ stage }} {{ launch.slurm.account | sh }}\n")
    recipe = recipe_of(f"{{slurm: {{template: {template}, account: a b, setup: [':']}}}}")
    assert render(recipe, job_of("rm", tmp_path)) == "#!/bin/sh\ntristage rm 'a b'\n"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("one\n{{ stage\n", r"own.sbatch:2: unexpected end of template.*Mend launch.slurm.template"),
        ("{{ stag }}", r"own.sbatch: 'stag' is undefined\. Mend launch.slurm.template"),
        (None, r"template .*own.sbatch of job scripts does not exist\. Mend launch.slurm.template"),
    ],
)
def test_a_wrong_template_is_named(recipe_of: RecipeOf, tmp_path: Path, text: str | None, error: str) -> None:
    template = tmp_path / "own.sbatch"
    if text is not None:
        template.write_text(text)
    with pytest.raises(UserError, match=error):
        render(recipe_of(f"{{slurm: {{template: {template}}}}}"), job_of("rm", tmp_path))


SCONTROL = """\
#!/bin/bash
case "$1 $2" in
    "show hostnames") echo n7; echo n8 ;;
    "show node") echo "NodeName=$3 Arch=x86_64 NodeAddr=127.0.0.5 NodeHostName=$3" ;;
    "show job") echo "JobId=$3 JobState=RUNNING $FACTS" ;;
    requeue*) echo "requeue $2" >>calls; exit "$REQUEUE_CODE" ;;
esac
"""
SCANCEL = """\
#!/bin/bash
echo "scancel $*" >>calls
kill "-${1#--signal=}" "$(cat stage.pid)"
"""
SLEEP = """\
#!/bin/bash
PATH=${PATH#*:}
[ "$1" = 20 ] && exec sleep "${PAUSE:-20}"
exec sleep "$1"
"""
STAGE = """\
#!/bin/bash
python3 - "$@" <<'END'
import json, os, sys
keys = ("MASTER_ADDR", "MASTER_PORT", "TRISTAGE_LAUNCHER", "TRISTAGE_REQUEUE")
open("told.json", "w").write(json.dumps({"words": sys.argv[1:], **{key: os.environ[key] for key in keys}}))
END
marker=runs/tiny/ppo.partial/requeue.json
save() { sleep 0.2; mkdir -p runs/tiny/ppo.partial; echo '{}' >$marker; exit 75; }
case $ON_SIGNAL in
    save) trap save USR1 TERM ;;
    ignore) trap 'sleep 0.2' USR1 ;;
    late) trap '' USR1 ;;
esac
echo $$ >stage.tmp; mv stage.tmp stage.pid
[ $ON_SIGNAL = late ] && { sleep 1; trap save USR1; }
for _ in $(seq "$TENTHS"); do sleep 0.1; done
[ "$LEAVES_MARKER" = 1 ] && echo '{}' >$marker
exit "$CODE"
"""


@dataclass
class Job:
    """A job script with stand-ins for the commands that it calls."""

    path: Path

    @property
    def marker(self) -> Path:
        return self.path / "runs/tiny/ppo.partial/requeue.json"

    @property
    def exit_code_left(self) -> str | None:
        file = self.path / "runs/tiny/slurm/ppo-7.exit"
        return file.read_text().strip() if file.exists() else None

    def calls(self) -> list[str]:
        file = self.path / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def run(self, number: signal.Signals | None = None, **settings: str) -> int:
        """Runs the script, signals it once the stage runs, and returns its exit code."""
        base = {"ON_SIGNAL": "save", "TENTHS": "0", "CODE": "0", "LEAVES_MARKER": "0", "REQUEUE_CODE": "0"}
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[7-8]", "FACTS": "Reason=None PreemptTime=None"}
        path = {"PATH": f"{self.path / 'bin'}:{os.environ['PATH']}"}
        words = ["bash", "runs/tiny/slurm/ppo.sbatch"]
        process = subprocess.Popen(words, cwd=self.path, env=os.environ | base | job | path | settings)
        if number is not None:
            deadline = time.monotonic() + 30
            while not (self.path / "stage.pid").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(number)
        return process.wait(timeout=30)


@pytest.fixture
def job(recipe_of: RecipeOf, tmp_path: Path) -> Job:
    folder = tmp_path / "runs" / "tiny" / "slurm"
    for directory in (folder, tmp_path / "runs/tiny/ppo.partial", tmp_path / "bin"):
        directory.mkdir(parents=True)
    for name, text in {"scontrol": SCONTROL, "scancel": SCANCEL, "sleep": SLEEP, "tristage": STAGE}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    recipe = recipe_of("{processes: 2, slurm: {setup: [':'], max_requeues: 3}}")
    (folder / "ppo.sbatch").write_text(render(recipe, job_of("ppo", tmp_path, "--name", NASTY)))
    return Job(tmp_path)


def test_a_stage_that_completes(job: Job) -> None:
    assert job.run() == 0
    assert job.calls() == []
    assert job.exit_code_left == "0"
    told = json.loads((job.path / "told.json").read_text())
    assert told == {
        "words": ["ppo", "recipe.yaml", "--name", NASTY],
        "MASTER_ADDR": "127.0.0.5",
        "MASTER_PORT": "10007",
        "TRISTAGE_LAUNCHER": "srun",
        "TRISTAGE_REQUEUE": "1",
    }


def test_a_stage_that_fails(job: Job) -> None:
    assert job.run(CODE="2") == 2
    assert job.calls() == []
    assert job.exit_code_left == "2"


def test_the_marker_of_an_earlier_start_does_not_count(job: Job) -> None:
    job.marker.write_text("{}")
    assert job.run(CODE="2") == 2
    assert job.calls() == []


def test_near_the_time_limit_the_stage_saves_and_the_job_is_requeued(job: Job) -> None:
    assert job.run(signal.SIGUSR1, TENTHS="200") == 75
    assert job.calls() == ["scancel --signal=USR1 7", "requeue 7"]
    assert not job.marker.exists()
    assert job.exit_code_left is None


def test_processes_that_still_start_are_told_again(job: Job) -> None:
    assert job.run(signal.SIGUSR1, ON_SIGNAL="late", TENTHS="200", PAUSE="0.2") == 75
    *told, last = job.calls()
    assert len(told) > 1
    assert set(told) == {"scancel --signal=USR1 7"}
    assert last == "requeue 7"


def test_a_signal_before_the_stage_started_is_not_lost(job: Job) -> None:
    script = job.path / "runs/tiny/slurm/ppo.sbatch"
    script.write_text(script.read_text().replace("\n:\n", "\nkill -USR1 $$; kill -USR1 $$\n"))
    assert job.run(TENTHS="200", PAUSE="0.2") == 75
    assert job.calls()[0] == "scancel --signal=USR1 7"
    assert job.calls()[-1] == "requeue 7"


def test_signals_make_one_teller(job: Job) -> None:
    script = job.path / "runs/tiny/slurm/ppo.sbatch"
    script.write_text(script.read_text().replace("\n:\n", "\nkill -USR1 $$\n"))
    assert job.run(signal.SIGUSR1, ON_SIGNAL="ignore", TENTHS="10") == 0
    assert job.calls() == ["scancel --signal=USR1 7"]


def test_a_stage_that_completes_in_spite_of_the_signal(job: Job) -> None:
    assert job.run(signal.SIGUSR1, ON_SIGNAL="ignore", TENTHS="10") == 0
    assert job.calls() == ["scancel --signal=USR1 7"]
    assert job.exit_code_left == "0"


def test_a_failure_after_the_signal_keeps_its_code(job: Job) -> None:
    assert job.run(signal.SIGUSR1, ON_SIGNAL="ignore", TENTHS="10", CODE="3") == 3
    assert job.calls() == ["scancel --signal=USR1 7"]


def test_a_cancelled_job_saves_and_is_not_requeued(job: Job) -> None:
    assert job.run(signal.SIGTERM, TENTHS="200") == 75
    assert job.calls() == ["scancel --signal=TERM 7"]
    assert job.marker.exists()
    assert job.exit_code_left == "75"


def test_a_state_saved_at_the_very_time_limit_is_not_lost(job: Job) -> None:
    assert job.run(signal.SIGTERM, TENTHS="200", FACTS="Reason=TimeLimit PreemptTime=None") == 75
    assert job.calls() == ["scancel --signal=TERM 7", "requeue 7"]


@pytest.mark.parametrize(("restarts", "requeued"), [("2", True), ("3", False)])
def test_requeues_are_counted(job: Job, restarts: str, requeued: bool) -> None:
    assert job.run(signal.SIGUSR1, TENTHS="200", SLURM_RESTART_COUNT=restarts) == 75
    assert ("requeue 7" in job.calls()) == requeued
    assert job.exit_code_left == (None if requeued else "75")


@pytest.mark.parametrize("restarts", ["0", "3"])
def test_a_job_with_a_marker_never_ends_well(job: Job, restarts: str) -> None:
    """Or the stages after it would start on a model that is half trained."""
    assert job.run(LEAVES_MARKER="1", SLURM_RESTART_COUNT=restarts) == 75


def test_pre_empted_while_it_started(job: Job) -> None:
    assert job.run(CODE="143", FACTS="Reason=None PreemptTime=2026-11-28T17:52:46") == 75
    assert job.calls() == ["requeue 7"]


def test_pre_empted_when_all_was_done(job: Job) -> None:
    assert job.run(FACTS="Reason=None PreemptTime=2026-11-28T17:52:46") == 0
    assert job.calls() == []


def test_a_requeue_that_is_refused(job: Job) -> None:
    assert job.run(LEAVES_MARKER="1", CODE="75", REQUEUE_CODE="1") == 75
    assert job.exit_code_left == "75"
