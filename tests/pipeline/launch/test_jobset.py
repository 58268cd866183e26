"""The Kubernetes rendering of a chain: what it says, and that its schema notices what is wrong."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.launch.jobset import JobSet, render
from pipeline.recipe import Recipe
from tests.pipeline.launch.conftest import job_of

RecipeOf = Callable[[str], Recipe]
LAUNCH = """{machines: 2, processes: 4, slurm: {gpus: 4, container: "nvcr.io#nvidia/pytorch:26.01", max_requeues: 5,
  signal_seconds: 60, env: {NCCL_DEBUG: WARN}, setup: ["ulimit -l unlimited"]}}"""


@pytest.fixture
def document(recipe_of: RecipeOf) -> dict[str, Any]:
    recipe = recipe_of(LAUNCH).model_copy(update={"name": "My_Run.7"})
    jobs = [job_of(stage, Path("/data"), "--name", "it's mine") for stage in ("sft", "rm", "ppo")]
    return yaml.safe_load(render(recipe, jobs))


def container_of(document: dict[str, Any], index: int) -> dict[str, Any]:
    job = document["spec"]["replicatedJobs"][index]["template"]["spec"]
    return job["template"]["spec"]["containers"][0]


def test_the_chain(document: dict[str, Any]) -> None:
    assert document["metadata"] == {"name": "my-run-7"}
    jobs = document["spec"]["replicatedJobs"]
    assert [job["name"] for job in jobs] == ["sft", "rm", "ppo"]
    assert [job.get("dependsOn") for job in jobs] == [
        None,
        [{"name": "sft", "status": "Complete"}],
        [{"name": "rm", "status": "Complete"}],
    ]
    spec = jobs[0]["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"], spec["backoffLimit"]) == (
        8,
        8,
        "Indexed",
        0,
    )
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 5


def test_the_ranks_of_a_stage(document: dict[str, Any]) -> None:
    container = container_of(document, 1)
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["MASTER_ADDR"] == "my-run-7-rm-0-0.my-run-7"  # <jobset>-<job>-<index>-<pod>.<subdomain>
    assert (environment["WORLD_SIZE"], environment["LOCAL_RANK"], environment["NCCL_DEBUG"]) == ("8", "0", "WARN")
    assert container["image"] == "nvcr.io/nvidia/pytorch:26.01"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    assert container["command"][:2] == ["bash", "-c"]
    script = container["command"][2]
    assert "exec tristage rm recipe.yaml --name 'it'\"'\"'s mine'; fi\n" in script
    assert "exec python -m reward_model.train runs/My_Run.7/rm.partial\n" in script
    assert script.startswith("ulimit -l unlimited\nexport RANK=$JOB_COMPLETION_INDEX\n")
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("length", "fits"), [(54, True), (55, False)])
def test_a_name_that_is_too_long_is_named(recipe_of: RecipeOf, length: int, fits: bool) -> None:
    """54 + len("-ppo-0-15") = 63."""
    recipe = recipe_of("{machines: 2, processes: 8}").model_copy(update={"name": "a" * length})
    jobs = [job_of(stage, Path("/data")) for stage in ("sft", "ppo")]
    if fits:
        render(recipe, jobs)
        return
    with pytest.raises(
        UserError, match=r"`name` is too long .*63 characters is the limit\. Take 1 characters off `name`"
    ):
        render(recipe, jobs)


def test_it_passes_its_schema(document: dict[str, Any]) -> None:
    JobSet.model_validate(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("apiVersion",), "jobset.x-k8s.io/v1"),
        (("metadata", "name"), "Upper_case"),
        (("spec", "replicatedjobs"), []),
        (("spec", "network", "enableDnsHostnames"), True),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        (("spec", "failurePolicy", "rules", 0, "name"), "with-hyphen"),
        (("spec", "replicatedJobs", 1, "dependsOn"), [{"name": "sft", "status": "Succeeded"}]),
        (("spec", "replicatedJobs", 1, "dependsOn"), [{"name": n, "status": "Complete"} for n in ("sft", "rm")]),
        (("spec", "replicatedJobs", 0, "template", "spec", "completions"), "8"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "restartPolicy"), "OnFailure"),
    ],
)
def test_the_schema_notices(document: dict[str, Any], path: tuple[str | int, ...], value: object) -> None:
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValidationError):
        JobSet.model_validate(document)


@pytest.mark.parametrize("words", [["--dry-run"], []])
def test_it_is_only_written(
    words: list[str], recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "sft.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    recipe_of("{}")
    options = ["--data.sft", "sft.jsonl", "--stages", "sft", "--launcher", "jobset"]
    main(["launch", "recipe.yaml", *options, *words])
    out = capsys.readouterr().out
    assert "nothing was submitted" in out
    assert "kubectl apply -f runs/tiny/kubernetes/jobset.yaml" in out
    text = Path("runs/tiny/kubernetes/jobset.yaml").read_text()
    JobSet.model_validate(yaml.safe_load(text))
    assert "              - |\n" in text  # the script as a block that a person can read
