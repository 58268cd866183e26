"""Results and samples as `tristage compare` writes them, made up from a seed; numbers like those of the demo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

HEADLINE, SECOND, LLM = "vader", "naive_bayes", "assistant"
LEVELS = {
    # method: headline judge, second judge, reward-model score, KL, length, CPU seconds of its own stage
    "sft": (0.085, 0.374, -0.09, 0.0, 9.1, 64.0),
    "ppo": (0.643, 0.846, 2.75, 9.4, 8.3, 512.0),
    "dpo": (0.374, 0.642, 1.21, 6.2, 15.0, 141.0),
    "kto": (0.308, 0.637, 1.05, 10.6, 14.5, 118.0),
    "simpo": (0.134, 0.467, 0.31, 4.3, 14.0, 97.0),
    "ipo": (0.218, 0.530, 0.62, 2.5, 7.8, 139.0),
    "orpo": (0.152, 0.468, 0.28, 8.3, 19.0, 104.0),
    "ift": (0.138, 0.470, 0.22, 6.2, 20.9, 83.0),
    "contrast": (0.177, 0.487, 0.41, 14.0, 20.7, 88.0),
    "cpo-gamma 0.5": (0.141, 0.457, 0.25, 3.2, 13.5, 99.0),
}
SENTENCES = (
    "a quiet film that knows what it wants and takes its time the cast is splendid plot was dull jokes were old "
    "end came late music lifts every scene not bad at all though hardly ever surprising"
)

JUDGES = [
    {"name": HEADLINE, "kind": "function", "role": "gold", "about": "sentiment of the answer", "details": {}},
    {"name": SECOND, "kind": "function", "role": "gold", "about": "a classifier of reviews", "details": {}},
    {"name": LLM, "kind": "llm", "role": "gold", "about": "a model asked in both orders", "details": {"model": "m-7b"}},
    {
        "name": "score",
        "kind": "reward_model",
        "role": "trained_on",
        "about": "what PPO maximises",
        "details": {},
    },
]
RUN = {
    "command": "tristage compare recipes/demo.yaml --seeds 3",
    "started": "2026-11-02T10:00:00Z",
    "finished": "2026-11-02T11:04:12Z",
    "device": "cpu, 2 cores",
    "packages": {"torch": "2.13.0", "trl": "1.16.2"},
    "code": "12" * 20,
}


def results(
    methods: Sequence[str] = ("sft", "ppo", "dpo", "kto", "simpo"), seeds: int = 3, prompts: int = 256
) -> dict[str, Any]:
    """A whole comparison with every optional part."""
    rng = np.random.default_rng(7)
    judges = {HEADLINE: 0, SECOND: 1}
    arms = list(methods)
    return {
        "version": 1,
        "name": "demo",
        "recipe": {"model": {"init_from": "assets/demo-base"}, "sft": {"epochs": 2}, "eval": {"samples": 4}},
        "recipe_sha256": "5e" * 32,
        "methods": arms,
        "baseline": "sft",
        "seeds": list(range(seeds)),
        "shared_stages": "per_seed",
        "budget": {
            "kind": "steps",
            "amount": 400,
            "realised": dict.fromkeys(arms, 400),
            "note": "ppo makes whole updates of 16 steps: 400 steps",
        },
        "sampling": {
            "prompts": prompts,
            "samples_per_prompt": 4,
            "prompts_sha256": "89" * 32,
            "temperature": 1.0,
            "max_new_tokens": 64,
            "engine": "vllm 0.32.0",
        },
        "judges": JUDGES,
        "headline_judge": HEADLINE,
        "measures": {method: measures(method, seeds, rng) for method in arms},
        "measure_notes": NOTES,
        "differences": {judge: differences(arms, place, seeds) for judge, place in judges.items()},
        "win_rates": {judge: wins(arms, place) for judge, place in (*judges.items(), (LLM, 0))},
        "ranking": {judge: ranking(arms, place) for judge, place in (*judges.items(), (LLM, 0))},
        "frontier": {method: list(frontier(method, seeds, rng)) for method in arms},
        "curves": {method: curves(method, seeds, rng) for method in arms},
        "reward_model": [reward_model(seed) for seed in range(seeds)],
        "hashes": {
            "data": {"rankings": "ab" * 32, "demonstrations": "cd" * 32},
            "weights": {method: [f"{seed:02x}" * 32 for seed in range(seeds)] for method in arms},
            "tokenizer": "ef" * 32,
        },
        "reading": [
            "ppo gains most vader (+0.558), at 3.6 times the CPU time of dpo.",
            "The difference between simpo and sft is within noise.",
        ],
        "advice": ADVICE,
        "external": EXTERNAL if "ppo" in arms else {},
        "cost": {method: cost(method, seeds) for method in arms}
        | {"judges": {LLM: {"requests": 5120, "cached": 12, "prompt_tokens": 921600, "position_bias": 0.07}}},
        "run": RUN,
    }


def estimate(mean: float, spread: float, seeds: int, rng: np.random.Generator) -> dict[str, Any]:
    """Around `mean`, with an interval of that half width and a value for each seed."""
    per_seed = (mean + spread / 2 * rng.standard_normal(seeds)).tolist()
    return {"mean": mean, "low": mean - spread, "high": mean + spread, "per_seed": per_seed}


def measures(method: str, seeds: int, rng: np.random.Generator) -> dict[str, Any]:
    """Every measure of the contract."""
    gold, second, score, kl, length, _ = LEVELS[method]
    whole = {"low": None, "high": None, "per_seed": [1.0] * seeds}
    found = {
        HEADLINE: estimate(gold, 0.028, seeds, rng),
        SECOND: estimate(second, 0.021, seeds, rng),
        "score": estimate(score, 0.09, seeds, rng),
        "kl_per_sequence": estimate(kl, 0.3, seeds, rng) if kl else {"mean": 0.0, "low": 0.0, "high": 0.0},
        "kl_per_token": {"mean": kl / length, "low": None, "high": None, "per_seed": [kl / length] * seeds},
        "length": estimate(length, 0.4, seeds, rng),
        "eos_rate": {"mean": 0.998, "low": 0.996, "high": 1.0, "per_seed": [0.998] * seeds},
        "truncation_rate": {"mean": 0.002, **whole},
        "distinct_1": {"mean": 0.087, **whole},
        "distinct_2": {"mean": 0.603, **whole},
        "self_bleu": {"mean": 31.2, **whole},
        "entropy": {"mean": 1.93, **whole},
        "sft_perplexity": {"mean": 18.4, **whole},
        "trained_tokens": {"mean": 412345.0, **whole},
        "optimizer_steps": {"mean": 400.0, **whole},
        "models_in_memory": {"mean": 4.0 if method == "ppo" else 2.0, **whole},
    }
    if method == "ppo":
        found["generated_tokens"] = {"mean": 391000.0, **whole}
    elif method != "sft":
        found["reward_accuracy"] = {"mean": 0.673, **whole}
        found["likelihood_length_spearman"] = {"mean": -0.252, **whole}
    return found


def differences(arms: Sequence[str], place: int, seeds: int) -> dict[str, Any]:
    """Method - sft."""
    found = {}
    for method in (arm for arm in arms if arm != "sft"):
        change = LEVELS[method][place] - LEVELS["sft"][place]
        sure = change > 0.06
        found[method] = {
            "mean": change,
            "low": change - 0.06,
            "high": change + 0.06,
            "p": 0.0004 if sure else 0.21,
            "p_holm": 0.0016 if sure else 0.42,
            "per_seed": [change] * seeds,
            "says": f"{method} raises the judge" if sure else f"no significant difference between {method} and sft",
        }
    return found


def wins(arms: Sequence[str], place: int) -> dict[str, Any]:
    """Both directions of every pair; far apart is significant."""
    found: dict[str, Any] = {}
    for a, b in combinations(arms, 2):
        gap = LEVELS[a][place] - LEVELS[b][place]
        rate = float(1 / (1 + np.exp(-4 * gap)))
        sure = abs(gap) > 0.06
        for ours, theirs, mean in ((a, b, rate), (b, a, 1 - rate)):
            words = f"{ours} {'wins' if mean > 0.5 else 'loses'} against {theirs}"
            found.setdefault(ours, {})[theirs] = {
                "mean": mean,
                "low": max(0.0, mean - 0.031),
                "high": min(1.0, mean + 0.031),
                "p": 0.0002 if sure else 0.3,
                "p_holm": 0.002 if sure else 0.61,
                "says": words if sure else f"no significant difference between {ours} and {theirs}",
                "length_controlled": {"rate": mean - 0.02, "low": mean - 0.06, "high": mean + 0.02},
            }
    return found


def ranking(arms: Sequence[str], place: int) -> list[dict[str, Any]]:
    """Best first; sft at 1000."""
    rows = []
    for method in arms:
        strength = 4 * (LEVELS[method][place] - LEVELS["sft"][place])
        elo = 1000 + 400 / np.log(10) * strength
        rows.append({"method": method, "strength": strength, "elo": elo, "low": elo - 18, "high": elo + 18})
    return sorted(rows, key=lambda row: -row["elo"])


def frontier(method: str, seeds: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Four saved steps of PPO and of direct methods, the end of sft alone."""
    start, end = LEVELS["sft"], LEVELS[method]
    steps = (400,) if method == "sft" else (100, 200, 300, 400)
    for seed in range(seeds):
        for step in steps:
            way = (step / 400) ** 0.7
            noise = 0.02 * rng.standard_normal(3)
            values = [start[place] + way * (end[place] - start[place]) for place in range(3)]
            yield {
                "seed": seed,
                "step": step,
                "final": step == 400,
                "kl": end[3] * (step / 400) * (1 + float(noise[0])),
                "score": values[2] + float(noise[1]),
                "judges": {HEADLINE: values[0] + float(noise[1]), SECOND: values[1] + float(noise[2])},
            }


def curves(method: str, seeds: int, rng: np.random.Generator) -> dict[str, Any]:
    """What a stage logs."""
    names = {"sft": ["loss"], "ppo": ["objective/scores", "objective/kl", "policy/entropy_avg", "response/length"]}
    found: dict[str, Any] = {}
    for name in names.get(method, ["loss", "rewards/accuracies", "rewards/margins"]):
        for seed in range(seeds):
            steps = list(range(10, 401, 10))
            values = [2.5 * np.exp(-step / 150) + 0.6 + 0.05 * float(rng.standard_normal()) for step in steps]
            found.setdefault(name, []).append({"seed": seed, "steps": steps, "values": [float(v) for v in values]})
    return found


def reward_model(seed: int) -> dict[str, Any]:
    """One reward model's held-out figures."""
    bins = [
        {"predicted": 0.55 + place / 10, "observed": 0.53 + 0.09 * place + 0.01 * seed, "pairs": 120}
        for place in range(5)
    ]
    titles = ("ratings at least 1 apart", "ratings at least 2 apart", "scores 0.1 to 0.8 apart")
    buckets = [
        {"title": title, "accuracy": 0.7 + 0.05 * place, "low": 0.66 + 0.05 * place, "high": 0.74 + 0.05 * place,
         "pairs": 400 - 100 * place}
        for place, title in enumerate(titles)
    ]  # fmt: skip
    return {
        "seed": seed, "accuracy": 0.712 + seed / 1000, "accuracy_low": 0.69, "accuracy_high": 0.735, "pairs": 1204,
        "ece": 0.031, "bins": bins, "buckets": buckets,
    }  # fmt: skip


def cost(method: str, seeds: int) -> dict[str, Any]:
    """PPO's holds its reward model."""
    own = spent(LEVELS[method][5])
    total = spent(LEVELS[method][5] + 76.0) if method == "ppo" else own
    stages = ["rm", "ppo"] if method == "ppo" else [method]
    return {"stages": stages, **total, "own": own, "per_seed": [total] * seeds}


def spent(seconds: float) -> dict[str, Any]:
    """On a CPU."""
    return {
        "wall_seconds": seconds / 1.7, "cpu_seconds": seconds, "gpu_seconds": None, "peak_memory_gib": 1.42,
        "peak_gpu_memory_gib": None, "money": seconds / 36000,
    }  # fmt: skip


def samples(found: Mapping[str, Any], prompts: int = 30, per_prompt: int = 4) -> list[dict[str, Any]]:
    """Answers of every method and seed to the same prompts."""
    rng = np.random.default_rng(11)
    rows = []
    for prompt in range(prompts):
        text = " ".join(rng.choice(SENTENCES.split(), 8))
        for sample in range(per_prompt):
            answers = {
                method: [_answer(seed, max(1, int(rng.poisson(LEVELS[method][4]))), rng) for seed in found["seeds"]]
                for method in found["methods"]
            }
            rows.append({"prompt_index": prompt, "sample": sample, "prompt": text, "answers": answers})
    return rows


def _answer(seed: int, words: int, rng: np.random.Generator) -> dict[str, Any]:
    gold, second, score, kl = (float(value) for value in rng.standard_normal(4))
    text = " ".join(rng.choice(SENTENCES.split(), words))
    return {
        "seed": seed, "response": text, "finished": bool(words < 25), "tokens": words,
        "scores": {HEADLINE: gold, SECOND: second}, "score": score, "kl": kl,
    }  # fmt: skip


def minimal() -> dict[str, Any]:
    """Two methods and one seed; no judge but the trained reward, no reward-model figures, no intervals, no cost."""
    bare = {"mean": 1.2, "low": None, "high": None, "per_seed": [1.2]}
    return {
        "version": 1, "name": "bare", "recipe": {}, "recipe_sha256": "", "methods": ["sft", "dpo"], "baseline": "sft",
        "seeds": [0], "shared_stages": "once", "budget": {"kind": "recipe", "amount": None, "realised": {}, "note": ""},
        "sampling": {}, "judges": [], "headline_judge": None,
        "measures": {"sft": {"length": bare}, "dpo": {"length": {**bare, "mean": float("nan")}}}, "measure_notes": {},
        "differences": {}, "win_rates": {}, "ranking": {}, "frontier": {}, "curves": {}, "reward_model": [],
        "hashes": {}, "reading": [], "advice": None, "external": {}, "cost": {}, "run": {},
    }  # fmt: skip


NOTES = {
    HEADLINE: {"title": HEADLINE, "unit": "", "better": "higher", "explains": "sentiment of the answer"},
    "score": {"title": "reward score (trained on)", "unit": "", "better": None, "explains": "What PPO maximises."},
    "kl_per_sequence": {
        "title": "KL to SFT per response",
        "unit": "nats",
        "better": None,
        "explains": "Mean over the policy's own samples of sum_t (log p - log p_SFT) (k1, unbiased).",
    },
    "self_bleu": {"title": "self-BLEU", "unit": "0 to 100", "better": "lower", "explains": "BLEU of one with others."},
}
ADVICE = {
    "recommended": "ppo",
    "also": ["dpo"],
    "found": ["feedback: 2,000 rankings", "machine: no GPU"],
    "facts": {"feedback": "rankings", "comparisons": 12000},
    "reasons": [
        {"for": "ppo", "speaks": "for", "weight": "measured", "text": "On this data: ppo wins.", "source": "measured"},
        {"for": "dpo", "speaks": "for", "weight": "some", "text": "Cheaper to train.", "source": "arXiv:2305.18290"},
    ],
    "cautions": ["Better answers are longer: read win rates beside the length-controlled ones."],
}
EXTERNAL = {
    "sft": {"hellaswag": {"acc": {"value": 0.281, "stderr": 0.004}}},
    "ppo": {"hellaswag": {"acc": {"value": 0.274, "stderr": 0.004}}},
}
