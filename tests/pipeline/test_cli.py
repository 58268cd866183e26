from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = str(ROOT / "recipes" / "demo.yaml")


@pytest.mark.parametrize(
    "words",
    [
        ["show", RECIPE, "--seed", "7", "--ppo.kl_coef=0.25"],
        ["show", "--seed", "7", RECIPE, "--ppo.kl_coef", "0.25"],
        ["show", "--ppo.kl_coef=0.25", "--seed=7", RECIPE],
    ],
)
def test_overrides_may_stand_anywhere(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    out = capsys.readouterr().out
    assert "\nseed: 7\n" in out
    assert "\n  kl_coef: 0.25\n" in out


def test_negative_values_and_nulls_are_values(capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", "--data.split_seed", "-3", RECIPE, "--ppo.cliprange_value", "null"])
    out = capsys.readouterr().out
    assert "split_seed: -3\n" in out
    assert "cliprange_value: null\n" in out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["show", "absent.yaml"], "recipe absent.yaml does not exist"),
        (["run", RECIPE, "--stages", "sft,dqo"], "--stages: unknown stage 'dqo'. Stages are sft, rm, ppo"),
        (["chat", "somewhere", "--temprature", "2"], "unknown argument '--temprature 2'"),
        (["doctor", "--verbose"], "unknown argument '--verbose'"),
        (["sft", RECIPE, "--overwrit"], "Did you mean --overwrite?"),
    ],
)
def test_wrong_words_exit_with_2_and_one_paragraph(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err


@pytest.mark.parametrize("words", [[], ["fly"], ["sft"], ["sft", RECIPE, "another.yaml"]])
def test_wrong_commands_show_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: tristage" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for command in ("show", "plan", "sft", "rm", "ppo", "run", "generate", "chat", "doctor"):
        assert f"    {command} " in out


def test_show_and_plan_import_no_heavy_library() -> None:
    code = (
        "import sys; from pipeline.cli import main; main(['show', sys.argv[1]]); main(['plan', sys.argv[1]]); "
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'vllm', 'wandb', 'matplotlib', 'numpy', 'pyarrow'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    words = [sys.executable, "-c", code, RECIPE]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    words = [sys.executable, "-m", "pipeline.cli", "show", RECIPE]
    shell = f"{' '.join(words)} | true"
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.stderr == ""
