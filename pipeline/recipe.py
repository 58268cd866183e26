"""The recipe: one YAML file describes one pipeline. Sections, types, bounds and cross-field checks.

Imports pydantic only, so that `tristage show` and `tristage plan` stay instant. `pipeline.load` reads the file and the
command line into a `Recipe`. Every default of the project lives here, once.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.recipe_base import Count, Fraction, Integer, NonNegative, Positive, Section, TrainerArguments
from pipeline.recipe_compare import CompareSection
from pipeline.recipe_direct import (
    ContrastSection,
    DpoSection,
    IftSection,
    IpoSection,
    KtoSection,
    OrpoSection,
    SimpoSection,
)
from pipeline.recipe_judges import Judge
from pipeline.recipe_launch import LaunchSection
from pipeline.recipe_ppo import TRAINED, PpoSection
from pipeline.recipe_rollout import RolloutSection


class Prepare(Section):
    """A path that a command makes before the first stage that needs it (demo data, converted weights)."""

    makes: str
    """File or directory that must exist; when it does, the command is not run."""
    command: str
    """Command line; `{out}` is a temporary sibling of `makes`, renamed to it once the command has succeeded."""

    @model_validator(mode="after")
    def _names_its_output(self) -> Prepare:
        if "{out}" not in self.command:
            raise ValueError("`command` does not say where to write; put {out} where the path of its product belongs")
        return self


class LoraSection(Section):
    """Low-rank adapters, wherever a stage trains one instead of the whole model."""

    rank: Count = 16
    alpha: Positive = 32.0
    """The adapter's product is multiplied by alpha / rank."""
    target_modules: tuple[str, ...] | None = None
    """Names of linear layers, such as `q_proj`; null means all of the model's trunk."""


class ModelSection(Section):
    """The pretrained model that the pipeline starts from."""

    name_or_path: str
    """Local directory or hub id of a causal language model with its tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    chat_template: str | None = None
    """Jinja template, or the path of a file that holds one; default: the tokenizer's own."""
    pad_token: str | None = None
    """Existing token to pad with, for tokenizers whose pad token is missing or equals the EOS token."""
    lora: LoraSection = LoraSection()


class DataSource(Section):
    """A data set: a file, a local data set directory or a hub id."""

    path: str
    split: str = "train"
    config: str | None = None


class DataSection(Section):
    """What the stages read, how rows are split and how long prompts and responses may be."""

    sft: str | DataSource | None = None
    """Demonstrations: rows of `text`, `prompt`/`response` or `messages`; default: the best answers of `preferences`."""
    preferences: str | DataSource | None = None
    """Pairs (`prompt`/`chosen`/`rejected`), rankings (`prompt`/`responses`/`ranks`) or labels
    (`prompt`/`completion`/`label`)."""
    ranking_pairs: Literal["all", "best_worst"] = "all"
    """Pairs that a ranking gives to methods which learn from pairs: every two answers of different rank, or one pair,
    the first of the best against the last of the worst."""
    prompts: str | DataSource | None = None
    """Prompts for rollouts and evaluation; default: the prompts of `preferences`."""
    eval_fraction: Fraction = 0.1
    """Share of prompts held out, chosen by a hash of the prompt; rows with a `split` column keep theirs."""
    split_seed: Integer = 0
    max_prompt_tokens: Count = 512
    max_response_tokens: Count = 512
    long_prompts: Literal["drop", "truncate_left", "error"] = "drop"
    """What happens to a prompt over `max_prompt_tokens`; whatever it is, it is counted and reported."""
    on_error: Literal["raise", "skip"] = "raise"
    """What happens to a row that cannot be read; skipped rows are counted and listed in the stage's log."""


class SftSection(Section):
    """Supervised fine-tuning on demonstrations (trl.SFTTrainer)."""

    init_from: str | None = None
    """Checkpoint to start from; default: `model.name_or_path`."""
    trainer: TrainerArguments = {}
    """trl.SFTConfig settings."""


class RmSection(Section):
    """Reward model trained on ranked answers."""

    init_from: str | None = None
    """Checkpoint to start from; default: the SFT stage's artifact."""
    loss: Literal["ranking", "plackett_luce"] = "ranking"
    """`ranking`: all pairs of one prompt (InstructGPT eq. 1); `plackett_luce`: likelihood of the whole ranking."""
    margin: NonNegative = 0.0
    """Weight of the rating difference (`margin` or `scores` columns) inside the logistic; 0 turns it off."""
    centering: NonNegative = 0.0
    """Weight of the squared sum of a pair's scores, which keeps their mean near zero."""
    normalisation_samples: Count = 512
    """SFT responses that are scored to fix the mean and standard deviation which PPO normalises with."""
    lora: bool = False
    """Train an adapter and the head over the frozen policy, which `ppo.sharing: lora` can share."""
    trainer: TrainerArguments = {}
    """trl.RewardConfig settings."""


RESERVED_JUDGES = {
    *("score", "kl", "kl_per_sequence", "kl_per_token", "length", "eos_rate", "truncation_rate", "entropy"),
    *("distinct_1", "distinct_2", "self_bleu", "sft_perplexity", "likelihood_length_spearman", "reward_accuracy"),
    *("ranking_accuracy", "reward_likelihood_agreement", "trained_tokens", "generated_tokens", "optimizer_steps"),
    *("models_in_memory", "prompt_index", "sample", "prompt", "response", "finished", "tokens"),
}
"""Names of measures, and of columns of the samples."""


class EvalSection(Section):
    """Held-out evaluation of policies."""

    judges: dict[str, Judge] = {}
    prompts: Count = 256
    """Held-out prompts used; fewer when the data has fewer."""
    samples_per_prompt: Count = 4
    shown_samples: Count = 6
    """Fixed prompts whose generations are kept at every evaluation."""
    reward_model: str | None = None
    """Reward model directory for the score of the stage `evaluate`, that of `ppo.rewards`; null leaves the score out,
    unless `ppo.rewards` needs no such model."""

    @model_validator(mode="after")
    def _judges_have_names_of_their_own(self) -> EvalSection:
        taken = sorted(RESERVED_JUDGES & self.judges.keys())
        if taken:
            raise ValueError(f"{taken[0]!r} is a measure of every evaluation and no name for a judge; rename it")
        for name, judge in self.judges.items():
            if judge.function is None and not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"files are called after judge {name!r}: rename it, in letters, digits, _ and -")
        return self


class TrackingSection(Section):
    """Where metrics go besides `metrics.jsonl`."""

    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "tristage"
    progress: bool = True
    """Progress display on a terminal; plain lines elsewhere."""


class Recipe(Section):
    """One pipeline: its name, where it is written, and a section per stage."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output_dir: str = "runs"
    seed: Annotated[Integer, Field(ge=0)] = 0
    prepare: tuple[Prepare, ...] = ()
    model: ModelSection
    data: DataSection = DataSection()
    sft: SftSection = SftSection()
    rm: RmSection = RmSection()
    ppo: PpoSection = PpoSection()
    dpo: DpoSection = DpoSection()
    ipo: IpoSection = IpoSection()
    kto: KtoSection = KtoSection()
    simpo: SimpoSection = SimpoSection()
    orpo: OrpoSection = OrpoSection()
    ift: IftSection = IftSection()
    contrast: ContrastSection = ContrastSection()
    rollout: RolloutSection = RolloutSection()
    eval: EvalSection = EvalSection()
    compare: CompareSection = CompareSection()
    launch: LaunchSection = LaunchSection()
    tracking: TrackingSection = TrackingSection()

    @property
    def with_score(self) -> bool:
        """Whether `evaluate` gives PPO's score: `eval.reward_model` is set, or the score needs no such model."""
        return self.eval.reward_model is not None or not self.ppo.with_trained_model

    @model_validator(mode="after")
    def _eval_reads_its_reward_model(self) -> Recipe:
        if self.eval.reward_model is not None and not self.ppo.with_trained_model:
            raise ValueError(f"eval.reward_model is set, but no entry of ppo.rewards is `model: {TRAINED}`")
        return self

    @model_validator(mode="after")
    def _ptx_has_demonstrations(self) -> Recipe:
        if self.ppo.ptx_coef > 0.0 and self.data.sft is None and self.data.preferences is None:
            raise ValueError(
                f"ppo.ptx_coef ({self.ppo.ptx_coef:g}) weighs the loss on data.sft, which is not set; set data.sft, or "
                "ppo.ptx_coef to 0"
            )
        return self

    @model_validator(mode="after")
    def _ranks_outwait_the_server(self) -> Recipe:
        server, launch = self.rollout.server, self.launch
        patience = 2 * server.timeout_seconds + server.patience_seconds
        if self.rollout.mode == "server" and launch.world > 1 and launch.timeout_seconds < patience:
            raise ValueError(
                f"launch.timeout_seconds ({launch.timeout_seconds:g}) must be at least 2 * rollout.server's "
                f"timeout_seconds + its patience_seconds ({patience:g}), since the other ranks wait while the first "
                "waits for the server"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_ahead_are_corrected(self) -> Recipe:
        if self.rollout.async_steps == 0:
            return self
        if self.rollout.mode != "server":
            raise ValueError(
                "rollout.async_steps: 1 samples while the policy is trained, which needs a device of its own; set "
                "rollout.mode: server"
            )
        if self.ppo.importance_level == "off":
            raise ValueError(
                "rollout.async_steps: 1 learns from responses of older weights, and ppo.importance_level is off; set "
                "it to token or sequence"
            )
        return self
