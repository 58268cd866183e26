"""The chain as a Kubernetes JobSet: rendered, checked by its schema, and not submitted.

One replicated job per stage, each created when the one before it is complete; one pod per process, with one GPU where
GPUs are asked for. Pod 0 runs `tristage`, which prepares the stage's directory on the shared volume; the others wait
for it and start as its ranks. A stage that leaves with `EXIT_REQUEUE`, or whose pod is evicted, restarts the set, in
which finished stages are skipped and the unfinished one resumes; any other failure ends it.

The classes hold the fields used, by their published types: JobSet of jobset.x-k8s.io/v1alpha2
(kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go, with `dependsOn` and failure policy rules: version 0.8 and
later), Job of batch/v1 and Pod of core/v1. Nothing here has been run on a cluster. Before you apply the file, put in
your image (`launch.slurm.container`) and the claim of the volume that holds the recipe and the data.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from pipeline.errors import UserError
from pipeline.exits import EXIT_REQUEUE
from pipeline.launch.launcher import StageJob
from pipeline.recipe import Recipe
from pipeline.stages import STAGES, run_directory

PORT = 29500
IMAGE, CLAIM = "tristage:latest", "tristage"
PYTHON = "python"
LONGEST = 63
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=LONGEST)]
"""A DNS label of RFC 1123, which names become parts of."""


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, populate_by_name=True, strict=True)


class EnvVar(_Object):
    name: str
    value: str


class VolumeMount(_Object):
    name: Label
    mount_path: str


class Resources(_Object):
    limits: dict[str, str]


class Container(_Object):
    name: Label
    image: str
    command: list[str]
    env: list[EnvVar]
    working_dir: str
    resources: Resources | None = None
    volume_mounts: list[VolumeMount]


class Claim(_Object):
    claim_name: str


class Volume(_Object):
    name: Label
    persistent_volume_claim: Claim


class PodSpec(_Object):
    restart_policy: Literal["Never"]  # Job: a pod failure policy wants it
    termination_grace_period_seconds: int
    containers: list[Container]
    volumes: list[Volume]


class PodTemplate(_Object):
    spec: PodSpec


class ExitCodes(_Object):
    operator: Literal["In", "NotIn"]
    values: list[int]


class PodCondition(_Object):
    type: str
    status: Literal["True", "False", "Unknown"] = "True"


class PodFailureRule(_Object):
    action: Literal["FailJob", "Ignore", "Count", "FailIndex"]
    on_exit_codes: ExitCodes | None = None
    on_pod_conditions: list[PodCondition] | None = None


class PodFailurePolicy(_Object):
    rules: list[PodFailureRule]


class JobSpec(_Object):
    parallelism: int
    completions: int
    completion_mode: Literal["Indexed", "NonIndexed"]
    backoff_limit: int
    pod_failure_policy: PodFailurePolicy
    template: PodTemplate


class JobTemplate(_Object):
    spec: JobSpec


class DependsOn(_Object):
    name: Label
    status: Literal["Ready", "Complete"]


class ReplicatedJob(_Object):
    name: Label
    replicas: int
    depends_on: Annotated[list[DependsOn], Field(max_length=1)] | None = None
    template: JobTemplate


class FailureRule(_Object):
    name: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    action: Literal["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
    on_job_failure_reasons: list[str] | None = None


class FailurePolicy(_Object):
    max_restarts: int
    rules: list[FailureRule]


class Network(_Object):
    enable_dns_hostnames: bool = Field(alias="enableDNSHostnames")
    subdomain: Label


class JobSetSpec(_Object):
    network: Network
    failure_policy: FailurePolicy
    replicated_jobs: list[ReplicatedJob]


class Metadata(_Object):
    name: Label


class JobSet(_Object):
    """The document."""

    api_version: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: Metadata
    spec: JobSetSpec


def render(recipe: Recipe, jobs: Sequence[StageJob]) -> str:
    """The YAML of a chain of stages.

    Errors:
        UserError: the recipe's name is too long to call pods after.
    """
    name = re.sub(r"[^a-z0-9]+", "-", recipe.name.lower()).strip("-")
    hosts = [f"{name}-{job.stage}-0-{recipe.launch.world - 1}" for job in jobs]
    too_long = [host for host in hosts if len(host) > LONGEST]
    if too_long:
        raise UserError(
            f"`name` is too long for Kubernetes: a pod would be called {too_long[0]}, and {LONGEST} characters is the "
            "limit.",
            mend=f"Take {max(map(len, hosts)) - LONGEST} characters off `name`.",
        )
    replicated = []
    for index, job in enumerate(jobs):
        before = [DependsOn(name=jobs[index - 1].stage, status="Complete")] if index else None
        replicated.append(
            ReplicatedJob(name=job.stage, replicas=1, depends_on=before, template=_job(recipe, job, name)),
        )
    rules = [
        FailureRule(name="requeue", action="RestartJobSet", on_job_failure_reasons=["PodFailurePolicy"]),
        FailureRule(name="failed", action="FailJobSet"),
    ]
    document = JobSet(
        api_version="jobset.x-k8s.io/v1alpha2",
        kind="JobSet",
        metadata=Metadata(name=name),
        spec=JobSetSpec(
            network=Network(enableDNSHostnames=True, subdomain=name),
            failure_policy=FailurePolicy(max_restarts=recipe.launch.slurm.max_requeues, rules=rules),
            replicated_jobs=replicated,
        ),
    )
    return yaml.dump(document.model_dump(by_alias=True, exclude_none=True), Dumper=_Dumper, sort_keys=False, width=120)


def _job(recipe: Recipe, job: StageJob, name: str) -> JobTemplate:
    launch = recipe.launch
    environment = {
        **launch.slurm.env,
        "MASTER_ADDR": f"{name}-{job.stage}-0-0.{name}",
        "MASTER_PORT": str(PORT),
        "WORLD_SIZE": str(launch.world),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "TRISTAGE_LAUNCHER": "env",
        "TRISTAGE_REQUEUE": "1",
    }
    container = Container(
        name="stage",
        image=(launch.slurm.container or IMAGE).replace("#", "/"),  # as pyxis writes it
        command=["bash", "-c", _script(recipe, job)],
        env=[EnvVar(name=key, value=value) for key, value in environment.items()],
        working_dir=str(job.directory),
        resources=Resources(limits={"nvidia.com/gpu": "1"}) if launch.slurm.gpus else None,
        volume_mounts=[VolumeMount(name="work", mount_path=str(job.directory))],
    )
    told_to_end = [
        PodFailureRule(action="FailJob", on_exit_codes=ExitCodes(operator="In", values=[EXIT_REQUEUE])),
        PodFailureRule(action="FailJob", on_pod_conditions=[PodCondition(type="DisruptionTarget")]),
    ]
    pod = PodSpec(
        restart_policy="Never",
        termination_grace_period_seconds=launch.slurm.signal_seconds,
        containers=[container],
        volumes=[Volume(name="work", persistent_volume_claim=Claim(claim_name=CLAIM))],
    )
    spec = JobSpec(
        parallelism=launch.world,
        completions=launch.world,
        completion_mode="Indexed",
        backoff_limit=0,
        pod_failure_policy=PodFailurePolicy(rules=told_to_end),
        template=PodTemplate(spec=pod),
    )
    return JobTemplate(spec=spec)


def _script(recipe: Recipe, job: StageJob) -> str:
    """What a pod runs: the first `tristage`, the others the stage's module once its directory is prepared."""
    out = run_directory(recipe) / job.stage
    partial, done = (shlex.quote(f"{out}{end}") for end in (".partial", "/manifest.json"))
    return (
        "\n".join(
            [
                *recipe.launch.slurm.setup,
                "export RANK=$JOB_COMPLETION_INDEX",
                f"if [ $RANK = 0 ]; then exec {shlex.join(['tristage', *job.words])}; fi",
                f"until [ -e {partial}/job.json ]; do [ -e {done} ] && exit 0; sleep 2; done",
                f"exec {PYTHON} -m {STAGES[job.stage].module} {partial}",
            ]
        )
        + "\n"
    )


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _block(dumper: _Dumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)
