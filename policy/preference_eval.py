"""What a direct method writes beside the model: samples while it trains, and the comparison with its start."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from pipeline.adapters import merged_weights, using
from pipeline.data import load_prompts
from pipeline.errors import UserError
from pipeline.evaluation.judges import load_judges
from pipeline.evaluation.policy_eval import SampledResponses, measure, sample_responses
from pipeline.evaluation.summary import summarise
from pipeline.stage import Stage
from pipeline.tokens import EncodedPrompt, Encoder, encode_prompts
from policy.answers import Group
from policy.models import POLICY, load_policy, save_model
from policy.ppo.held_out import report_metrics, save_report
from policy.preference_data import Row, reference_sums
from rollout.engine import EngineKind, RolloutEngine
from rollout.open import open_engine


def weights_of(model: PreTrainedModel, *, adapted: bool) -> Iterable[tuple[str, Tensor]]:
    """The policy's weights by name, as a rollout engine loads them."""
    return merged_weights(model, POLICY) if adapted else model.state_dict().items()


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


class ShowSamples(TrainerCallback):
    """Writes the policy's responses to a few fixed prompts at every evaluation of the Trainer."""

    def __init__(self, stage: Stage, own: Asked, *, adapted: bool) -> None:
        self.stage, self.encoder, self.adapted = stage, own.encoder, adapted
        self.prompts = own.prompts[: stage.recipe.eval.shown_samples]
        self.engine: RolloutEngine | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Samples with the transformers engine, which starts at once."""
        if self.engine is None:
            self.engine = _engine(self.stage, model, self.encoder, kind="transformers")
        self.engine.load_weights(weights_of(model, adapted=self.adapted))
        samples = _sample(self.stage, self.engine, self.prompts, samples_per_prompt=1)
        rows = [
            {
                "prompt": self.encoder.prompt_text(prompt),
                "response": self.encoder.decode(completion.token_ids),
                "finished": completion.finished,
                "tokens": len(completion.token_ids),
            }
            for prompt, _, completion in samples.flat
        ]
        self.stage.tracker.samples(state.global_step, rows)

    def close(self) -> None:
        """Gives the engine's copy of the policy back."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None


def evaluate(stage: Stage, model: PreTrainedModel, start: Asked, own: Asked, *, adapted: bool) -> dict[str, Any]:
    """Judges the start and the trained policy on the same prompts with the same seeds; writes and prints the summary.

    Returns the final metrics, under the names of every other stage.
    """
    recipe = stage.recipe
    judges = load_judges(recipe.eval)
    model.eval()
    with closing(_engine(stage, model, start.encoder)) as engine:
        count = recipe.eval.samples_per_prompt
        before = _sample(stage, engine, start.prompts, samples_per_prompt=count)
        engine.load_weights(weights_of(model, adapted=adapted))
        after = _sample(stage, engine, own.prompts, samples_per_prompt=count)
    gap = _kl(stage, model, after, start, adapted=adapted)
    stage.record(engine={"name": engine.name, "version": engine.version})
    none = torch.zeros_like(gap)
    untrained = measure(before, start.encoder, judges, scores=None, kl_per_sequence=none, seed=recipe.seed)
    trained = measure(after, own.encoder, judges, scores=None, kl_per_sequence=gap, seed=recipe.seed)
    for place, report in enumerate((untrained, trained)):
        save_report(stage.out, place, report)
    names = (stage.inputs["policy"].kind.upper(), stage.name.upper())
    summary = summarise(untrained, trained, names=names, shown=recipe.eval.shown_samples, seed=recipe.seed)
    stage.console.print(summary)
    (stage.out / "summary.md").write_text(summary.markdown(), encoding="utf-8")
    stage.say(f"try it: tristage chat {stage.out.with_name(stage.name)}")
    return {
        "difference": {name: estimate._asdict() for name, estimate in summary.differences.items()},
        **report_metrics(trained),
    }


def _engine(stage: Stage, model: PreTrainedModel, encoder: Encoder, kind: EngineKind | None = None) -> RolloutEngine:
    """An engine that holds the policy's start; one from a hub is saved first."""
    path = Path(stage.inputs["policy"].path)
    if not path.is_dir():
        path = stage.state / "engine"
        save_model(model, encoder.tokenizer, path)
    return open_engine(stage.recipe, path, stage.say, kind=kind)


def _sample(
    stage: Stage, engine: RolloutEngine, prompts: Sequence[EncodedPrompt], *, samples_per_prompt: int
) -> SampledResponses:
    recipe = stage.recipe
    return sample_responses(
        engine,
        prompts,
        max_new_tokens=recipe.data.max_response_tokens,
        temperature=recipe.rollout.temperature,
        samples_per_prompt=samples_per_prompt,
        seed=recipe.seed,
    )


def _kl(stage: Stage, model: PreTrainedModel, samples: SampledResponses, start: Asked, *, adapted: bool) -> Tensor:
    """k1 of every response [prompts * samples]: sum_t(log p - log p_start), nats, each with its own prompt."""
    pad_id, count = start.encoder.pad_token_id, stage.recipe.eval.samples_per_prompt
    own = [Group(ids, [completion.token_ids]) for _, ids, completion in samples.flat]
    policy = answer_sums(model, own, pad_id)
    answers = [completion.token_ids for _, _, completion in samples.flat]
    groups = [Group(start.prompts[place // count].ids, [answer]) for place, answer in enumerate(answers)]
    if adapted:
        with using(model, None):
            return policy - answer_sums(model, groups, pad_id)
    reference = load_policy(stage.inputs["policy"].path, "float32", model.device).eval()
    return policy - answer_sums(reference, groups, pad_id)


def answer_sums(model: PreTrainedModel, groups: Sequence[Group], pad_id: int) -> Tensor:
    """sum log p of every answer of the groups under `model`, nats, in their order."""
    rows = [Row(group) for group in groups]
    return torch.tensor(reference_sums(rows, model, pad_id, shared=False, autocast=nullcontext))
