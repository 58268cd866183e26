"""The evaluate stage in this process: its files, what is null, what is refused, prompts in two forms."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import UserError
from pipeline.evaluation.policy_eval import PolicyReport
from pipeline.load import load_recipe
from pipeline.stage import Stage
from pipeline.stages import fingerprint, input_paths, stage_inputs
from pipeline.tokens import set_prompt_form
from policy.evaluate import run
from tests.pipeline.conftest import save_other_tokenizer
from tests.policy.ppo.test_stage import _reward_model
from tests.policy.test_likelihoods import save_moved
from tests.tiny_stage import prepare_stage
from tests.workplace import Workplace, change_rows, make_workplace


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A workplace with a policy beside its model."""
    made = make_workplace(tmp_path / "work")
    monkeypatch.chdir(made.path)
    monkeypatch.syspath_prepend(made.path)
    save_moved(Path("model"), Path("policy"))
    return made


def stage_of(place: Workplace, *words: str, inputs: Mapping[str, Path] | None = None) -> Stage:
    recipe = load_recipe("recipe.yaml", list(words)).model_dump()
    roles = {"policy": Path("policy"), "reference": Path("model"), **(inputs or {})}
    return Stage(prepare_stage(place.run / "evaluate.partial", recipe, "evaluate", roles))


def evaluation_of(stage: Stage) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    final = stage.complete(run(stage))
    rows = [json.loads(line) for line in (final / "samples.jsonl").read_text().splitlines()]
    return json.loads((final / "evaluation.json").read_text()), rows, final


def test_the_files_are_as_promised(place: Workplace) -> None:
    found, rows, final = evaluation_of(stage_of(place))
    keys = ["report", "entropy", "self_bleu", "truncation_rate", "likelihoods", "sft_perplexity"]
    assert list(found) == keys
    report = PolicyReport.from_dict(found["report"])
    assert (report.prompts, report.samples_per_prompt, report.score) == (4, 2, None)
    columns = ["prompt_index", "sample", "prompt", "response", "finished", "tokens", "characters", "kl"]
    assert [list(row) for row in rows] == [columns] * 8
    assert [(row["prompt_index"], row["sample"]) for row in rows] == [(p, s) for p in range(4) for s in range(2)]
    assert report.kl_per_sequence is not None
    assert report.kl_per_sequence.mean == pytest.approx(sum(row["kl"] for row in rows) / 8)
    assert found["truncation_rate"] == sum(not row["finished"] for row in rows) / 8
    assert 0.0 < found["entropy"] < math.log(300)
    assert 0.0 <= found["self_bleu"] <= 100.0
    assert set(found["likelihoods"]) == {"pairs", "spearman", "ranking_accuracy", "reward_accuracy", "agreement"}
    metrics = json.loads((final / "manifest.json").read_text())["metrics"]
    assert metrics["eval/entropy"] == found["entropy"]
    assert metrics["eval/likelihood/pairs"] == found["likelihoods"]["pairs"]
    assert metrics["responses"] == 8
    again, same, _ = evaluation_of(stage_of(place))
    assert (again, same) == (found, rows)


def test_the_policy_against_itself_has_no_kl_and_no_implicit_reward(place: Workplace) -> None:
    found, rows, _ = evaluation_of(stage_of(place, inputs={"policy": Path("model")}))
    assert {row["kl"] for row in rows} == {0.0}
    assert found["likelihoods"]["ranking_accuracy"] is not None
    assert found["likelihoods"]["reward_accuracy"] is found["likelihoods"]["agreement"] is None


def test_the_score_is_the_weighted_sum_of_ppos_rewards(place: Workplace) -> None:
    """rm + 0.25 * characters: the second by hand from the responses, the first from a run of its own."""
    reward_model = _reward_model(place)
    (place.path / "characters.py").write_text(
        "def count(prompts, responses, columns):\n    return [float(len(text)) for text in responses]\n"
    )
    scored = {"reward_model": reward_model}
    alone, rows, _ = evaluation_of(stage_of(place, "--eval.reward_model", str(reward_model), inputs=scored))
    assert alone["report"]["score"]["mean"] == pytest.approx(sum(row["score"] for row in rows) / 8)
    sources = {"rm": {"model": "rm"}, "long": {"function": "characters:count", "weight": 0.25}}
    words = ("--ppo.rewards", json.dumps(sources), "--eval.reward_model", str(reward_model))
    both, more, _ = evaluation_of(stage_of(place, *words, inputs=scored))
    for one, other in zip(rows, more, strict=True):
        assert other["score"] == pytest.approx(one["score"] + 0.25 * len(one["response"]), abs=1e-4)
    del sources["rm"]
    functions, rows, _ = evaluation_of(stage_of(place, "--ppo.rewards", json.dumps(sources)))
    assert [row["score"] for row in rows] == [0.25 * len(row["response"]) for row in rows]
    assert functions["report"]["judges"] == both["report"]["judges"]


def test_what_the_data_cannot_say_is_null(place: Workplace) -> None:
    labels = [{"prompt": f"row {n}", "completion": " good", "label": n % 2 == 0} for n in range(40)]
    (place.path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    words = ("--data.sft", "null", "--data.preferences")
    found, _, _ = evaluation_of(stage_of(place, *words, "labels.jsonl"))
    assert found["likelihoods"] is None
    assert found["sft_perplexity"] > 1.0
    found, _, _ = evaluation_of(
        stage_of(place, *words, "null", "--eval.prompts", "1", "--eval.samples_per_prompt", "1")
    )
    assert found["likelihoods"] is found["sft_perplexity"] is found["self_bleu"] is None
    assert found["report"]["kl_per_sequence"]["low"] is None


def test_prompts_in_two_forms_are_read_by_each_model_in_its_own(place: Workplace) -> None:
    tokenizer = AutoTokenizer.from_pretrained("policy")
    set_prompt_form(tokenizer, "Q: {prompt} A:")
    tokenizer.save_pretrained("policy")
    words = ("--data.max_prompt_tokens", "40", "--data.max_response_tokens", "2", "--rollout.temperature", "0.8")
    words = (*words, "--eval.prompts", "8", "--eval.samples_per_prompt", "8")
    _, rows, _ = evaluation_of(stage_of(place, *words))
    assert not any(row["prompt"].startswith("Q:") for row in rows)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in ("policy", "model")]
    checked = 0
    for row in rows:
        given = tokenizer(row["response"], add_special_tokens=False).input_ids + [2] * row["finished"]
        if len(given) != row["tokens"] or "\ufffd" in row["response"]:
            continue  # bytes that are no text do not come back as the tokens that were sampled
        sums = []
        for model, text in zip(models, (f"Q: {row['prompt']} A:", row["prompt"]), strict=True):
            asked = [1, *tokenizer(text, add_special_tokens=False).input_ids]
            logp = (model(torch.tensor([asked + given])).logits[0] / 0.8).log_softmax(-1)
            sums.append(sum(logp[len(asked) + t - 1, token].item() for t, token in enumerate(given)))
        assert row["kl"] == pytest.approx(sums[0] - sums[1], abs=1e-4)
        checked += 1
    assert checked > 4
    told = r"not the same ones in the policy's form .* within data\.max_prompt_tokens \(\d+\)"
    with pytest.raises(UserError, match=told):
        run(stage_of(place, "--data.max_prompt_tokens", "9"))


def test_a_leak_is_refused_before_anything_is_loaded(place: Workplace) -> None:
    change_rows(place.path / "sft.jsonl", {5: {"prompt": "film 1", "split": "train"}})
    change_rows(place.path / "prompts.jsonl", {2: {"prompt": "film 1", "split": "eval"}})
    told = r"prompts\.jsonl:3 is also a training prompt of data\.sft, at sft\.jsonl:6: "
    with pytest.raises(UserError, match=told):
        run(stage_of(place))


def test_another_tokenizer_than_the_references_is_refused(place: Workplace) -> None:
    save_other_tokenizer(place.path / "policy")
    with pytest.raises(UserError, match=r"evaluate\.reference: model has another tokenizer than the policy policy"):
        run(stage_of(place))


def test_the_recipe_decides_what_is_scored_and_what_counts(place: Workplace) -> None:
    plain = load_recipe("recipe.yaml", [])
    scored = load_recipe("recipe.yaml", ["--eval.reward_model", "policy"])
    assert set(stage_inputs(plain, "evaluate")) == {"policy", "reference"}
    assert set(stage_inputs(scored, "evaluate")) == {"policy", "reference", "reward_model"}
    paths = input_paths(scored, "evaluate", {"policy": "policy", "reference": "model"})
    assert paths == {"policy": "policy", "reference": "model", "reward_model": "policy"}
    assert input_paths(plain, "evaluate", {}) == {"policy": "runs/tiny/ppo", "reference": "runs/tiny/sft"}
    del paths["reward_model"]

    def mark(*words: str) -> str:
        return fingerprint(load_recipe("recipe.yaml", list(words)), "evaluate", paths)["sha256"]

    assert mark() == mark("--ppo.kl_coef", "0.3") == mark("--dpo.beta", "0.3")
    assert mark() != mark("--rollout.temperature", "0.9")
    scoring = ("--eval.reward_model", "policy")
    assert mark(*scoring) == mark(*scoring, "--ppo.kl_coef", "0.3")
    assert mark(*scoring) == mark("--eval.reward_model", "model")
    assert len({mark(), mark(*scoring), mark(*scoring, "--ppo.rewards", '{"rm": {"model": "rm", "weight": 2}}')}) == 3
    named = ["--ppo.rewards", '{"mine": {"model": "mine"}}']
    assert "rewards.mine" in stage_inputs(load_recipe("recipe.yaml", named), "evaluate")
    with pytest.raises(UserError, match=r"eval\.reward_model is set, but no entry of ppo\.rewards"):
        load_recipe("recipe.yaml", [*scoring, *named])
    before = mark()
    judge = place.path / "length_judge.py"
    judge.write_text(judge.read_text() + "# another opinion\n")
    assert mark() != before
    for stage in ("ppo", "dpo"):
        inputs = dict.fromkeys(stage_inputs(plain, stage), "model")
        assert fingerprint(plain, stage, inputs) == fingerprint(scored, stage, inputs), "not of other stages"
