from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.artifacts import finish
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.runner import plan, prepare, run_stage
from pipeline.stages import STAGES, differences, fingerprint, input_paths, wanted_as

TREE: dict[str, Any] = {
    "name": "tiny",
    "model": {"name_or_path": "model"},
    "data": {"sft": "sft.jsonl", "preferences": "rankings.jsonl", "prompts": "prompts.jsonl"},
}


def recipe(**sections: Any) -> Recipe:
    """The base recipe; `data={"sft": ...}` updates a section, `seed=3` replaces a value."""
    merged = {**TREE, **{k: {**TREE.get(k, {}), **v} if isinstance(v, dict) else v for k, v in sections.items()}}
    return Recipe.model_validate(merged)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("sft", "rankings", "prompts"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"from": "{name}"}}\n')
    (tmp_path / "counts.json").write_text("{}")
    return tmp_path


def make_stage(name: str, made_with: Recipe, *, unfinished: bool = False, overwrite: bool = False) -> Path:
    """The directory that a run of the stage leaves, finished or not."""
    out = Path("runs/tiny") / name
    partial = out.with_name(f"{name}.partial")
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_text(name)
    mark = fingerprint(made_with, name, input_paths(made_with, name, {}))
    if unfinished:
        job = {"stage": name, "fingerprint": mark, "spent": {"wall_seconds": 1.0}, "overwrite": overwrite}
        (partial / "job.json").write_text(json.dumps(job))
        return partial
    finish(partial, out, {"kind": name, "fingerprint": mark})
    return out


def make_all(made_with: Recipe) -> None:
    for name in ("sft", "rm", "ppo"):
        make_stage(name, made_with)


def states(planned_with: Recipe) -> dict[str, str]:
    return {stage.name: stage.state for stage in plan(planned_with)}


def mark_of(name: str, made_with: Recipe) -> str:
    return fingerprint(made_with, name, input_paths(made_with, name, {}))["sha256"]


def test_a_finished_pipeline_is_done() -> None:
    make_all(recipe())
    assert states(recipe()) == {"sft": "done", "rm": "done", "ppo": "done"}


@pytest.mark.parametrize(
    "changed",
    [
        {"tracking": {"wandb": "offline", "progress": False, "project": "x"}},
        {"name": "other"},
        {"output_dir": "elsewhere"},
        {"sft": {"trainer": {"save_steps": 7, "logging_steps": 3}}},
        {"ppo": {"save_every": 7, "max_tokens_per_micro_batch": 64}},
        {"rollout": {"kv_cache_gib": 1.0, "gpu_memory_utilization": 0.5, "logprob_tolerance": 1e-3}},
        {"model": {"name_or_path": "./model"}},
        {"data": {"sft": "./sft.jsonl"}},
        {"data": {"prompts": {"path": "prompts.jsonl"}}},
        {"prepare": [{"makes": "x", "command": "make {out}"}]},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_what_decides_no_result_is_not_in_the_fingerprint(changed: dict[str, Any]) -> None:
    for name in ("sft", "rm"):
        if name == "rm":
            make_stage("sft", recipe())
        elsewhere = {k: v for k, v in changed.items() if k not in ("name", "output_dir")}
        inputs = input_paths(recipe(), name, {})
        base = fingerprint(recipe(), name, inputs)["sha256"]
        assert fingerprint(recipe(**(elsewhere if name == "rm" else changed)), name, inputs)["sha256"] == base


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ({"seed": 1}, {"sft", "rm", "ppo"}),
        ({"model": {"dtype": "bfloat16"}}, {"sft", "rm", "ppo"}),
        ({"data": {"max_prompt_tokens": 9}}, {"sft", "rm", "ppo"}),
        ({"sft": {"trainer": {"max_steps": 3}}}, {"sft"}),
        ({"rm": {"centering": 0.1}}, {"rm"}),
        ({"rollout": {"temperature": 0.7}}, {"rm", "ppo"}),
        ({"ppo": {"kl_coef": 0.2}}, {"ppo"}),
        ({"ppo": {"ptx_coef": 0.2}}, {"ppo"}),
        ({"rollout": {"stop": ["\n"]}}, {"rm", "ppo"}),
        ({"eval": {"prompts": 3}}, {"ppo"}),
        ({"eval": {"judges": {"v": {"function": "a:b"}}}}, {"ppo"}),
    ],
    ids=lambda changed: "-".join(changed),
)
def test_a_setting_makes_stale_what_it_decides_and_nothing_else(changed: dict[str, Any], stale: set[str]) -> None:
    make_all(recipe())
    assert {name for name, state in states(recipe(**changed)).items() if state == "stale"} == stale


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("sft.jsonl", {"sft"}),
        ("rankings.jsonl", {"rm"}),
        ("prompts.jsonl", {"rm", "ppo"}),
        ("model/config.json", {"sft"}),
        ("counts.json", {"ppo"}),
    ],
)
def test_contents_of_files_count(file: str, stale: set[str]) -> None:
    judged = recipe(eval={"judges": {"v": {"function": "a:b", "kwargs": {"counts": "counts.json"}}}})
    make_all(judged)
    Path(file).write_text('{"changed": 1}\n')
    planned = {stage.name: stage for stage in plan(judged)}
    assert {name for name, stage in planned.items() if stage.state == "stale"} == stale
    assert all("contents of" in planned[name].note or "the file" in planned[name].note for name in stale)


def test_demonstrations_count_for_ppo_only_where_it_learns_from_them() -> None:
    plain, with_ptx = recipe(), recipe(ppo={"ptx_coef": 0.1})
    make_stage("sft", plain)
    make_stage("rm", plain)
    before = [mark_of("ppo", made_with) for made_with in (plain, with_ptx)]
    Path("sft.jsonl").write_text('{"changed": 1}\n')
    after = [mark_of("ppo", made_with) for made_with in (plain, with_ptx)]
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_chat_template_file_counts_by_its_contents() -> None:
    Path("t.jinja").write_text("{{ a }}")
    templated = recipe(model={"chat_template": "t.jinja"})
    before = mark_of("sft", templated)
    Path("t.jinja").write_text("{{ b }}")
    assert mark_of("sft", templated) != before
    mark_of("sft", recipe(model={"chat_template": "{{ long }}\n" * 500}))


REWARDS = {"ppo": {"rewards": {"mine": {"function": "my.rewards:f", "kwargs": {"table": "counts.json"}}}}}


def test_ppo_on_functions_alone_wants_no_reward_model() -> None:
    made_with = recipe(**REWARDS)
    make_stage("sft", made_with)
    assert input_paths(made_with, "ppo", {}) == {"policy": "runs/tiny/sft"}
    make_stage("ppo", made_with)
    assert states(made_with)["ppo"] == "done"


@pytest.mark.parametrize("file", ["my/rewards.py", "my/rewards/__init__.py", "counts.json"])
def test_a_reward_function_counts_by_its_source_and_its_files(file: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("1")
    made_with = recipe(**REWARDS)
    make_stage("sft", made_with)
    make_stage("ppo", made_with)
    Path(file).write_text("2")
    (planned,) = [stage for stage in plan(made_with) if stage.name == "ppo"]
    assert (planned.state, planned.note.rpartition("now: ")[2]) == ("stale", f"the file {file}.")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"weight": 2.0}, "ppo.rewards.mine.weight (1.0 -> 2.0)"),
        ({"function": "my.rewards:g"}, "ppo.rewards.mine.function (my.rewards:f -> my.rewards:g)"),
        ({"kwargs": {"table": 1}}, "ppo.rewards.mine.kwargs.table (counts.json -> 1), the file counts.json"),
    ],
)
def test_what_a_reward_source_is_counts(changes: dict[str, Any], difference: str) -> None:
    base = recipe(**REWARDS)
    inputs = {"policy": "model"}
    changed = recipe(ppo={"rewards": {"mine": {**REWARDS["ppo"]["rewards"]["mine"], **changes}}})
    found = differences(fingerprint(base, "ppo", inputs), fingerprint(changed, "ppo", inputs))
    assert ", ".join(found) == difference


def test_models_of_rewards_and_critic_are_inputs_that_count_by_their_contents(here: Path) -> None:
    def made_with(place: str) -> Recipe:
        rewards = {"a": {"model": "rm"}, "b": {"model": f"{place}/other"}}
        return recipe(ppo={"rewards": rewards, "critic": f"{place}/critic"})

    make_all(recipe())
    for place in ("here", "there"):
        for kind in ("other", "critic"):
            (here / place / kind).mkdir(parents=True)
            (here / place / kind / "config.json").write_text("{}")
    paths = input_paths(made_with("here"), "ppo", {})
    assert paths == {
        "policy": "runs/tiny/sft",
        "reward_model": "runs/tiny/rm",
        "rewards.b": "here/other",
        "critic": "here/critic",
    }
    assert wanted_as(made_with("here"), "ppo", "rewards.b", "here/other") == "ppo.rewards.b.model"
    assert mark_of("ppo", made_with("here")) == mark_of("ppo", made_with("there"))
    before = fingerprint(made_with("here"), "ppo", paths)
    for kind, role in (("other", "rewards.b"), ("critic", "critic")):
        (here / "here" / kind / "config.json").write_text('{"a": 1}')
        after = fingerprint(made_with("here"), "ppo", paths)
        assert differences(before, after) == [f"the contents of the input {role}"]
        before = after
    assert mark_of("ppo", recipe(ppo={"critic": "policy"})) != mark_of("ppo", recipe())


def test_a_remade_input_makes_its_users_stale() -> None:
    make_all(recipe())
    other = recipe(rm={"centering": 0.5})
    import shutil

    shutil.rmtree("runs/tiny/rm")
    make_stage("rm", other)
    planned = {stage.name: stage for stage in plan(other)}
    assert (planned["rm"].state, planned["ppo"].state) == ("done", "stale")
    assert planned["ppo"].note.endswith("different now: the contents of the input reward_model.")


def test_differences_speak_the_recipe_s_language() -> None:
    before = fingerprint(recipe(), "ppo", {"policy": "model", "reward_model": "model"})
    now = fingerprint(
        recipe(seed=3, ppo={"kl_coef": 0.2, "kl_target_per_sequence": 6}, eval={"judges": {"v": {"function": "a:b"}}}),
        "ppo",
        {"policy": "model", "reward_model": "model"},
    )
    assert differences(before, {**now, "version": "9"}) == [
        "seed (0 -> 3)",
        "ppo.kl_coef (0.05 -> 0.2)",
        "ppo.kl_target_per_sequence (unset -> 6.0)",
        "eval.judges.v (unset -> {'function': 'a:b', ...)",
        f"tristage's version ({before['version']} -> 9)",
    ]


def test_unfinished_runs_resume_or_are_refused_in_the_plan() -> None:
    make_stage("sft", recipe(), unfinished=True)
    assert states(recipe())["sft"] == "resume"
    planned = plan(recipe(seed=2))[0]
    assert planned.state == "stale partial"
    assert "sft.partial is an unfinished run of something else; different now: seed (0 -> 2)." in planned.note


def test_a_complete_partial_is_taken_over_by_the_plan_and_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The window between the manifest and the rename."""
    make_stage("sft", recipe()).rename("runs/tiny/sft.partial")
    assert states(recipe())["sft"] == "resume"
    run_stage(recipe(), "sft", overwrite=False, command=[], inputs={})
    assert "sft: done already, skipped" in capsys.readouterr().out
    assert states(recipe())["sft"] == "done"


def test_an_overwrite_cut_off_by_a_kill_is_resumed() -> None:
    make_stage("sft", recipe())
    new = recipe(seed=2)
    make_stage("sft", new, unfinished=True)
    assert states(new)["sft"] == "stale"
    import shutil

    shutil.rmtree("runs/tiny/sft.partial")
    make_stage("sft", new, unfinished=True, overwrite=True)
    assert states(new)["sft"] == "resume"
    assert states(recipe())["sft"] == "done"


def test_plan_before_anything_exists() -> None:
    for path in Path().iterdir():
        path.unlink() if path.is_file() else [item.unlink() for item in path.iterdir()] and path.rmdir()
    made = [{"makes": "data", "command": "make {out}"}, {"makes": "model", "command": "make {out}"}]
    files = {"sft": "data/sft.jsonl", "preferences": "data/r.jsonl", "prompts": "data/p.jsonl"}
    planned = plan(recipe(prepare=made, data=files))
    assert [(stage.state, stage.note) for stage in planned] == [
        ("start", "after model, data/sft.jsonl"),
        ("start", "after runs/tiny/sft, data/r.jsonl, data/p.jsonl"),
        ("start", "after runs/tiny/sft, runs/tiny/rm, data/p.jsonl"),
    ]
    assert list(Path().iterdir()) == []


def test_plan_says_what_would_be_refused() -> None:
    planned = {stage.name: stage for stage in plan(recipe(data={"sft": "sfd.jsonl", "preferences": None}))}
    assert planned["sft"].state == "refused"
    assert "data.sft: sfd.jsonl does not exist. Did you mean sft.jsonl?" in planned["sft"].note
    assert "data.preferences is not set" in planned["rm"].note


def test_hub_ids_are_planned_without_a_network() -> None:
    hub = recipe(model={"name_or_path": "owner/model"}, data={"sft": "owner/data"})
    assert states(hub)["sft"] == "start"
    make_stage("sft", hub)
    assert states(hub)["sft"] == "done"


def test_a_done_stage_whose_data_are_gone_waits_for_prepare() -> None:
    prepared = recipe(prepare=[{"makes": "sft.jsonl", "command": "make {out}"}])
    make_stage("sft", prepared)
    Path("sft.jsonl").unlink()
    planned = plan(prepared)[0]
    assert (planned.state, planned.note) == ("later", "after sft.jsonl")


PYTHON = f"{sys.executable} -c"


def prepare_sft(command: str) -> None:
    made = recipe(data={"sft": "new/sft.jsonl"}, prepare=[{"makes": "new", "command": command}])
    prepare(made, ["./new/sft.jsonl"], Console())


def test_prepare_makes_the_product_once_and_whole(tmp_path: Path) -> None:
    command = f"""{PYTHON} "import sys, pathlib as p; d = p.Path(sys.argv[1]); d.mkdir(); (d / 'a').touch()" {{out}}"""
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "half").touch()
    prepare_sft(command)
    assert [path.name for path in Path("new").iterdir()] == ["a"]
    assert not Path("new.partial").exists()
    prepare_sft("false {out}")


def test_prepare_says_when_the_script_that_made_the_product_has_changed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("maker").mkdir()
    Path("maker/make.py").write_text("import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir()\n")
    for _ in range(2):
        prepare_sft("python -m maker.make {out}")
    assert "earlier version" not in capsys.readouterr().out
    with Path("maker/make.py").open("a") as script:
        script.write("# mended\n")
    prepare_sft("python -m maker.make {out}")
    assert "prepare: new was made by another command or an earlier version of its script" in capsys.readouterr().out
    Path("new").rmdir()
    for _ in range(2):
        prepare_sft("python -m maker.make {out}")
    assert "earlier version" not in capsys.readouterr().out


def test_prepare_runs_nothing_that_is_not_needed() -> None:
    made = recipe(prepare=[{"makes": "new", "command": "false {out}"}])
    prepare(made, ["newer/sft.jsonl", "sft.jsonl"], Console())


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("false {out}", "did not make new (exit code 1)"),
        ("true {out}", "did not make new (exit code 0)"),
        ("no-such-program {out}", "cannot be run"),
        ("python '{out}", "cannot be run: No closing quotation"),
        (f'{PYTHON} "import os; os.kill(os.getpid(), 9)" {{out}}', "exit code -9"),
    ],
)
def test_a_prepare_command_that_fails_is_named(command: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare_sft(command)
    assert part in str(caught.value)
    assert not Path("new").exists()


def test_every_input_key_of_the_recipe_exists() -> None:
    sections = Recipe.model_fields
    for spec in STAGES.values():
        assert set(spec.sections) <= set(sections)
        assert set(spec.data) <= {"sft", "preferences", "prompts"}
    assert input_paths(recipe(ppo={"policy": "a", "reward_model": "b"}), "ppo", {}) == {
        "policy": "a",
        "reward_model": "b",
    }
    assert input_paths(recipe(), "generate", {"policy": "c"}) == {"policy": "c"}
    assert input_paths(recipe(), "generate", {}) == {"policy": "runs/tiny/ppo"}
