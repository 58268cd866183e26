"""What a direct method writes beside the model: samples and reports on the way, and the comparison with its start.

Reports lie where PPO's do: `evaluation/update_<n>.json` after n optimiser steps, that of the start under 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from pipeline.adapters import merged_weights, using
from pipeline.data import load_prompts
from pipeline.errors import UserError
from pipeline.evaluation.judges import JudgeFunction, load_judges
from pipeline.evaluation.policy_eval import PolicyReport, SampledResponses, measure, sample_responses
from pipeline.evaluation.saved import save_report
from pipeline.evaluation.shared import shared_judges
from pipeline.evaluation.summary import summarise
from pipeline.sharding import whole
from pipeline.stage import Stage
from pipeline.tokens import EncodedPrompt, Encoder, encode_prompts
from pipeline.trainer_ranks import place_frozen
from policy.likelihoods import sample_sums
from policy.models import POLICY, load_policy, save_model
from policy.ppo.held_out import report_metrics
from rollout.engine import EngineKind, RolloutEngine
from rollout.open import open_engine


@dataclass(frozen=True)
class Asked:
    """A policy's encoder and the held-out prompts as it reads them."""

    encoder: Encoder
    prompts: Sequence[EncodedPrompt]


def asked(stage: Stage, encoder: Encoder) -> Asked:
    """The prompts that every policy of the run is evaluated on."""
    split = load_prompts(stage.recipe.data)
    encoded, _ = encode_prompts(split.eval, encoder, stage.recipe.data)
    if not encoded:
        raise UserError("data.prompts: no held-out prompt is left.", mend="Raise data.max_prompt_tokens.")
    return Asked(encoder, encoded[: stage.recipe.eval.prompts])


@dataclass(frozen=True)
class Judged:
    """What all evaluations of a run share.

    Attributes:
        start, own: the policy's start and the trained policy with their prompts, which differ under contrast SFT.
        adapted: the policy is an adapter over its start.
        sharded: models lie in parts on the ranks.
    """

    stage: Stage
    start: Asked
    own: Asked
    adapted: bool
    sharded: bool = False

    @cached_property
    def judges(self) -> dict[str, JudgeFunction]:
        """Those of the recipe that score a response by itself."""
        return shared_judges(load_judges(self.stage.recipe.eval), self.stage.ranks)

    def weights(self, model: PreTrainedModel) -> Iterable[tuple[str, Tensor]]:
        """The policy's weights by name, as a rollout engine loads them."""
        return whole(merged_weights(model, POLICY) if self.adapted else model.state_dict().items())

    def sample(self, engine: RolloutEngine, prompts: Sequence[EncodedPrompt], count: int) -> SampledResponses:
        """`count` samples of each prompt; the same seeds every time."""
        recipe = self.stage.recipe
        return sample_responses(
            engine,
            prompts,
            max_new_tokens=recipe.data.max_response_tokens,
            temperature=recipe.rollout.temperature,
            samples_per_prompt=count,
            seed=recipe.seed,
        )

    def report(self, samples: SampledResponses, model: PreTrainedModel) -> PolicyReport:
        """The measures of the trained policy's samples, with the KL to its start."""
        kl, seed = self._kl(samples, model), self.stage.recipe.seed
        return measure(samples, self.own.encoder, self.judges, scores=None, kl_per_sequence=kl, seed=seed)

    def report_of_start(self, samples: SampledResponses) -> PolicyReport:
        """The measures of the start's samples, whose KL to itself is 0."""
        kl, seed = torch.zeros(len(samples.flat)), self.stage.recipe.seed
        return measure(samples, self.start.encoder, self.judges, scores=None, kl_per_sequence=kl, seed=seed)

    def _kl(self, samples: SampledResponses, model: PreTrainedModel) -> Tensor:
        """k1 of every response [prompts * samples]: sum_t(log p - log p_start), nats, each with its own prompt.

        The start is loaded for it and given back, unless it is what an adapter stands on.
        """
        policy = self._sums(model, samples, self.own)
        if self.adapted:
            with using(model, None):
                return policy - self._sums(model, samples, self.start)
        load = partial(load_policy, self.stage.inputs["policy"].path, "float32")
        reference = place_frozen(self.stage, load, sharded=self.sharded).eval()
        return policy - self._sums(reference, samples, self.start)

    def _sums(self, model: PreTrainedModel, samples: SampledResponses, by: Asked) -> Tensor:
        prompts = [prompt.ids for prompt in by.prompts[: len(samples.prompts)]]
        temperature, pad_id = self.stage.recipe.rollout.temperature, by.encoder.pad_token_id
        return sample_sums(model, samples, prompts, pad_id, temperature, ranks=self.stage.ranks).logprobs


class ShowSamples(TrainerCallback):
    """Keeps the policy's responses to a few fixed prompts at every evaluation of the Trainer.

    Where the recipe has judges they judge one response to each held-out prompt, for a curve of judges over the KL. The
    last evaluation is left to `evaluate`, which takes more samples.
    """

    def __init__(self, judged: Judged) -> None:
        self.judged, self.stage = judged, judged.stage
        self.shown = self.stage.recipe.eval.shown_samples
        self.with_judges = bool(judged.judges)
        self.engine: RolloutEngine | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Samples with the transformers engine, which starts at once."""
        judged, encoder = self.judged, self.judged.own.encoder
        if self.engine is None:
            self.engine = _engine(self.stage, encoder, kind="transformers")
        self.engine.load_weights(judged.weights(model))
        with_report = self.with_judges and state.global_step < state.max_steps
        prompts = judged.own.prompts if with_report else judged.own.prompts[: self.shown]
        samples = judged.sample(self.engine, prompts, 1)
        rows = [
            {
                "prompt": encoder.prompt_text(prompt),
                "response": encoder.decode(completion.token_ids),
                "finished": completion.finished,
                "tokens": len(completion.token_ids),
            }
            for prompt, _, completion in samples.flat[: self.shown]
        ]
        self.stage.tracker.samples(state.global_step, rows)
        if with_report:
            report = judged.report(samples, model)
            if self.stage.ranks.is_main:
                save_report(self.stage.out, state.global_step, report)
            self.stage.tracker.log(state.global_step, report_metrics(report))

    def close(self) -> None:
        """Gives the engine's copy of the policy back."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None


def evaluate(judged: Judged, step: int, model: PreTrainedModel) -> dict[str, Any]:
    """Judges the start and the trained policy on the same prompts with the same seeds; writes and prints the summary.

    `step` is the number of optimiser steps taken. Returns the final metrics, under the names of every other stage.
    """
    stage, recipe = judged.stage, judged.stage.recipe
    model.eval()
    with closing(_engine(stage, judged.start.encoder)) as engine:
        count = recipe.eval.samples_per_prompt
        before = judged.sample(engine, judged.start.prompts, count)
        engine.load_weights(judged.weights(model))
        after = judged.sample(engine, judged.own.prompts, count)
    stage.record(engine={"name": engine.name, "version": engine.version})
    untrained, trained = judged.report_of_start(before), judged.report(after, model)
    stage.tracker.log(step, report_metrics(trained))
    names = (stage.inputs["policy"].kind.upper(), stage.name.upper())
    summary = summarise(untrained, trained, names=names, shown=recipe.eval.shown_samples, seed=recipe.seed)
    stage.console.print(summary)
    if stage.ranks.is_main:
        save_report(stage.out, 0, untrained)
        save_report(stage.out, step, trained)
        (stage.out / "summary.md").write_text(summary.markdown(), encoding="utf-8")
    stage.say(f"try it: tristage chat {stage.out.with_name(stage.name)}")
    return {
        "difference": {name: estimate._asdict() for name, estimate in summary.differences.items()},
        **report_metrics(trained),
    }


def _engine(stage: Stage, encoder: Encoder, kind: EngineKind | None = None) -> RolloutEngine:
    """An engine that holds the policy's start; one from a hub is read again and saved first."""
    source = stage.inputs["policy"].path
    path = Path(source)
    if not path.is_dir():
        path = stage.state / "engine"
        save_model(load_policy(source, "float32"), encoder.tokenizer, path, ranks=stage.ranks)
    return open_engine(stage.recipe, path, stage.say, kind=kind, ranks=stage.ranks)
