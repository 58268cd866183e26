"""Opens the rollout engine that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.ranks import ALONE, Ranks
from pipeline.recipe import Recipe
from pipeline.tokens import Encoder, load_tokenizer
from rollout.engine import MAX_SEQUENCES, EngineKind, RolloutEngine, engine_options, make_engine
from rollout.server_engine import ServerEngine
from rollout.split import SharedEngine, SplitEngine, everywhere
from rollout.stop import stop_tokens, with_stops

WEIGHTS = "rollout_weights"


def open_engine(
    recipe: Recipe,
    model_dir: str | Path,
    notify: Callable[[str], None],
    *,
    max_sequences: int = MAX_SEQUENCES,
    kind: EngineKind | None = None,
    ranks: Ranks = ALONE,
) -> RolloutEngine:
    """An engine over the checkpoint `model_dir`, sized by the recipe's `data` and `rollout` sections.

    Its responses end at the EOS and at the texts of `rollout.stop`. All ranks get the same responses, in order.

    Args:
        model_dir: directory or hub id with configuration, weights and tokenizer.
        notify: receives one line when the engine is not the preferred one.
        max_sequences: sequences decoded at once, on each rank.
        kind: in place of `rollout.engine`, and then always inside this process.
        ranks: the processes that open the engine together and call it together.

    Errors:
        UserError: see `make_engine`, `ServerEngine` and `stop_tokens`; on every rank.
    """
    server = recipe.rollout.server if kind is None and recipe.rollout.mode == "server" else None

    def build() -> RolloutEngine:
        stops = recipe.rollout.stop
        encoder = Encoder(
            load_tokenizer(model_dir, recipe.model), recipe.data.max_prompt_tokens, recipe.data.max_response_tokens
        )
        stop_ids = (*encoder.stop_token_ids, *stop_tokens(stops, encoder))
        options = engine_options(recipe, stop_ids, max_sequences)
        if server is None:
            engine: RolloutEngine = make_engine(kind or recipe.rollout.engine, model_dir, options, notify)
        else:
            weights = Path(server.weights_dir or recipe.output_dir) / recipe.name / WEIGHTS
            engine = ServerEngine(model_dir, options, server, weights, notify)
        return with_stops(engine, stops, encoder)

    if server is not None:
        return SharedEngine(everywhere(ranks, lambda: build() if ranks.is_main else None), ranks)
    engine = everywhere(ranks, build)
    return engine if ranks.world == 1 else SplitEngine(engine, ranks)
