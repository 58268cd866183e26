"""The recipe: one YAML file describes one pipeline. Sections, types, bounds and cross-field checks.

Imports pydantic only, so that `tristage show` and `tristage plan` stay instant. `pipeline.load` reads the file and the
command line into a `Recipe`. Every default of the project lives here, once.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.recipe_base import Count, Fraction, Integer, NonNegative, Number, Positive, Section, TrainerArguments
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


class RewardSource(Section):
    """One term of PPO's score: a reward model, or a Python function of your own."""

    model: str | None = None
    """Directory of a reward model with its normalisation; `rm` is that of `ppo.reward_model`."""
    function: str | None = None
    """`module:function`, importable from the working directory, called with lists of prompts, responses and columns."""
    kwargs: dict[str, Any] = {}
    """Further arguments of the function."""
    weight: Number = 1.0
    """Factor of the source's scores, which are a model's normalised ones and a function's as they are."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> RewardSource:
        if (self.model is None) == (self.function is None):
            raise ValueError("give exactly one of `model` and `function`")
        if self.kwargs and self.function is None:
            raise ValueError("`kwargs` are arguments of a `function`, and this is a model")
        if self.weight == 0.0:
            raise ValueError("a weight of 0 turns the source off; remove it instead")
        return self


TRAINED = "rm"
"""What `ppo.rewards` calls the reward model of `ppo.reward_model`."""
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class PpoSection(Section):
    """Proximal policy optimisation against a score, with a KL penalty to the reference."""

    policy: str | None = None
    """Checkpoint of the initial policy, which is also the frozen reference; default: the SFT stage's artifact."""
    reward_model: str | None = None
    """Reward model directory; default: the RM stage's artifact."""
    rewards: Annotated[dict[SourceName, RewardSource], Field(min_length=1)] = {TRAINED: RewardSource(model=TRAINED)}
    """Sources of the score by name: it is the sum of weight * source."""
    sharing: Literal["full", "lora_policy", "lora"] = "full"
    """`full`: policy, reference, critic and reward model are models of their own; `lora_policy`: the policy is an
    adapter over the reference; `lora`: so are the critic and every reward model trained with `rm.lora`."""
    critic: str = "reward_model"
    """Its start: `reward_model`, the first one with the policy's tokenizer, or the policy where there is none;
    `policy`, with a zero head; `shared`, a zero head on the policy's own trunk, so that one forward serves both;
    or the directory of a sequence classifier with one output."""
    value_coef: NonNegative = 0.1
    """Weight of the critic's loss in the policy's, where they share a trunk (`critic: shared`)."""
    updates: Count = 100
    """Rollout batches sampled and learnt from."""
    rollout_batch_size: Count = 64
    """Sequences sampled per update."""
    num_ppo_epochs: Count = 4
    """Passes over each rollout batch."""
    num_minibatches: Count = 1
    """Optimiser steps per pass: each minibatch is one step of rollout_batch_size / num_minibatches sequences."""
    max_tokens_per_micro_batch: Count = 16384
    """Padded tokens in one forward; bounds memory, never changes the result."""
    gradient_checkpointing: bool = False
    """Keep a layer's input only and compute the layer again in the backward pass: less memory, a third more time."""
    learning_rate: Positive = 3e-6
    critic_learning_rate: Positive = 1e-5
    lr_schedule: Literal["linear", "constant"] = "linear"
    """`linear` decays to zero over all updates."""
    adam_epsilon: Positive = 1e-5
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    cliprange: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.2
    cliprange_high: Positive | None = None
    """Upper clip of the ratio where it differs from the lower one (DAPO); null means `cliprange`."""
    dual_clip: Annotated[Number, Field(gt=1.0)] | None = None
    """Bound on the loss of a negative advantage, in multiples of it; null turns it off."""
    loss_reduction: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    """What the losses are averaged over; `fixed_length` divides by sequences x data.max_response_tokens."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus in the policy's loss."""
    ptx_coef: NonNegative = 0.0
    """Weight of the language-model loss on `data.sft` in the policy's loss (PPO-ptx); 0 turns it off."""
    target_kl: Positive | None = None
    """Mean 0.5 (log-ratio)^2 per token, in nats, above which the rest of an update is left out; null: never."""
    critic_warmup_updates: Annotated[Integer, Field(ge=0)] = 0
    """First updates in which only the critic is trained."""
    cliprange_value: Positive | None = 0.2
    """Clip of the value function's change; null turns it off."""
    gamma: Annotated[Number, Field(gt=0.0, le=1.0)] = 1.0
    lam: Annotated[Number, Field(ge=0.0, le=1.0)] = 0.95
    kl_coef: NonNegative = 0.05
    """Weight of the per-token KL penalty in the rewards; with a target, its initial value."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of the KL in the rewards; k1 is the unbiased one."""
    kl_loss_coef: NonNegative = 0.0
    """Weight of the KL to the reference as a term of the policy's loss."""
    kl_loss_estimator: Literal["k2", "k3"] = "k3"
    """Value of that term; its gradient is k2's for both, which is the KL's."""
    kl_target_per_sequence: Positive | None = None
    """Nats per sequence that the adaptive controller steers to; null keeps `kl_coef` fixed."""
    kl_horizon: Positive = 10000.0
    """Sequences over which the adaptive controller moves `kl_coef`."""
    score_clip: Positive | None = 10.0
    """Normalised scores are clipped to plus or minus this; null turns it off."""
    missing_eos_penalty: NonNegative = 1.0
    """Subtracted from the normalised score of a response that was cut off before its EOS."""
    length_penalty: NonNegative = 0.0
    """Subtracted from the normalised score for every token of the response."""
    score_scaling: Literal["none", "running"] = "none"
    """`running` divides the scores by the standard deviation of all scores so far."""
    whiten_rewards: bool = False
    """Scale the token rewards of a batch to variance 1, their mean unmoved."""
    importance_level: Literal["off", "token", "sequence"] = "off"
    """Weigh the policy's loss by trainer / engine probability where the two differ (rollout.logprob_tolerance)."""
    importance_mode: Literal["clamp", "mask"] = "clamp"
    """Weights out of bounds are cut to them, or set to 0."""
    importance_low: Annotated[Number, Field(ge=0.0, le=1.0)] = 0.0
    importance_high: Annotated[Number, Field(ge=1.0)] = 2.0
    critic_head: Literal["reward_model", "zero"] = "reward_model"
    """Initial value head: that of the model which the critic starts from, or zeros."""
    eval_every: Count = 20
    """Updates between held-out evaluations."""
    save_every: Count = 20
    """Updates between saves of the whole training state."""
    max_skipped_steps: Annotated[Integer, Field(ge=0)] = 3
    """Optimiser steps of the run that may be skipped for a loss or gradient that is not finite, before it stops."""
    force: bool = False
    """Starts although the reward model does not pass the gate: accuracy, normalisation, chat template."""

    @model_validator(mode="after")
    def _minibatches_divide(self) -> PpoSection:
        if self.rollout_batch_size % self.num_minibatches:
            raise ValueError(
                f"rollout_batch_size ({self.rollout_batch_size}) is not a multiple of "
                f"num_minibatches ({self.num_minibatches}); make it one, so that every optimiser step "
                "sees the same number of sequences"
            )
        return self

    @model_validator(mode="after")
    def _policy_is_trained(self) -> PpoSection:
        if self.critic_warmup_updates >= self.updates:
            raise ValueError(
                f"critic_warmup_updates ({self.critic_warmup_updates}) leaves none of the {self.updates} updates for "
                "the policy; lower it"
            )
        return self

    @property
    def with_trained_model(self) -> bool:
        """Whether the RM stage's model is a source of the score."""
        return any(source.model == TRAINED for source in self.rewards.values())

    @model_validator(mode="after")
    def _reads_the_reward_model(self) -> PpoSection:
        if self.reward_model is not None and not self.with_trained_model:
            raise ValueError(f"`reward_model` is set, but no entry of `rewards` is `model: {TRAINED}`")
        return self


class RolloutSection(Section):
    """How responses are sampled."""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """`auto` is vLLM, or transformers with a notice where vLLM cannot be imported."""
    temperature: Positive = 1.0
    """Sampling temperature; every log-probability of the pipeline is taken at it."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a response, beside the EOS; the response keeps the first one that it contains."""
    kv_cache_gib: Positive = 0.25
    """vLLM's key-value cache on a CPU, in GiB."""
    gpu_memory_utilization: Fraction = 0.3
    """Share of the GPU's memory that vLLM may use beside the trainer."""
    logprob_tolerance: Positive = 1e-4
    """Largest gap between the engine's and the trainer's log-probabilities in float32 before the run stops."""


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
