"""STAGE generate: samples of any checkpoint on the recipe's held-out prompts, without training."""

from __future__ import annotations

import json
import time
from typing import Any

from pipeline.data import load_prompts
from pipeline.evaluation.measures import length_stats
from pipeline.evaluation.policy_eval import SampledResponses, sample_responses
from pipeline.stage import Stage
from pipeline.stage_main import stage_main
from pipeline.tokens import Encoder, encode_prompts, load_tokenizer
from pipeline.tracking import SAMPLES


def run(stage: Stage) -> dict[str, Any]:
    """Sample `eval.samples_per_prompt` responses to `eval.prompts` held-out prompts into
    samples.jsonl.

    Rows: prompt, response, finished, tokens (EOS included) and logprob, the sum over the response's
    tokens in nats.
    """
    from rollout.open import open_engine

    recipe = stage.recipe
    policy = stage.inputs["policy"].path
    tokenizer = load_tokenizer(policy, recipe.model)
    stage.record_tokenizer(tokenizer)
    encoder = Encoder(tokenizer, recipe.data.max_prompt_tokens, recipe.data.max_response_tokens)
    split = load_prompts(recipe.data)
    encoded, lengths = encode_prompts(split.eval[: recipe.eval.prompts], encoder, recipe.data)
    for line in (*split.lines(), *lengths.lines()):
        stage.say(line)
    engine = open_engine(recipe, policy, stage.say, ranks=stage.ranks)
    try:
        started = time.perf_counter()
        sampled = sample_responses(
            engine,
            encoded,
            max_new_tokens=recipe.data.max_response_tokens,
            temperature=recipe.rollout.temperature,
            samples_per_prompt=recipe.eval.samples_per_prompt,
            seed=recipe.seed,
        )
        seconds = time.perf_counter() - started
    finally:
        engine.close()
    rows = sample_rows(sampled, encoder)
    if stage.ranks.is_main:
        with (stage.out / SAMPLES).open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    stage.record(
        data={"prompts": split.report},
        lengths=lengths.as_dict(),
        engine={"name": engine.name, "version": engine.version, "tokens_per_second": round(tokens / seconds, 1)},
    )
    for row in rows[:: recipe.eval.samples_per_prompt][: recipe.eval.shown_samples]:
        stage.say(f"  {row['prompt']} >{row['response']}")
    stage.say(f"{len(rows)} responses, {tokens} tokens, {tokens / seconds:.0f} tokens/s with {engine.name}")
    return {
        "responses": len(rows),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "eos_rate": sum(row["finished"] for row in rows) / len(rows),
        "mean_length": length_stats([row["tokens"] for row in rows]).mean,
    }


def sample_rows(sampled: SampledResponses, encoder: Encoder) -> list[dict[str, Any]]:
    """One row per response, prompt by prompt."""
    return [
        {
            "prompt": encoder.prompt_text(prompt),
            "response": encoder.decode(completion.token_ids),
            "finished": completion.finished,
            "tokens": len(completion.token_ids),
            "logprob": sum(completion.logprobs),
        }
        for prompt, _, completion in sampled.flat
    ]


if __name__ == "__main__":
    stage_main("generate", run=run, saves=False)
