"""The recipe's sections of the direct methods, which take the place of rm and ppo.

Formulas stand in `policy/losses`; the defaults are those of the methods' own code where it names any.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.recipe_base import NonNegative, Number, Positive, Section, TrainerArguments

DIRECT = ("dpo", "ipo", "kto", "simpo", "orpo", "ift", "contrast")
"""The methods: sections of the recipe, and stages."""
Share = Annotated[Number, Field(ge=0.0, le=1.0)]
Smoothing = Annotated[Number, Field(ge=0.0, lt=0.5)]


class DirectSection(Section):
    """What every direct method has."""

    policy: str | None = None
    """Checkpoint to start from; default: the SFT stage's artifact."""
    lora: bool = False
    """Train an adapter (`model.lora`) instead of the whole model; what is written is merged."""
    trainer: TrainerArguments = {}
    """transformers.TrainingArguments settings."""


class ReferencedSection(DirectSection):
    """A method whose loss compares the policy with a frozen reference."""

    reference: str | None = None
    """Checkpoint of the frozen reference: an ancestor of the policy; default: the one that training starts from."""
    beta: Positive = 0.1
    """Inverse temperature: how dear it is to leave the reference."""


class DpoSection(ReferencedSection):
    """Direct preference optimisation."""

    variant: Literal["sigmoid", "robust", "hinge"] = "sigmoid"
    label_smoothing: Smoothing = 0.0
    """Share of preferences taken to be flipped: conservative DPO under `sigmoid`, unbiased under `robust`."""


class IpoSection(ReferencedSection):
    """Identity preference optimisation."""

    length_normalize: bool = True
    """Compare means over tokens (trl, HALOs), or else sums (eric-mitchell/direct-preference-optimization)."""


class KtoSection(ReferencedSection):
    """Kahneman-Tversky optimisation, from answers labelled good or bad."""

    desirable_weight: Positive | None = None
    """Weight of good answers; by default both weights balance the two kinds by the paper's rule."""
    undesirable_weight: Positive | None = None


class SimpoSection(DirectSection):
    """SimPO: the mean log-probability is the reward, with a margin and without a reference."""

    beta: Positive = 2.0
    gamma_beta_ratio: NonNegative | None = None
    """Margin that chosen answers must be ahead by, over beta; 0.25 unless `gamma` is set."""
    gamma: NonNegative | None = None
    """The same margin itself."""
    variant: Literal["sigmoid", "hinge"] = "sigmoid"
    label_smoothing: Smoothing = 0.0
    length_normalize: bool = True
    """Rewards are means over tokens; sums for the ablation."""
    sft_weight: NonNegative = 0.0
    """Weight of the language-model loss on chosen answers."""

    @model_validator(mode="after")
    def _has_one_margin(self) -> SimpoSection:
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ValueError("`gamma` and `gamma_beta_ratio` are both set; keep one (gamma = ratio * beta)")
        return self

    @property
    def margin(self) -> float:
        """gamma / beta."""
        if self.gamma is not None:
            return self.gamma / self.beta
        return 0.25 if self.gamma_beta_ratio is None else self.gamma_beta_ratio


class OrpoSection(DirectSection):
    """ORPO: language-model loss and odds ratio, without a reference; may start from the base model."""

    beta: Positive = 0.1
    """Weight of the odds ratio (the paper's lambda)."""
    prompt_loss: bool = True
    """The language-model loss is over prompt and chosen answer, as in the authors' code; else over the answer."""


class IftSection(DirectSection):
    """Intuitive fine-tuning, from good answers alone."""

    gamma: Share = 0.95
    """How much of a later token's loss counts for an earlier one."""
    residual_weight: Share = 0.2
    """Share of the model's own prediction in each input embedding (the paper's lambda)."""
    residual_noise: NonNegative = 0.0
    """Standard deviation of the noise on that share, relative to it."""


class ContrastTexts(Section):
    """The two texts of contrast SFT; both have the slots {instruction} and {prompt} and end in {chosen}."""

    training: str
    """Also shows {rejected}."""
    inference: str
    """The form in which the policy is asked afterwards."""


class ContrastSection(DirectSection):
    """SFT on texts that show a worse answer before the better one; loss on the better one."""

    template: Literal["english", "chinese"] | ContrastTexts = "english"
    instruction: str = ""
    """Fills the templates' slot of that name."""
    plain_share: Share = 0.5
    """Share of examples in the inference form, without the worse answer; at 0 the policy only learns to mend one."""
    curriculum: bool = False
    """From answers that are clearly different to subtle pairs, instead of a random order."""
