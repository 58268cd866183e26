"""Slurm: the job script of a stage, and the commands that submit, watch and cancel jobs.

The script comes from a Jinja2 template, `configs/slurm/stage.sbatch` or the recipe's `launch.slurm.template`, which is
given `name`, `stage`, `launch` (the recipe's section), `job` (a `StageJob`), `world`, `folder` and `log` (where
output goes), `marker` and `start`, the words that start tristage. The filter `sh` quotes a value for the shell and for
lines `#SBATCH`, in which Slurm reads quotes as a shell does.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.errors import UserError
from pipeline.launch.launcher import JobState, StageJob
from pipeline.recipe import Recipe
from pipeline.stages import run_directory

TEMPLATE = Path(__file__).resolve().parent.parent.parent / "configs" / "slurm" / "stage.sbatch"
MARKER = "requeue.json"
"""In `<stage>.partial`: written by a stage that saved its state because it was told to."""
DEPENDENCY = ("--dependency=afterok:{}", "--kill-on-invalid-dep=yes")
_FIELDS = re.compile(r"(?<!\S)(JobName|JobState|Reason|Restarts|ExitCode)=(\S*)")
_UNKNOWN_JOB = "Invalid job id"


class Slurm:
    """The cluster that `sbatch` on this machine submits to.

    Errors:
        UserError: a command of Slurm is missing or fails; its own words are passed on.
    """

    def __init__(self) -> None:
        if not is_available():
            raise UserError(
                "there is no sbatch on this machine.",
                mend="Run this where jobs of your cluster are submitted; --dry-run only writes the scripts.",
            )

    def check(self, jobs: Sequence[StageJob]) -> None:
        """`sbatch --test-only` of every script: a partition, account or size that is not to be had is refused now."""
        for job in jobs:
            done = _run("sbatch", "--test-only", *options_of(job), str(job.script))
            if done.returncode:
                raise UserError(
                    f"Slurm would refuse the job of {job.stage}: {_brief(done.stderr)}.",
                    mend=f"Nothing was submitted. Mend launch.slurm in the recipe; the request is in {job.script}.",
                )

    def submit(self, jobs: Sequence[StageJob], note: Callable[[Mapping[str, str]], None]) -> dict[str, str]:
        """Submits each job to start when the one before it has succeeded; cancels all on any error and on Ctrl-C."""
        submitted: dict[str, str] = {}
        with ExitStack() as taking_back:
            taking_back.callback(lambda: self.cancel(list(submitted.values())))
            for job in jobs:
                before = list(submitted.values())[-1:]
                with _no_interrupt():
                    done = _run("sbatch", "--parsable", *options_of(job, *before), str(job.script))
                    number = done.stdout.strip().partition(";")[0]
                    if done.returncode == 0 and number.isdigit():
                        submitted[job.stage] = number
                if job.stage not in submitted:
                    raise UserError(
                        f"sbatch refused the job of {job.stage}: {_brief(done.stderr or done.stdout)}.",
                        mend="The jobs before it were cancelled. Mend launch.slurm in the recipe.",
                    )
            note(submitted)
            taking_back.pop_all()
        return submitted

    def states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        """From `scontrol show job`, which forgets jobs minutes after their end; then from accounting."""
        found: dict[str, JobState] = {}
        for job in jobs:
            done = _run("scontrol", "--oneliner", "show", "job", job)
            if done.returncode == 0:
                found[job] = parse_job(job, done.stdout)
            elif _UNKNOWN_JOB not in done.stderr:
                raise UserError(f"Slurm does not answer: {_brief(done.stderr)}.", mend="Try again later.")
        forgotten = [job for job in jobs if job not in found]
        return found | (_accounted(forgotten) if forgotten else {})

    def cancel(self, jobs: Sequence[str]) -> None:
        """`scancel` of these jobs; those that are over stay as they are."""
        if jobs:
            _run("scancel", *jobs)


def is_available() -> bool:
    """Whether this machine submits to a cluster."""
    return shutil.which("sbatch") is not None


def options_of(job: StageJob, *before: str) -> list[str]:
    """Options of sbatch that win over the script's own: the name, which no template or option may change, and what the
    job waits for: it starts when the jobs `before` have succeeded, and is cancelled when one of them has not."""
    return [f"--job-name={job.name}", *(word.format(":".join(before)) for word in DEPENDENCY if before)]


def exit_file(script: Path, stage: str, job: str) -> Path:
    """Where a job's script writes the code that it ends with."""
    return script.with_name(f"{stage}-{job}.exit")


def render(recipe: Recipe, job: StageJob) -> str:
    """The job script of a stage.

    Errors:
        UserError: the template is missing or wrong.
    """
    from jinja2 import Environment, StrictUndefined, TemplateError, TemplateSyntaxError

    slurm = recipe.launch.slurm
    file = Path(slurm.template) if slurm.template else TEMPLATE
    mend = (
        "Mend launch.slurm.template, or take it out of the recipe." if slurm.template else "Set launch.slurm.template."
    )
    if not file.is_file():
        raise UserError(f"the template {file} of job scripts does not exist.", mend=mend)
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    partial = run_directory(recipe) / f"{job.stage}.partial"
    values = {
        "name": recipe.name,
        "stage": job.stage,
        "launch": recipe.launch,
        "job": job,
        "world": recipe.launch.world,
        "marker": str(partial / MARKER),
        "folder": str(job.script.parent),
        "log": str(job.log.parent).replace("%", "%%") + f"/{job.log.name}",
        "start": start_words(recipe),
    }
    try:
        return environment.from_string(file.read_text(encoding="utf-8")).render(values)
    except TemplateSyntaxError as error:
        raise UserError(f"{file}:{error.lineno}: {(error.message or '').rstrip('.')}.", mend=mend) from error
    except TemplateError as error:
        raise UserError(f"{file}: {error.message}.", mend=mend) from error


def start_words(recipe: Recipe) -> list[str]:
    """What starts tristage in a job: this very Python, or `tristage` of the environment that `setup` makes."""
    return ["tristage"] if recipe.launch.slurm.setup else [sys.executable, "-m", "pipeline.cli"]


def parse_job(job: str, text: str) -> JobState:
    """Reads a line of `scontrol --oneliner show job`."""
    fields: dict[str, str] = {}
    for key, value in _FIELDS.findall(text):
        fields.setdefault(key, value)
    code, _, number = fields.get("ExitCode", "0:0").partition(":")
    reason = fields.get("Reason", "None")
    return JobState(
        job=job,
        name=fields.get("JobName", ""),
        state=fields.get("JobState", "UNKNOWN"),
        reason="" if reason == "None" else reason,
        restarts=int(fields.get("Restarts", "0")),
        exit_code=int(code) or (128 + int(number) if int(number or 0) else 0),
    )


def _accounted(jobs: Sequence[str]) -> dict[str, JobState]:
    """Jobs that only accounting remembers; none where a site keeps no accounts."""
    if shutil.which("sacct") is None:
        return {}
    columns = "JobID,JobName,State,ExitCode"
    done = _run("sacct", "-X", "-n", "-P", f"--format={columns}", f"--jobs={','.join(jobs)}")
    found = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        job, name, state, code = line.split("|")
        number = int(code.partition(":")[0] or 0)
        found[job] = JobState(job, name, state.partition(" ")[0], exit_code=number)  # "CANCELLED by 1000"
    return found


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Keeps Ctrl-C waiting until the block is over: a job has its number then."""
    received: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of Slurm, without what a surrounding job says of itself."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"
    }
    try:
        return subprocess.run(
            words, env=environment, capture_output=True, text=True, check=False, process_group=0
        )  # a Ctrl-C at the terminal is for this process alone
    except FileNotFoundError as error:
        raise UserError(f"there is no {words[0]} on this machine.", mend="Run this on your cluster.") from error


def _brief(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines).rstrip(".") or "it says nothing"
