from __future__ import annotations

import copy
from typing import Any

from pipeline.compare.reading import order, price, reading


def rate(mean: float, p: float = 0.001, controlled: tuple[float, float, float] | None = None) -> dict[str, Any]:
    lengths = controlled and dict(zip(("rate", "low", "high"), controlled, strict=True))
    return {"mean": mean, "low": mean - 0.03, "high": mean + 0.03, "p_holm": p, "length_controlled": lengths}


def means(distinct: float, perplexity: float) -> dict[str, Any]:
    return {"distinct_2": {"mean": distinct}, "sft_perplexity": {"mean": perplexity}}


def results() -> dict[str, Any]:
    """PPO before DPO before SimPO, of which the last two cannot be told apart."""
    rates = {
        "ppo": {"sft": rate(0.81), "dpo": rate(0.7), "simpo": rate(0.75)},
        "dpo": {"sft": rate(0.66), "ppo": rate(0.3), "simpo": rate(0.52, 0.4)},
        "simpo": {"sft": rate(0.52, 0.3), "ppo": rate(0.25), "dpo": rate(0.48, 0.4)},
        "sft": {"ppo": rate(0.19), "dpo": rate(0.34), "simpo": rate(0.48, 0.3)},
    }
    return {
        "methods": ["sft", "ppo", "dpo", "simpo"],
        "baseline": "sft",
        "seeds": [0, 1, 2],
        "headline_judge": "gold",
        "judges": [{"name": "gold", "role": "gold"}, {"name": "score", "role": "trained_on"}],
        "win_rates": {"gold": rates},
        "differences": {"gold": {"ppo": {"mean": 0.5, "low": 0.4, "high": 0.6}}},
        "measures": {m: means(0.6, 30.0) for m in ("sft", "ppo", "dpo", "simpo")},
        "cost": {
            m: {"cpu_seconds": s, "gpu_seconds": None} for m, s in (("ppo", 500.0), ("dpo", 125.0), ("simpo", 90.0))
        },
        "budget": {"kind": "recipe"},
        "sampling": {"prompts": 256, "samples_per_prompt": 4},
    }


def test_the_best_method_is_named_with_its_win_rate_and_its_gain() -> None:
    assert reading(results())[0] == (
        "PPO gains most by gold: it wins 81% [78%, 84%] of the comparisons with sft, a mean change of +0.500 "
        "[+0.400, +0.600]."
    )
    assert order(results(), "gold") == ["ppo", "dpo", "simpo"]


def test_the_price_is_that_of_the_next_method() -> None:
    assert price(results()) == ["PPO took 4.0 times the CPU time of DPO, the next by that judge."]


def test_methods_that_cannot_be_told_apart_are_named() -> None:
    found = results()
    assert "SimPO cannot be told from sft." in reading(found)
    found["win_rates"]["gold"]["ppo"]["dpo"]["p_holm"] = 0.2
    assert "There is no significant difference between PPO and DPO (Holm, 5%)." in reading(found)


def test_nothing_is_called_better_without_significance() -> None:
    found = results()
    for row in found["win_rates"]["gold"].values():
        for entry in row.values():
            entry["p_holm"] = 0.5
    assert reading(found)[0] == "No method is clearly better than sft by gold."


def test_a_lead_that_length_explains_is_said() -> None:
    found = results()
    found["win_rates"]["gold"]["dpo"]["sft"] = rate(0.66, controlled=(0.51, 0.47, 0.55))
    found["win_rates"]["gold"]["ppo"]["sft"] = rate(0.81, controlled=(0.79, 0.75, 0.83))
    said = [sentence for sentence in reading(found) if "equal length" in sentence]
    assert said == ["At equal length DPO's lead over sft is not clear: 51% [47%, 55%] instead of 66%."]


def test_a_lead_that_turns_round_at_equal_length_and_a_loss_that_length_explains_are_said() -> None:
    found = results()
    found["win_rates"]["gold"]["dpo"]["sft"] = rate(0.6, controlled=(0.4, 0.35, 0.45))
    found["win_rates"]["gold"]["simpo"]["sft"] = rate(0.4, controlled=(0.5, 0.46, 0.54))
    said = reading(found)
    assert "At equal length DPO's lead over sft turns round: 40% [35%, 45%] instead of 60%." in said
    assert "At equal length SimPO's loss to sft is not clear: 50% [46%, 54%] instead of 40%." in said
    assert "SimPO falls behind sft." in said


def test_the_trained_reward_is_no_judge_and_other_judges_are_heard() -> None:
    found = results()
    turned = copy.deepcopy(found["win_rates"]["gold"])
    turned["dpo"]["sft"] = rate(0.95)
    unsure = copy.deepcopy(turned)
    unsure["dpo"]["sft"] = rate(0.95, 0.3)
    found["win_rates"] |= {"score": turned, "other": turned, "same": found["win_rates"]["gold"], "unsure": unsure}
    found["judges"] += [{"name": name, "role": "gold"} for name in ("other", "same", "unsure")]
    said = reading(found)
    assert "score, which methods were trained on, puts DPO first; it is no judge." in said
    assert "other puts DPO first." in said
    assert "same too puts PPO first." in said
    assert "unsure puts no method clearly before sft." in said


def test_a_headline_judge_that_compared_nothing_is_told() -> None:
    found = results() | {"win_rates": {}, "differences": {}}
    assert reading(found)[0] == "gold has compared nothing with sft."


def test_lost_diversity_and_alignment_tax_are_said() -> None:
    found = results()
    found["measures"]["ppo"] = means(0.3, 30.0)
    found["measures"]["dpo"] = means(0.6, 45.0)
    said = reading(found)
    assert "Responses resemble each other more than sft's (distinct-2 0.60): PPO 0.30." in said
    assert "DPO pays the highest alignment tax: perplexity on SFT data 45.0 from 30.0." in said
    assert not [line for line in reading(results()) if "tax" in line or "resemble" in line]


def test_without_a_gold_judge_nothing_is_claimed() -> None:
    found = results() | {"headline_judge": None}
    assert len(reading(found)) == 1
    assert "Nothing is said of who is better" in reading(found)[0]
    assert price(found) == []
