"""Planted data sets of every form: what is counted in them, and which method the documented rules then name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.advise import Advice, advise, print_advice, read_results
from pipeline.advise_facts import Facts, Machine, find_machine, read_facts
from pipeline.advise_rules import CHEAPEST, RULES
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from tests.pipeline.conftest import CHAT_TEMPLATE, save_tiny_tokenizer
from tests.tiny_stage import write_rows

Rows = Sequence[Mapping[str, Any]]
TOPICS = 40


def split(n: int) -> str:
    return "eval" if n % 4 == 0 else "train"


def pairs(chosen: str = "good", rejected: str = "evil", **more: Any) -> list[dict[str, Any]]:
    rows = [{"prompt": f"topic {n}", "chosen": f"{chosen} {n}", "rejected": f"{rejected} {n}"} for n in range(TOPICS)]
    return [{**row, **more, "split": split(n)} for n, row in enumerate(rows)]


def flipped(rows: Rows, count: int) -> list[dict[str, Any]]:
    """The rows, the first `count` of them also the other way round."""
    return [*map(dict, rows), *({**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:count])]


def rankings(**more: Any) -> list[dict[str, Any]]:
    answers = ["best", "fine", "poor"]
    return [
        {"prompt": f"topic {n}", "responses": answers, "ranks": [0, 1, 2], **more, "split": split(n)}
        for n in range(TOPICS)
    ]


def labels(good: int, bad: int) -> list[dict[str, Any]]:
    verdicts = [True] * good + [False] * bad
    return [
        {"prompt": f"topic {n}", "completion": f"answer {n}", "label": verdict, "split": split(n)}
        for n, verdict in enumerate(verdicts)
    ]


def demonstrations() -> list[dict[str, Any]]:
    return [{"prompt": f"ask {n}", "response": f"answer {n}", "split": split(n)} for n in range(TOPICS)]


def recipe(folder: Path, *, model: str = "some/model-1B", ppo: Mapping[str, Any] | None = None, **data: Rows) -> Recipe:
    files = {key: str(write_rows(folder / f"{key}.jsonl", rows)) for key, rows in data.items()}
    return Recipe.model_validate({"name": "t", "model": {"name_or_path": model}, "data": files, "ppo": ppo or {}})


def facts(folder: Path, machine: Machine | None = None, **data: Any) -> Facts:
    return read_facts(recipe(folder, **data), machine)


def test_pairs_name_dpo_and_its_runner_ups(tmp_path: Path) -> None:
    advice = advise(facts(tmp_path, preferences=pairs(), sft=demonstrations()))
    assert advice.recommended == "dpo"
    assert advice.also == ("ppo", "simpo", "ipo")
    assert advice.facts.feedback == "pairs"
    assert (advice.facts.comparisons, advice.facts.rows, advice.facts.demonstrations) == (40, 40, 40)


def test_rankings_name_rlhf(tmp_path: Path) -> None:
    """40 rankings of 3 answers are 120 comparisons; all are rated when scores are there."""
    found = facts(tmp_path, preferences=rankings(scores=[3, 2, 1]), sft=demonstrations())
    assert (found.feedback, found.most_answers, found.mean_answers) == ("rankings", 3, 3.0)
    assert (found.comparisons, found.rated_comparisons, found.rated_share) == (120, 120, 1.0)
    assert advise(found).recommended == "ppo"


def test_a_composite_reward_names_rlhf_even_for_pairs(tmp_path: Path) -> None:
    rewards = {"rm": {"model": "rm"}, "short": {"function": "rules:short", "weight": 0.1}}
    found = read_facts(recipe(tmp_path, preferences=pairs(), sft=demonstrations(), ppo={"rewards": rewards}))
    assert (found.reward_sources, found.reward_functions, found.needs_reward_model) == (2, 1, True)
    assert advise(found).recommended == "ppo"


def test_a_small_budget_names_dpo_even_for_rankings(tmp_path: Path) -> None:
    rows = {"preferences": rankings(), "sft": demonstrations()}
    assert advise(facts(tmp_path, Machine(gpus=0), **rows)).recommended == "dpo"
    assert advise(facts(tmp_path, Machine(1, None, 8.0), **rows)).recommended == "dpo"
    assert advise(facts(tmp_path, Machine(8, None, 24.0), **rows)).recommended == "ppo"


def test_better_answers_that_are_longer_name_simpo(tmp_path: Path) -> None:
    """`good and long` has 13 characters and `evil` 4, both with the same number behind."""
    found = facts(tmp_path, preferences=pairs("good and long", "evil"), sft=demonstrations())
    assert found.longer_chosen_share == 1.0
    assert (found.chosen_length - found.rejected_length, found.length_biased) == (pytest.approx(9), True)
    advice = advise(found)
    assert advice.recommended == "simpo"
    assert any("longer" in caution for caution in advice.cautions)


def test_short_memory_names_a_method_without_a_reference(tmp_path: Path) -> None:
    """A model of 1e9 parameters in float32: 4, 5 and 10 times 3.725 GiB for SimPO, DPO and PPO."""
    found = facts(tmp_path, Machine(1, 20.0), preferences=pairs(), sft=demonstrations())
    assert found.parameters == 1_000_000_000
    sizes = [found.weights_gib(method) for method in ("simpo", "dpo", "ppo")]
    assert sizes == pytest.approx([14.901, 18.626, 37.253], abs=1e-3)
    assert [found.fits(method) for method in ("simpo", "dpo", "ppo")] == [True, False, False]
    advice = advise(found)
    assert advice.recommended == "simpo"
    out = {(reason.method, reason.speaks) for reason in advice.reasons if reason.source.startswith("counted")}
    assert {("dpo", "against"), ("ppo", "against")} <= out


def test_adapters_need_a_fraction(tmp_path: Path) -> None:
    shared = recipe(tmp_path, preferences=pairs(), sft=demonstrations(), ppo={"sharing": "lora"})
    dumped = shared.model_dump(mode="json")
    dumped["dpo"]["lora"] = True
    dumped["model"]["dtype"] = "bfloat16"
    found = read_facts(Recipe.model_validate(dumped))
    assert [found.weights_gib(method) for method in ("dpo", "ppo", "ipo")] == pytest.approx(
        [3.7253, 1.8626, 18.6265], abs=1e-3
    )


def test_noisy_pairs_name_robust_dpo_with_its_share_of_flips(tmp_path: Path) -> None:
    """20 of 40 pairs stand there both ways: all 20 repeated comparisons contradict each other."""
    found = facts(tmp_path, preferences=flipped(pairs(), 20), sft=demonstrations())
    assert (found.comparisons, found.repeated, found.contradicting) == (60, 20, 20)
    assert found.noise_share == pytest.approx(20 / 60)
    assert found.flip_rate == pytest.approx(0.4)
    advice = advise(found)
    assert advice.recommended == "dpo"
    assert "ipo" in advice.also
    assert any("dpo.variant: robust" in reason.text and "0.40" in reason.text for reason in advice.reasons)


def test_flips_are_estimated_from_verdicts_given_twice() -> None:
    """Two verdicts that are flipped with 0.1 each differ with 2 * 0.1 * 0.9 = 0.18: here in 18 of 100."""
    found = Facts("pairs", rows=10_000, comparisons=10_000, repeated=100, contradicting=18)
    assert found.flip_rate == pytest.approx(0.1)
    assert found.noisy
    assert not Facts("pairs", comparisons=10_000, repeated=100, contradicting=2).noisy
    assert not Facts("pairs", comparisons=10_000).noisy


def test_the_same_order_twice_is_no_contradiction(tmp_path: Path) -> None:
    found = facts(tmp_path, preferences=[*pairs(), *pairs()[:5]], sft=demonstrations())
    assert (found.repeated, found.contradicting, found.noise_share) == (5, 0, 0.0)


def test_ties_and_scores_against_ranks_are_counted(tmp_path: Path) -> None:
    """One of three answer pairs is tied; in one ranking the last two scores contradict their ranks."""
    rows = rankings(ranks=[0, 0, 1], scores=[3, 2, 1])
    rows[1] |= {"scores": [3, 2, 2.5]}
    found = facts(tmp_path, preferences=rows, sft=demonstrations())
    assert (found.comparisons, found.tied_pairs) == (80, 40)
    assert found.tied_share == pytest.approx(1 / 3)
    assert (found.rated_comparisons, found.scores_against_ranks) == (80, 1)
    assert any("33% of the answer pairs are tied" in caution for caution in advise(found).cautions)


@pytest.mark.parametrize(("good", "bad", "ratio"), [(20, 20, 1.0), (36, 4, 9.0), (4, 36, 9.0)])
def test_labels_name_kto(tmp_path: Path, good: int, bad: int, ratio: float) -> None:
    found = facts(tmp_path, preferences=labels(good, bad))
    assert (found.feedback, found.desirable, found.undesirable, found.label_ratio) == ("labels", good, bad, ratio)
    advice = advise(found)
    assert advice.recommended == "kto"
    assert advice.also == ("ift",)
    assert any("uneven" in reason.text for reason in advice.reasons) == (ratio > 4)


def test_labels_decided_both_ways_are_counted(tmp_path: Path) -> None:
    rows = labels(20, 20)
    rows.append({**rows[0], "label": False})
    found = facts(tmp_path, preferences=rows)
    assert (found.repeated, found.contradicting) == (1, 1)


def test_demonstrations_name_ift_then_sft(tmp_path: Path) -> None:
    advice = advise(facts(tmp_path, sft=demonstrations()))
    assert (advice.recommended, advice.also) == ("ift", ("sft",))
    assert advice.facts.demonstrations == 40


def test_a_base_model_without_demonstrations_names_orpo(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_tiny_tokenizer(model)
    found = read_facts(recipe(tmp_path, model=str(model), preferences=pairs()))
    assert (found.start, found.parameters) == ("base", None)
    assert advise(found).recommended == "orpo"
    assert (
        advise(read_facts(recipe(tmp_path, model=str(model), preferences=pairs(), sft=demonstrations()))).recommended
        == "dpo"
    )
    save_tiny_tokenizer(model, chat_template=CHAT_TEMPLATE)
    found = read_facts(recipe(tmp_path, model=str(model), preferences=pairs()))
    assert found.start == "instruct"
    assert advise(found).recommended == "dpo"


def test_parameters_are_counted_in_the_weights(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "one.safetensors", metadata={"format": "pt"})
    save_file({"c": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "two.safetensors")
    found = read_facts(recipe(tmp_path, model=str(tmp_path), preferences=pairs()))
    assert (found.parameters, found.small_model) == (3 * 5 + 7 + 2, True)
    assert not Facts("pairs", parameters=22, gpus=0).small_budget


@pytest.mark.parametrize(
    ("name", "parameters", "start"),
    [
        ("Qwen/Qwen2.5-0.5B", 500_000_000, "unknown"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135_000_000, "instruct"),
        ("google/gemma-2-9b-it", 9_000_000_000, "instruct"),
        ("gpt2", None, "unknown"),
    ],
)
def test_hub_names_tell_size_and_kind(tmp_path: Path, name: str, parameters: int | None, start: str) -> None:
    found = read_facts(recipe(tmp_path, model=name, preferences=pairs()))
    assert (found.parameters, found.start) == (parameters, start)


def test_every_rule_names_a_source_and_a_method() -> None:
    for rule in RULES:
        assert rule.method in CHEAPEST
        assert any(part in rule.source for part in ("arXiv:", "counted:", "this recipe:")), rule.source


def test_every_rule_is_reached_and_reads_as_a_sentence() -> None:
    """Between them these facts make every rule hold."""
    ranked = {"rows": 50, "comparisons": 50, "rated_comparisons": 50, "start": "base"}
    noisy = {
        "repeated": 20,
        "contradicting": 20,
        "longer_chosen_share": 1.0,
        "chosen_length": 9.0,
        "rejected_length": 3.0,
    }
    memory = {"parameters": 10**9, "gpu_memory_gib": 8.0, "gpus": 1}
    cases = [
        Facts("pairs", **ranked, **noisy, **memory, own_rollout_prompts=True),
        Facts("rankings", **ranked, reward_sources=2, reward_functions=1, gpus=0),
        Facts("labels", rows=50, desirable=45, undesirable=5, label_pairs=3),
        Facts("demonstrations", demonstrations=50),
    ]
    for rule in RULES:
        held = [case for case in cases if rule.when(case)]
        assert held, rule.text
        for case in held:
            text = rule.says(case)
            assert text.endswith(".")
            assert "{" not in text
            assert "  " not in text


def test_reasons_have_sources_and_the_recommended_method_comes_first(tmp_path: Path) -> None:
    advice = advise(facts(tmp_path, preferences=pairs(), sft=demonstrations())).as_dict()
    assert advice["reasons"][0]["for"] == advice["recommended"]
    assert all(reason["source"] and reason["text"] for reason in advice["reasons"])
    assert {"recommended", "also", "found", "facts", "reasons", "cautions"} == set(advice)
    assert json.loads(json.dumps(advice, allow_nan=False)) == advice


def entry(p: float | None, says: str = "") -> dict[str, Any]:
    return {"mean": 0.6, "p": p, "p_holm": p, "says": says}


def results(best: Sequence[str], p_of: Mapping[str, float | None], **more: Any) -> dict[str, Any]:
    """A comparison whose methods rank as in `best`; `p_of` are the first one's p-values against the others."""
    rates = {method: entry(p, f"{best[0]} against {method}: p {p}.") for method, p in p_of.items()}
    return {
        "methods": list(best),
        "baseline": "sft",
        "seeds": [0, 1, 2],
        "sampling": {"prompts": 256},
        "headline_judge": "gold",
        "ranking": {"gold": [{"method": method} for method in best]},
        "win_rates": {"gold": {best[0]: rates}},
        **more,
    }


def measured(p_of: Mapping[str, float | None], hours: float | None = None, **more: Any) -> Advice:
    found = Facts("rankings", rows=900, comparisons=2700, demonstrations=40, budget_hours=hours, parameters=10**6)
    return advise(found, results(["ppo", "dpo", "sft"], p_of, **more))


def test_what_was_measured_beats_what_was_published() -> None:
    advice = advise(
        Facts("pairs", rows=900, comparisons=900), results(["kto", "dpo", "sft"], {"dpo": 0.01, "sft": 0.001})
    )
    assert advice.recommended == "kto"
    first = advice.reasons[0]
    assert (first.method, first.weight) == ("kto", "measured")
    assert first.text == "On this data: kto against sft: p 0.001."
    assert first.source == "measured: judge gold, 3 seeds, 256 prompts"
    assert not any("Nothing was measured" in caution for caution in advice.cautions)


def test_within_noise_the_cheaper_method_is_named_and_it_is_said() -> None:
    advice = measured({"dpo": 0.3, "sft": 0.001})
    assert advice.recommended == "dpo"
    assert advice.also[0] == "ppo"
    assert "there is no significant difference between ppo and dpo" in advice.reasons[0].text
    assert "dpo is made for a smaller budget" in advice.reasons[0].text
    assert measured({"dpo": 0.04, "sft": 0.001}).recommended == "ppo"


def test_where_nothing_beats_sft_it_is_said() -> None:
    advice = measured({"dpo": 0.3, "sft": 0.2})
    assert advice.recommended == "sft"
    assert any("no method is significantly better than sft" in caution for caution in advice.cautions)


def test_a_method_over_the_budget_is_ruled_out() -> None:
    cost = {"ppo": {"wall_seconds": 7200.0}, "dpo": {"wall_seconds": 600.0}, "sft": {"wall_seconds": 60.0}}
    advice = measured({"dpo": 0.01, "sft": 0.001}, hours=1.0, cost=cost)
    assert advice.recommended in ("dpo", "sft")
    assert "ppo" not in (advice.recommended, *advice.also)
    assert any(reason.text == "On this data: ppo took 2.0 hours, over the budget of 1." for reason in advice.reasons)


def test_times_change_nothing_without_a_budget() -> None:
    cost = {"ppo": {"wall_seconds": 7200.0}, "dpo": {"wall_seconds": 1.0}}
    p_of = {"dpo": 0.3, "sft": 0.001}
    assert measured(p_of, cost=cost) == measured(p_of)


def test_a_comparison_without_a_headline_judge_leaves_it_to_the_rules() -> None:
    advice = measured({}, headline_judge=None)
    assert advice.recommended == "ppo"
    assert any("no headline judge" in caution for caution in advice.cautions)


def test_a_machine_is_what_was_told() -> None:
    assert find_machine(2, 80.0, 5.0) == Machine(2, 80.0, 5.0)
    assert find_machine(0, None, None) == Machine(0, None, None)
    for gpus, memory, hours in ((-1, None, None), (1, 0.0, None), (1, 8.0, float("nan"))):
        with pytest.raises(UserError, match="no number that a machine can have"):
            find_machine(gpus, memory, hours)


def test_nothing_to_read_and_wrong_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to advise on"):
        facts(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_results(tmp_path / "no.json")
    for text, said in (("{", "is not JSON"), ("[]", "holds no comparison"), ('{"methods": []}', "holds no comparison")):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(UserError, match=said):
            read_results(tmp_path / "results.json")


def test_the_printed_advice_fits_a_narrow_terminal(tmp_path: Path) -> None:
    advice = advise(facts(tmp_path, preferences=pairs(), sft=demonstrations()))
    console = Console(width=60, record=True, file=(tmp_path / "out").open("w"))
    print_advice(advice, console)
    shown = console.export_text()
    assert shown.startswith("Recommended: dpo (direct preference optimisation)")
    for part in ("What was found", "Why", "Mind", "+ dpo (strong)", "arXiv:2305.18290"):
        assert part in shown


def test_the_command_reads_the_recipe_the_machine_and_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "p.jsonl", pairs())
    (tmp_path / "r.yaml").write_text("name: t\nmodel: {name_or_path: some/model-1B}\ndata: {preferences: p.jsonl}\n")
    main(["advise", "r.yaml", "--gpus", "1", "--gpu-memory", "20"])
    said = capsys.readouterr().out
    assert said.startswith("Recommended: simpo")
    assert "1 GPU of 20 GiB" in said
    cost = {"dpo": {"wall_seconds": 90.0}, "judges": {}}
    found = results(["dpo", "ipo", "sft"], {"ipo": 0.5, "sft": 0.01}, cost=cost)
    (tmp_path / "results.json").write_text(json.dumps(found))
    main(["advise", "r.yaml", "--results", "results.json", "--gpus=0", "--data.split_seed", "3"])
    said = capsys.readouterr().out
    assert said.startswith("Recommended: dpo")
    assert "Minutes of wall time that the comparison took: dpo 1.5" in said


def test_advice_imports_no_torch() -> None:
    code = "import sys, pipeline.advise; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
