"""`tristage compare` as a person runs it: real stages, one report; killed, repeated, refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import read_manifest
from pipeline.tracking import read_metrics
from tests.browser import CHROMIUM, DESK, PHONE, launched, opened
from tests.e2e.test_kill import PATIENCE_SECONDS, ended, family, wait_until
from tests.e2e.test_vllm_judge import vllm_server
from tests.pipeline.evaluation.chat_server import Request, Response, chat_server, refuses, says
from tests.workplace import ROOT, Workplace, change_rows, make_workplace

TIMED = ("cost", "run")
MOVES = ("--dpo.trainer.learning_rate", "0.05", "--dpo.trainer.max_steps", "6")
WORDS = ("compare", "recipe.yaml", "--methods", "dpo", "--seeds", "1", *MOVES)
ALL = ("compare", "recipe.yaml", "--methods", "ppo,dpo,kto", "--seeds", "2", "--ppo.updates", "3")


def results(place: Workplace, folder: str = "compare") -> dict[str, Any]:
    return json.loads((place.run / folder / "results.json").read_text(encoding="utf-8"))


def untimed(place: Workplace, folder: str = "compare") -> dict[str, Any]:
    return {key: value for key, value in results(place, folder).items() if key not in TIMED}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace in which DPO was compared with SFT."""
    place = make_workplace(tmp_path_factory.mktemp("compared") / "work")
    done = place.tristage(*WORDS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "report: runs/tiny/compare/report.html" in done.stdout
    return place


def test_a_comparison_writes_page_tables_numbers_and_samples(compared: Workplace) -> None:
    folder = compared.run / "compare"
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert {"report.html", "report.md", "results.json", "samples.jsonl", "evaluations", "exports"} <= there
    found = results(compared)
    assert found["methods"] == ["sft", "dpo"]
    assert found["headline_judge"] == "characters"
    assert found["sampling"]["prompts"] * found["sampling"]["samples_per_prompt"] == 8
    assert found["measures"]["sft"]["kl_per_sequence"]["mean"] == pytest.approx(0.0, abs=1e-5)
    assert found["measures"]["dpo"]["optimizer_steps"]["mean"] == 6
    assert found["cost"]["dpo"]["stages"] == ["dpo"]
    assert found["hashes"]["weights"]["dpo"] == [compared.manifest("dpo")["files"]["model.safetensors"]]
    assert str(compared.path) not in json.dumps(found)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert {len(rows[0]["answers"][method]) for method in ("sft", "dpo")} == {1}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: the page is not opened")
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_its_page_opens_in_a_browser(compared: Workplace, tmp_path: Path, width: int) -> None:
    with launched() as browser, opened(browser, compared.run / "compare" / "report.html", width) as page:
        page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
        for section in ("summary", "frontier", "win-rates", "cost", "measures", "curves", "samples", "advice"):
            assert page.locator(f"section#{section}").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_means_are_those_of_the_samples(compared: Workplace) -> None:
    rows = [json.loads(line) for line in (compared.run / "compare" / "samples.jsonl").read_text().splitlines()]
    for method in ("sft", "dpo"):
        judged = [row["answers"][method][0]["scores"]["characters"] for row in rows]
        assert judged == [len(row["answers"][method][0]["response"]) for row in rows]
        assert results(compared)["measures"][method]["characters"]["mean"] == pytest.approx(sum(judged) / len(judged))


def test_the_same_command_again_skips_every_stage_and_writes_the_same(compared: Workplace) -> None:
    before = results(compared)
    done = compared.tristage(*WORDS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done already, skipped") == 4
    assert untimed(compared) == {key: value for key, value in before.items() if key not in TIMED}
    assert results(compared)["cost"] == before["cost"]


def test_a_stale_stage_is_refused_before_anything_runs(compared: Workplace) -> None:
    done = compared.tristage(*WORDS[:-1], "7")
    assert done.returncode == 2
    assert "dpo.trainer.max_steps (6 -> 7)" in done.stderr
    assert "--overwrite" in done.stderr
    assert "starts in" not in done.stdout


def test_a_planted_leak_is_refused_with_the_rows_named(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    change_rows(place.path / "prompts.jsonl", {5: {"prompt": "the leaked prompt", "split": "eval"}})
    change_rows(place.path / "sft.jsonl", {7: {"prompt": "the leaked prompt", "split": "train"}})
    done = place.tristage(*WORDS)
    assert done.returncode == 2
    assert "prompts.jsonl:6" in done.stderr
    assert "sft.jsonl:8" in done.stderr
    assert not list((place.path / "runs").rglob("manifest.json"))


def test_a_headline_judge_that_is_none_is_refused(compared: Workplace) -> None:
    done = compared.tristage(*WORDS, "--compare.headline_judge", "nobody")
    assert done.returncode == 2
    assert "compare.headline_judge: nobody is not in eval.judges" in done.stderr


def with_critic(url: str) -> tuple[str, ...]:
    keys = {"base_url": url, "model": "m", "retries": "0", "concurrency": "1", "samples_per_prompt": "2"}
    return tuple(word for key, value in keys.items() for word in (f"--eval.judges.critic.llm.{key}", value))


def test_a_language_model_judges_and_what_it_said_before_a_failure_is_not_asked_again(compared: Workplace) -> None:
    def breaks(request: Request) -> Response:
        return says("A") if request.number < 5 else refuses(500, "out of order")

    with chat_server(breaks) as server:
        refused = compared.tristage(*WORDS, *with_critic(server.url))
        assert refused.returncode == 2
        assert "eval.judges.critic.llm" in refused.stderr
        assert "500" in refused.stderr
    with chat_server(lambda _: says("A"), port=server.server_port) as again:
        done = compared.tristage(*WORDS, *with_critic(again.url))
        assert done.returncode == 0, done.stderr[-3000:]
    found = results(compared)
    asked = found["cost"]["judges"]["critic"]
    assert asked["cached"] == 5
    assert len(again.requests) == asked["requests"] - 5
    assert found["win_rates"]["critic"]["dpo"]["sft"]["mean"] == 0.5  # it always says A: both orders cancel
    judge = next(entry for entry in found["judges"] if entry["name"] == "critic")
    assert (judge["kind"], judge["role"]) == ("llm", "gold")
    assert "critic" in (compared.run / "compare" / "report.html").read_text()


def test_people_vote_on_a_blind_ballot(compared: Workplace) -> None:
    words = (*WORDS, "--eval.judges.people.votes", "votes.jsonl")
    assert compared.tristage(*words).returncode == 0
    ballot = compared.run / "compare" / "judges" / "people" / "ballot" / "ballot.jsonl"
    items = [json.loads(line) for line in ballot.read_text().splitlines()]
    assert not {"dpo", "sft"} & set(str(items[0].keys()).split("'"))
    key = json.loads((ballot.parent.parent / "ballot_key.json").read_text())
    assert "dpo" in str(key)
    votes = [{"id": item["id"], "vote": "tie", "rater": "one"} for item in items]
    (compared.path / "votes.jsonl").write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    done = compared.tristage(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(compared)["win_rates"]["people"]["dpo"]["sft"]["mean"] == 0.5


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_s_server_is_the_judge_of_a_comparison(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    place = make_workplace(tmp_path / "work")
    with vllm_server(ROOT / "assets" / "demo-base", tmp_path) as (url, _):
        keys = ("--eval.judges.critic.llm.model", "critic", "--eval.judges.critic.llm.constrain", "true")
        short = ("--eval.judges.critic.llm.template", "First {a} then {b} - which one answers {prompt} best?")
        done = place.tristage(*WORDS, *with_critic(url), *keys, *short)
    assert done.returncode == 0, done.stderr[-3000:]
    found = results(place)
    assert found["cost"]["judges"]["critic"]["requests"] > 0
    assert 0.0 <= found["win_rates"]["critic"]["dpo"]["sft"]["mean"] <= 1.0


@pytest.mark.slow
def test_two_comparisons_are_equal_but_for_times_and_so_is_one_that_was_killed(tmp_path: Path) -> None:
    places = [make_workplace(tmp_path / name / "work") for name in ("one", "other")]
    assert places[0].tristage(*ALL).returncode == 0
    for stage in ("runs/tiny/ppo.partial", "runs/tiny/seed1/sft.partial", "runs/tiny/compare/evaluations/kto-seed1"):
        process = places[1].start(*ALL)
        wait_until((places[1].path / stage).exists, process)
        processes = family(process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE_SECONDS)
        assert ended(processes)
        assert not (places[1].run / "compare" / "results.json").exists()
    done = places[1].tristage(*ALL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert untimed(places[0]) == untimed(places[1])
    found = results(places[0])
    assert found["seeds"] == [0, 1]
    assert {"rm", "ppo"} == set(found["cost"]["ppo"]["stages"])
    assert len(found["reward_model"]) == 2
    assert [point["step"] for point in found["frontier"]["ppo"] if point["seed"] == 0] == [0, 3]
    assert found["measures"]["ppo"]["score"]["low"] is not None


def compared_under(place: Workplace, budget: str) -> dict[str, Any]:
    """Results of PPO and DPO under a budget; every method stands in the list with its realised steps and tokens."""
    done = place.tristage("compare", "recipe.yaml", "--methods", "ppo,dpo", "--seeds", "1", "--budget", budget)
    assert done.returncode == 0, done.stderr[-3000:]
    return results(place, f"compare-{budget.replace('=', '-')}")


def pilot(place: Workplace, budget: str, stage: str) -> Workplace:
    """The pilot of a stage, as a workplace of its own."""
    return Workplace(place.run / f"compare-{budget.replace('=', '-')}" / "pilot" / stage)


def steps_of(found: dict[str, Any], method: str) -> float:
    return found["measures"][method]["optimizer_steps"]["mean"]


@pytest.mark.slow
def test_a_budget_holds_steps_equal(tmp_path: Path) -> None:
    found = compared_under(make_workplace(tmp_path / "work"), "steps=8")
    assert found["budget"]["realised"] == {"ppo": 8, "dpo": 8}
    assert (steps_of(found, "ppo"), steps_of(found, "dpo")) == (8, 8)


@pytest.mark.slow
def test_a_budget_of_tokens_divides_them_by_a_pilots(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    found = compared_under(place, "tokens=2000")
    short = {name: read_manifest(pilot(place, "tokens=2000", name).path)["metrics"] for name in ("ppo", "dpo")}
    each = short["dpo"]["trained_tokens"] / short["dpo"]["optimizer_steps"]
    assert steps_of(found, "dpo") == round(2000 / each)
    assert steps_of(found, "ppo") == 4 * round(2000 / (short["ppo"]["trained_tokens"] / 2))  # of its two updates
    assert found["budget"]["realised"]["dpo"] == found["measures"]["dpo"]["trained_tokens"]["mean"]


@pytest.mark.slow
def test_a_budget_of_seconds_counts_the_reward_models_steps(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    words = ("compare", "recipe.yaml", "--methods", "ppo,dpo", "--seeds", "1", "--budget", "seconds=0.001")
    refused = place.tristage(*words)
    assert refused.returncode == 2
    assert "ppo's reward model and critic alone train for" in refused.stderr
    found = compared_under(place, "seconds=4")
    step = read_manifest(pilot(place, "seconds=4", "dpo").path)["step_seconds"]["cpu"]
    assert steps_of(found, "dpo") == round(4 / step)
    model = place.manifest("rm")
    before = model["step_seconds"]["cpu"] * model["metrics"]["optimizer_steps"]
    update = [
        row["time/cpu_seconds"] for row in read_metrics(pilot(place, "seconds=4", "ppo").path) if "val/ratio" in row
    ]
    assert steps_of(found, "ppo") == 4 * round((4 - before) / update[1])
    assert found["cost"]["dpo"]["training_seconds"] > 0
