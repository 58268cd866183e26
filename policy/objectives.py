"""What each direct method minimises on one batch: log-probabilities of the answers in, its loss and its metrics out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from pipeline.equal_batches import counts
from pipeline.recipe import Recipe
from pipeline.recipe_direct import IftSection, KtoSection
from pipeline.sharding import through
from policy.answers import AnswerBatch, answer_logprobs
from policy.losses import METHODS
from policy.losses.contrast_sft import contrast_sft_loss
from policy.losses.ift import further_tokens, ift_loss, residual_weight, temporal_residual
from policy.losses.kto import kto_loss, kto_reference_point, kto_weights
from policy.losses.pairs import PairLogprobs
from policy.models import output_head
from policy.tensors import logprobs_from_hidden

CHUNK = 1024
"""Rows that go through the vocabulary projection at once."""
Inputs = Mapping[str, Tensor]
Result = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Sizes:
    """What a loss is divided by: the optimiser step's rows (pairs, answers, sequences) and supervised tokens."""

    rows: float | Tensor
    tokens: float | Tensor


@dataclass(frozen=True)
class Step:
    """Number of the optimiser step, from 0, and a function that adds a tensor up over the processes."""

    number: int
    sum_: Callable[[Tensor], Tensor]


class Objective(Protocol):
    """One method with its settings."""

    def sizes(self, inputs: Inputs) -> tuple[int, int]:
        """Rows and supervised tokens of a batch."""
        ...

    def begin_step(self, model: PreTrainedModel, batches: Iterable[Inputs], step: Step) -> None:
        """Called before the batches of an optimiser step, or of an evaluation."""
        ...

    def loss(self, model: PreTrainedModel, inputs: Inputs, sizes: Sizes) -> Result:
        """The batch's share of the step's loss, and detached metrics, one entry per row."""
        ...


@dataclass(frozen=True)
class PairObjective:
    """DPO, IPO, SimPO and ORPO: all pairs of answers that the batch names, from one forward per answer.

    Attributes:
        settings: of the method's loss.
        shared: answers of one prompt stand in one row.
        with_nll: the loss has a language-model term on the chosen answers, and `with_prompts` on their prompts too.
    """

    loss_of_pairs: Callable[..., Result]
    settings: Mapping[str, Any]
    shared: bool
    with_nll: bool = False
    with_prompts: bool = False

    def sizes(self, inputs: Inputs) -> tuple[int, int]:
        counts = torch.bincount(inputs["owner"], minlength=len(inputs["group"]))
        chosen = inputs["pairs"][:, 0]
        tokens = int(counts[chosen].sum())
        if self.with_prompts:
            prompts = torch.bincount(inputs["prompt_owner"], minlength=int(inputs["group"].max()) + 1)
            tokens += int(prompts[inputs["group"][chosen]].sum())
        return len(chosen), tokens

    def begin_step(self, model: PreTrainedModel, batches: Iterable[Inputs], step: Step) -> None:
        pass

    def loss(self, model: PreTrainedModel, inputs: Inputs, sizes: Sizes) -> Result:
        found = answer_logprobs(model, AnswerBatch.of(inputs, shared=self.shared), with_prompts=self.with_prompts)
        chosen, rejected = inputs["pairs"].unbind(1)
        reference = inputs.get("reference")
        pairs = PairLogprobs(
            chosen=found.answers[chosen],
            rejected=found.answers[rejected],
            chosen_tokens=found.answer_tokens[chosen],
            rejected_tokens=found.answer_tokens[rejected],
            ref_chosen=None if reference is None else reference[chosen],
            ref_rejected=None if reference is None else reference[rejected],
        )
        further: dict[str, Tensor] = {}
        if self.with_nll:
            further["chosen_nll"] = -(pairs.chosen + found.prompts[inputs["group"][chosen]]).sum() / sizes.tokens
        loss, metrics = self.loss_of_pairs(pairs, **self.settings, **further, denominator=sizes.rows)
        lengths = {"tokens/chosen": pairs.chosen_tokens, "tokens/rejected": pairs.rejected_tokens}
        return loss, metrics | lengths


class KtoObjective:
    """KTO: answers labelled good or bad, against the KL of answers to other prompts."""

    def __init__(self, section: KtoSection, desirable: int, undesirable: int) -> None:
        automatic = kto_weights(desirable, undesirable)
        self.beta = section.beta
        self.desirable_weight = section.desirable_weight or automatic[0]
        self.undesirable_weight = section.undesirable_weight or automatic[1]
        self.reference_point = torch.zeros(())

    def sizes(self, inputs: Inputs) -> tuple[int, int]:
        return len(inputs["desirable"]), len(inputs["owner"])

    @torch.no_grad()
    def begin_step(self, model: PreTrainedModel, batches: Iterable[Inputs], step: Step) -> None:
        """One reference point for the whole step or evaluation, so that it does not depend on the batches."""
        total = torch.zeros(2, dtype=torch.float64, device=model.device)
        for inputs in batches:
            other = {key.removeprefix("other_"): value for key, value in inputs.items() if key.startswith("other_")}
            batch = AnswerBatch.of(other, shared=False)
            gaps = through(model, model, partial(answer_logprobs, model, batch)).answers - other["reference"]
            if counts(inputs):
                total += torch.stack([gaps.sum(), torch.tensor(float(len(gaps)), device=gaps.device)])
        total = step.sum_(total)
        gap, count = total
        self.reference_point = kto_reference_point(gap[None], torch.zeros_like(gap)[None], count).float()

    def loss(self, model: PreTrainedModel, inputs: Inputs, sizes: Sizes) -> Result:
        found = answer_logprobs(model, AnswerBatch.of(inputs, shared=False)).answers
        loss, metrics = kto_loss(
            found,
            inputs["reference"],
            inputs["desirable"],
            self.reference_point,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            denominator=sizes.rows,
        )
        return loss, metrics | {"kl": self.reference_point.expand(len(found))}


class ContrastObjective:
    """Contrast SFT: the mean over tokens of -log p of the better answers."""

    def sizes(self, inputs: Inputs) -> tuple[int, int]:
        return len(inputs["group"]), len(inputs["owner"])

    def begin_step(self, model: PreTrainedModel, batches: Iterable[Inputs], step: Step) -> None:
        pass

    def loss(self, model: PreTrainedModel, inputs: Inputs, sizes: Sizes) -> Result:
        found = answer_logprobs(model, AnswerBatch.of(inputs, shared=False))
        sums = found.answers.unsqueeze(1)
        return contrast_sft_loss(sums, torch.ones_like(sums, dtype=torch.bool), denominator=sizes.tokens)


class IftObjective:
    """IFT: a first pass predicts, a second one learns from inputs that hold a share of those predictions."""

    def __init__(self, section: IftSection, seed: int) -> None:
        self.section = section
        self.seed = seed
        self.weight = section.residual_weight

    def sizes(self, inputs: Inputs) -> tuple[int, int]:
        return len(inputs["group"]), len(inputs["owner"])

    def begin_step(self, model: PreTrainedModel, batches: Iterable[Inputs], step: Step) -> None:
        """Draws the noise on the residual's weight."""
        draw = torch.randn((), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + step.number))
        self.weight = residual_weight(self.section.residual_weight, self.section.residual_noise, float(draw))

    def loss(self, model: PreTrainedModel, inputs: Inputs, sizes: Sizes) -> Result:
        ids, answers = inputs["input_ids"], inputs["segments"] > 0
        weight = model.get_input_embeddings().get_parameter("weight").detach()
        head, stride = output_head(model), ids.shape[1]
        embedded = embedding(ids, weight)
        with torch.no_grad():
            first = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state.flatten(0, 1)
            best = torch.cat([head(part).argmax(-1) for part in first[inputs["rows"]].split(CHUNK)])
            predicted = ids.flatten().index_put((inputs["rows"],), best).view_as(ids)
        further = embedding(further_tokens(predicted, ids, answers), weight)
        fused = temporal_residual(embedded, further, self.weight)
        hidden = model.base_model(inputs_embeds=fused, use_cache=False).last_hidden_state.flatten(0, 1)
        scores = logprobs_from_hidden(
            hidden.index_select(0, inputs["rows"]), head.weight, inputs["ids"], bias=head.bias, with_entropy=False
        ).logprobs
        dense = torch.zeros(ids.numel(), dtype=scores.dtype, device=ids.device).index_put((inputs["rows"] + 1,), scores)
        return ift_loss(dense.view(-1, stride), answers, gamma=self.section.gamma, denominator=sizes.rows)


def make_objective(name: str, recipe: Recipe, *, shared: bool, labels: tuple[int, int]) -> Objective:
    """The objective of method `name`; `labels` counts desirable and undesirable training answers, for KTO."""
    if name == "kto":
        return KtoObjective(recipe.kto, *labels)
    if name == "ift":
        return IftObjective(recipe.ift, recipe.seed)
    if name == "contrast":
        return ContrastObjective()
    dpo, ipo, simpo, orpo = recipe.dpo, recipe.ipo, recipe.simpo, recipe.orpo
    settings: dict[str, dict[str, Any]] = {
        "dpo": {"beta": dpo.beta, "label_smoothing": dpo.label_smoothing, "variant": dpo.variant},
        "ipo": {"beta": ipo.beta, "length_normalize": ipo.length_normalize},
        "simpo": {
            "beta": simpo.beta,
            "gamma_beta_ratio": simpo.margin,
            "variant": simpo.variant,
            "label_smoothing": simpo.label_smoothing,
            "length_normalize": simpo.length_normalize,
            "sft_weight": simpo.sft_weight,
        },
        "orpo": {"beta": orpo.beta},
    }
    return PairObjective(
        METHODS[name].loss,
        settings[name],
        shared,
        with_nll=name == "orpo" or (name == "simpo" and simpo.sft_weight > 0),
        with_prompts=name == "orpo" and orpo.prompt_loss,
    )
