"""STAGES dpo, ipo, kto, simpo, orpo, ift and contrast: a policy from preferences, without reward model or rollouts.

`python -m policy.preference runs/<name>/<method>.partial`

Weights are trained in float32, under bfloat16 autocast where `model.dtype` says bfloat16, without dropout. The
reference's log-probabilities are computed once, before training, and kept beside the run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.adapters import add_adapter
from pipeline.artifacts import identity, read_manifest
from pipeline.checkpoints import final_evaluation
from pipeline.counts import models_in_memory, training_counts
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.recipe_direct import DirectSection
from pipeline.sharding import through
from pipeline.stage import Stage
from pipeline.stage_main import stage_main
from pipeline.tokens import PROMPT_SLOT, Encoder, load_tokenizer, set_prompt_form
from pipeline.trainer_log import trainer_callback
from pipeline.trainer_ranks import (
    check_arguments,
    is_sharded_run,
    leave_if_told,
    place,
    place_frozen,
    precision,
    refuse_sharded_adapter,
    train_on,
)
from pipeline.trl_args import build_trainer_arguments
from policy.answers import can_share_prompts
from policy.losses import METHODS
from policy.models import POLICY, check_projection, disable_dropout, load_policy, save_policy
from policy.objectives import make_objective
from policy.preference_data import Row, RowCollator, Rows, cached_sums, reference_sums, with_reference
from policy.preference_eval import Asked, Judged, ShowSamples, asked, evaluate
from policy.preference_rows import MethodData, contrast_template, load_rows
from rollout.engine import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

    from policy.preference_trainer import PreferenceTrainer

CACHE = "ref_logprobs"
"""Folder of the run that keeps the reference's log-probabilities for every method."""
LEARNING_RATES = {"dpo": 1e-6, "ipo": 1e-6, "kto": 1e-6, "simpo": 1e-6, "orpo": 5e-6, "ift": 5e-7, "contrast": 2e-5}
"""trl's for dpo and kto; SimPO's repository; ORPO's and IFT's scripts; trl's SFTConfig for contrast."""
SAID = {
    "loss": "loss",
    "reward accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "log p of chosen": "logps/chosen",
    "of rejected": "logps/rejected",
    "of answers": "logps",
}
"""The held-out figures that are printed, by title; the manifest has them all."""
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "steps",
    "save_steps": 0.2,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 0.2,
    "logging_steps": 0.02,
    "disable_tqdm": True,
}
"""Settings of `<method>.trainer` that differ from transformers' own; a recipe may change them."""


@dataclass(frozen=True)
class Direct:
    """A direct method in progress.

    Attributes:
        start, own: the policy's start and the trained policy with their prompts, which differ under contrast SFT.
        shared: answers of one prompt share its row.
        sharded: models lie in parts on the ranks.
    """

    stage: Stage
    section: DirectSection
    model: PreTrainedModel
    data: MethodData
    start: Asked
    own: Asked
    shared: bool
    sharded: bool = False

    @property
    def name(self) -> str:
        """The method."""
        return self.stage.name

    @property
    def judged(self) -> Judged:
        """What the policy's evaluations share."""
        return Judged(self.stage, self.start, self.own, adapted=self.section.lora, sharded=self.sharded)

    @property
    def autocast(self) -> Callable[[], AbstractContextManager[Any]]:
        """The precision of forwards outside the Trainer."""
        bf16 = precision(self.stage.recipe.model.dtype, sharded=self.sharded)["bf16"]
        return partial(torch.autocast, self.model.device.type, torch.bfloat16) if bf16 else nullcontext


def run(stage: Stage) -> dict[str, Any]:
    """Trains the policy, writes it and compares it with its start; returns the final metrics."""
    direct = set_up(stage)
    trained = train(direct, with_reference_sums(direct))
    gc.collect()  # the optimiser's memory, before the engine asks for its own
    save(direct)
    leave_if_told(stage, trained["steps"])
    return {**trained, **evaluate(direct.judged, trained["steps"], direct.model)}


def set_up(stage: Stage) -> Direct:
    """Data, policy and what can be shared; all refusals come before a step is taken."""
    recipe = stage.recipe
    section, sharded = sections(recipe)[stage.name], is_sharded_run(stage)
    refuse_sharded_adapter(stage, section.lora, sharded=sharded)
    tokenizer = load_tokenizer(stage.inputs["policy"].path, recipe.model)
    stage.record_tokenizer(tokenizer)
    encoder = Encoder(tokenizer, recipe.data.max_prompt_tokens, recipe.data.max_response_tokens)
    refuse_foreign_reference(stage)
    data, start = load_rows(stage, encoder), asked(stage, encoder)
    own = start if stage.name != "contrast" else asked_in_form(stage, encoder, start)
    model = place(stage, partial(load_start, stage, section), sharded=sharded)
    refuse_long_rows(stage.name, [*data.train, *data.held_out], context_length(model.config.get_text_config()))
    method = METHODS[stage.name]
    read = "means" if method.averaged else "sums"
    against = ", against a frozen reference" if method.needs_reference else ""
    stage.say(f"{stage.name}: the loss reads {read} of log-probabilities over tokens{against}")
    several = any(len(row.group.answer_ids) > 1 for row in data.train)
    shared = stage.ranks.broadcast(several and through(model, model, partial(can_share_prompts, model.eval())))
    if several:
        stage.say(
            f"{stage.name}: answers of one prompt share its row"
            if shared
            else f"{stage.name}: {type(model).__name__} reads every answer in a row of its own"
        )
    return Direct(stage, section, model, data, start, own, shared, sharded)


def load_start(stage: Stage, section: DirectSection, device: torch.device) -> PreTrainedModel:
    """The policy's start as it is trained: in float32, without dropout, with an adapter under `lora`."""
    source = stage.inputs["policy"].path
    model = load_policy(source, "float32", device)
    check_projection(model, source)
    disable_dropout(model)
    if section.lora:
        add_adapter(model, POLICY, stage.recipe.model.lora, seed=stage.recipe.seed)
    return model


def refuse_long_rows(name: str, rows: Sequence[Row], positions: int | None) -> None:
    """Raises UserError for a prompt and answer that the model has no positions for."""
    groups = [group for row in rows for group in row.groups]
    longest = max(len(group.prompt_ids) + max(map(len, group.answer_ids)) for group in groups)
    if positions is not None and longest > positions:
        raise UserError(
            f"{name}: the longest prompt and answer take {longest} tokens, and the model reads {positions} "
            "(max_position_embeddings).",
            mend="Lower data.max_prompt_tokens or data.max_response_tokens, or use a model with a longer context.",
        )


def asked_in_form(stage: Stage, encoder: Encoder, start: Asked) -> Asked:
    """The held-out prompts in the inference form of contrast SFT, which the tokenizer keeps from now on."""
    section, data = stage.recipe.contrast, stage.recipe.data
    form = contrast_template(section).inference_prompt(section.instruction, PROMPT_SLOT)
    set_prompt_form(encoder.tokenizer, form)
    own = asked(stage, Encoder(encoder.tokenizer, data.max_prompt_tokens, data.max_response_tokens))
    if [prompt.prompt for prompt in own.prompts] != [prompt.prompt for prompt in start.prompts]:
        raise UserError(
            "contrast.template: in its inference form a held-out prompt is longer than data.max_prompt_tokens "
            f"({data.max_prompt_tokens}).",
            mend="Raise data.max_prompt_tokens, or shorten the template.",
        )
    return own


def sections(recipe: Recipe) -> dict[str, DirectSection]:
    """Each method's section of the recipe."""
    return {
        "dpo": recipe.dpo,
        "ipo": recipe.ipo,
        "kto": recipe.kto,
        "simpo": recipe.simpo,
        "orpo": recipe.orpo,
        "ift": recipe.ift,
        "contrast": recipe.contrast,
    }


def refuse_foreign_reference(stage: Stage) -> None:
    """Raises UserError for a reference that the policy does not come from: the KL to it would mean nothing."""
    if "reference" not in stage.inputs:
        return
    wanted = identity(stage.inputs["reference"].path)
    policy = Path(stage.inputs["policy"].path)
    seen = [identity(policy)]
    while (policy / "manifest.json").exists():
        inputs = read_manifest(policy)["inputs"]
        entry = inputs.get("policy") or inputs.get("model")
        if entry is None:
            break
        policy = (policy / entry["path"]).resolve() if not Path(entry["path"]).is_absolute() else Path(entry["path"])
        seen.append(identity(policy))
    if wanted not in seen:
        raise UserError(
            f"{stage.name}.reference: {stage.inputs['reference'].path} is neither the policy's start "
            f"({stage.inputs['policy'].path}) nor one of its ancestors.",
            mend="Leave the key out, or name a checkpoint that the policy was trained from.",
        )


def with_reference_sums(direct: Direct) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, with the reference's log-probabilities where the method compares with one."""
    train, held_out = direct.data.train, direct.data.held_out
    if not METHODS[direct.name].needs_reference:
        return train, held_out
    stage, dtype = direct.stage, direct.stage.recipe.model.dtype
    source = stage.inputs["reference" if "reference" in stage.inputs else "policy"].path
    pad = direct.start.encoder.pad_token_id
    rows = [*train, *held_out]

    def compute() -> list[float]:
        same = source == stage.inputs["policy"].path
        load = partial(load_policy, source, "float32")
        model = direct.model if same else place_frozen(stage, load, sharded=direct.sharded, dtype=dtype)
        return reference_sums(
            rows, model.eval(), pad, shared=direct.shared, autocast=direct.autocast, ranks=stage.ranks
        )

    key = [identity(source), dtype, *(["sharded"] if direct.sharded else [])]
    sums, found = cached_sums(stage.out.parent / CACHE, key, rows, compute, stage.ranks)
    stage.say(f"reference log-probabilities of {len(sums)} answers: {'read from the cache' if found else 'computed'}")
    done = with_reference(rows, sums)
    return done[: len(train)], done[len(train) :]


def train(direct: Direct, rows: tuple[Sequence[Row], Sequence[Row]]) -> dict[str, Any]:
    """Trains from the newest complete checkpoint; returns steps, training loss and the last held-out figures."""
    stage = direct.stage
    shown = ShowSamples(direct.judged)
    arguments = training_arguments(stage, sharded=direct.sharded)
    check_arguments(arguments, stage)
    trainer = make_trainer(direct, arguments, rows, [shown, trainer_callback(stage, direct.name)])
    with closing(shown):
        output = train_on(trainer, stage, sharded=direct.sharded)
        figures = held_out_figures(trainer)
    said = {title: figures.get(f"eval/{key}") for title, key in SAID.items()}
    stage.say("held out: " + ", ".join(f"{title} {v:.4g}" for title, v in said.items() if v is not None))
    stage.record(models_in_memory=_models(direct))
    return {
        "steps": output.global_step,
        "train_loss": output.training_loss,
        **training_counts(trainer),
        **figures,
    }


def _models(direct: Direct) -> dict[str, list[str]]:
    """The reference is the start's weights: loaded beside the policy for the KL to it, unless an adapter is trained."""
    training = ["base", "policy adapter"] if direct.section.lora else ["policy"]
    beside = not direct.section.lora or "reference" in direct.stage.inputs
    return models_in_memory(training, peak=[*training, "reference"] if beside else ())


def held_out_figures(trainer: PreferenceTrainer) -> dict[str, float]:
    """Loss and metrics of the trained model on the held-out rows."""
    timed = ("runtime", "per_second", "preparation_time")
    return {
        f"eval/{k[5:]}": v
        for k, v in final_evaluation(trainer).items()
        if k.startswith("eval_") and not k.endswith(timed)
    }


def training_arguments(stage: Stage, *, sharded: bool = False) -> TrainingArguments:
    """TrainingArguments: the user's `<method>.trainer` over our defaults, under what the stage fixes.

    Raises UserError for a setting that does not exist, has a wrong value, or is fixed.
    """
    from transformers import TrainingArguments

    cuda = torch.cuda.is_available()
    section = sections(stage.recipe)[stage.name]
    return build_trainer_arguments(
        TrainingArguments,
        section.trainer,
        section=stage.name,
        fixed={
            "output_dir": str(stage.state),
            "seed": stage.recipe.seed,
            "report_to": [],
            "remove_unused_columns": False,
            "label_smoothing_factor": 0.0,
            "dataloader_num_workers": 0,
            "push_to_hub": False,
        },
        **DEFAULTS,
        learning_rate=LEARNING_RATES[stage.name],
        **precision(stage.recipe.model.dtype, sharded=sharded),
        gradient_checkpointing=cuda,
        ddp_find_unused_parameters=stage.name == "ift",  # the embeddings get no gradient, unless they are the head too
        dataloader_pin_memory=cuda,
    )


def make_trainer(
    direct: Direct,
    arguments: TrainingArguments,
    rows: tuple[Sequence[Row], Sequence[Row]],
    callbacks: Sequence[TrainerCallback],
) -> PreferenceTrainer:
    """The trainer of the method over encoded rows."""
    from transformers import PrinterCallback

    from policy.preference_trainer import PreferenceTrainer

    stage, recipe = direct.stage, direct.stage.recipe
    labels = [row.desirable for row in rows[0]]
    counts = sum(labels), len(labels) - sum(labels)
    trainer = PreferenceTrainer(
        objective=make_objective(direct.name, recipe, shared=direct.shared, labels=counts),
        in_order=direct.name == "contrast" and recipe.contrast.curriculum,
        model=direct.model,
        args=arguments,
        data_collator=RowCollator(direct.start.encoder.pad_token_id, direct.shared),
        train_dataset=Rows(rows[0]),
        eval_dataset=Rows(rows[1]),
        processing_class=direct.own.encoder.tokenizer,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if direct.name == "kto":
        refuse_one_sided_steps(*counts, per_step)
    stage.say(
        f"{direct.name}: {direct.data.size}; {per_step} rows per optimiser step, {arguments.num_train_epochs:g} epochs"
    )
    return trainer


def refuse_one_sided_steps(desirable: int, undesirable: int, per_step: int) -> None:
    """Raises UserError where more than half of KTO's steps would hold one label: each pulls one way only."""
    share = desirable / (desirable + undesirable)
    one_sided = share**per_step + (1 - share) ** per_step
    if one_sided > 0.5:
        raise UserError(
            f"kto: with {per_step} rows per optimiser step, and {share:.1%} of the answers desirable, "
            f"{one_sided:.0%} of the steps would hold one label only.",
            mend="Raise kto.trainer.per_device_train_batch_size or gradient_accumulation_steps, or add answers with "
            "the rarer label.",
        )


def save(direct: Direct) -> None:
    """Writes the policy as a plain model; an adapter also by itself."""
    stage, model, tokenizer = direct.stage, direct.model, direct.own.encoder.tokenizer
    adapter_over = stage.inputs["policy"].path if direct.section.lora else None
    save_policy(model, tokenizer, stage.out, stage.recipe.model.dtype, adapter_over=adapter_over, ranks=stage.ranks)


if __name__ == "__main__":
    stage_main(*METHODS, run=run)
