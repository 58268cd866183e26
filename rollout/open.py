"""Opens the rollout engine that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.recipe import Recipe
from pipeline.tokens import Encoder, load_tokenizer
from rollout.engine import EngineKind, EngineOptions, RolloutEngine, make_engine
from rollout.stop import stop_tokens, with_stops

MAX_SEQUENCES = 256


def open_engine(
    recipe: Recipe,
    model_dir: str | Path,
    notify: Callable[[str], None],
    *,
    max_sequences: int = MAX_SEQUENCES,
    kind: EngineKind | None = None,
) -> RolloutEngine:
    """An engine over the checkpoint `model_dir`, sized by the recipe's `data` and `rollout` sections.

    Its responses end at the EOS and at the texts of `rollout.stop`.

    Args:
        model_dir: directory or hub id with configuration, weights and tokenizer.
        notify: receives one line when the engine is not the preferred one.
        max_sequences: sequences decoded at once.
        kind: in place of `rollout.engine`.

    Errors:
        UserError: see `make_engine` and `stop_tokens`.
    """
    stops = recipe.rollout.stop
    encoder = Encoder(
        load_tokenizer(model_dir, recipe.model), recipe.data.max_prompt_tokens, recipe.data.max_response_tokens
    )
    options = EngineOptions(
        max_model_len=recipe.data.max_prompt_tokens + recipe.data.max_response_tokens,
        max_sequences=max_sequences,
        stop_token_ids=(*encoder.stop_token_ids, *stop_tokens(stops, encoder)),
        dtype=recipe.model.dtype,
        seed=recipe.seed,
        kv_cache_gib=recipe.rollout.kv_cache_gib,
        gpu_memory_utilization=recipe.rollout.gpu_memory_utilization,
    )
    engine = make_engine(kind or recipe.rollout.engine, model_dir, options, notify)
    return with_stops(engine, stops, encoder)
