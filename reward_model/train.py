"""Stage `rm`: a reward model trained on ranked answers, evaluated on held-out ones, normalised on SFT samples.

`python -m reward_model.train runs/<name>/rm.partial`
"""

from __future__ import annotations

import gc
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.adapters import add_adapter, save_merged
from pipeline.artifacts import Artifact
from pipeline.counts import models_in_memory, training_counts
from pipeline.data import load_rankings
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.stage import Stage
from pipeline.stage_main import stage_main
from pipeline.tokens import EncodedRanking, Encoder, encode_rankings, load_tokenizer, tokenizer_sha256
from pipeline.trainer_log import trainer_callback
from pipeline.trainer_ranks import (
    check_arguments,
    gathered,
    is_sharded_run,
    leave_if_told,
    place,
    precision,
    refuse_sharded_adapter,
    train_on,
)
from pipeline.trl_args import build_trainer_arguments
from reward_model.data import ModelLimits, RankingCollator, check_rankings, ranking_dataset, with_ordered_pair
from reward_model.evaluate import pairs_of
from reward_model.report import DTYPES, RankingData, measure
from reward_model.score import backbone_and_head, disable_dropout, load_reward_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl.trainer.reward_config import RewardConfig

    from reward_model.trainer import RankingTrainer

ADAPTER = "reward"
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 0.2,
    "logging_steps": 10,
    "disable_tqdm": True,
}
"""Settings of `rm.trainer` that differ from trl.RewardConfig's own; a recipe may change them."""

UNUSED = {
    "max_length": None,
    "center_rewards_coefficient": None,
    "model_init_kwargs": None,
    "chat_template_path": None,
    "eos_token": None,
    "pad_token": None,
    "pad_to_multiple_of": None,
    "dataset_num_proc": None,
    "label_smoothing_factor": 0.0,
    "activation_offloading": False,
}
"""Settings of trl.RewardConfig whose part another recipe key plays, or which do nothing here: they are refused."""


def run(stage: Stage) -> dict[str, Any]:
    """Train, save, evaluate and normalise the reward model; returns the metrics of the manifest."""
    tokenizer = load_tokenizer(stage.inputs["policy"].path, stage.recipe.model)
    refuse_other_tokenizer(stage.inputs["policy"], tokenizer)
    stage.record_tokenizer(tokenizer)
    data = prepare_rankings(stage, tokenizer)
    trained = train(stage, tokenizer, data)
    gc.collect()  # the optimiser's memory, before the engine asks for its own
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    leave_if_told(stage, trained["steps"])
    return {**trained, **measure(stage, data, trained["steps"])}


def refuse_other_tokenizer(policy: Artifact, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError when the tokenizer is not the one that the policy was trained with."""
    expected = policy.manifest.get("tokenizer_sha256")
    if expected is not None and expected != tokenizer_sha256(tokenizer):
        raise UserError(
            f"{policy.path}: the tokenizer under the recipe's `model` section is not the one in this artifact's "
            "manifest, so prompts and answers would be encoded differently from SFT.",
            mend="Restore model.pad_token and the tokenizer files, or run the SFT stage again with --overwrite.",
        )


def prepare_rankings(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> RankingData:
    """Load and encode `data.preferences`; rankings whose answers are all tied are dropped and counted.

    Raises UserError when no ordered pair is left on either side, or `rm.margin` is set and cannot be used.
    """
    section = stage.recipe.data
    if stage.recipe.rm.margin and stage.recipe.rm.loss != "ranking":
        raise UserError(
            f"rm.margin has no place in rm.loss: {stage.recipe.rm.loss}.",
            mend="Set rm.margin: 0 or rm.loss: ranking.",
        )
    split = load_rankings(section)
    encoder = Encoder(tokenizer, section.max_prompt_tokens, section.max_response_tokens)
    usable: dict[str, list[EncodedRanking]] = {}
    lengths, dropped = {}, {}
    for name, rankings in (("train", split.train), ("eval", split.eval)):
        encoded, report = encode_rankings(rankings, encoder, section)
        usable[name] = with_ordered_pair(encoded)
        lengths[name] = report.as_dict()
        dropped[name] = len(encoded) - len(usable[name])
        for line in report.lines():
            stage.say(f"{name} {line}")
        if not usable[name]:
            raise UserError(
                f"data.preferences: none of the {len(rankings)} {name} rankings has two answers of different rank.",
                mend="Give rankings with different ranks, or check the column that holds the preference.",
            )
    for line in split.lines():
        stage.say(line)
    if any(dropped.values()):
        stage.say(f"all answers tied, not used: {dropped['train']} train, {dropped['eval']} eval rankings")
    if stage.recipe.rm.margin and any(r.ratings is None for side in usable.values() for r in side):
        raise UserError(
            "rm.margin needs a rating for every answer, and some rankings of data.preferences have none.",
            mend="Add a `margin` or `scores` column, or set rm.margin: 0.",
        )
    stage.record(data=split.report, lengths=lengths, all_tied=dropped)
    return RankingData(usable["train"], usable["eval"], encoder)


def train(stage: Stage, tokenizer: PreTrainedTokenizerBase, data: RankingData) -> dict[str, Any]:
    """Train from the newest complete checkpoint and save model and tokenizer into `stage.out`.

    Returns the training metrics.
    """
    sharded = is_sharded_run(stage)
    refuse_sharded_adapter(stage, stage.recipe.rm.lora, sharded=sharded)
    arguments = rm_arguments(stage.recipe, stage.state, sharded=sharded)
    check_arguments(arguments, stage)
    model = place(stage, partial(initial_reward_model, stage, tokenizer), sharded=sharded)
    limits = ModelLimits(
        vocabulary=model.config.get_text_config().vocab_size,
        positions=model.config.get_text_config().to_dict().get("max_position_embeddings"),
        pad_token_id=model.config.get_text_config().pad_token_id,
    )
    check_rankings([*data.train, *data.held_out], limits)
    trainer = make_trainer(stage, model, tokenizer, arguments, data)
    output = train_on(trainer, stage, sharded=sharded)
    save(stage, model, tokenizer)
    stage.record(
        models_in_memory=models_in_memory(["base", "reward adapter"] if stage.recipe.rm.lora else ["reward model"])
    )
    return {"steps": output.global_step, "train_loss": output.training_loss, **training_counts(trainer)}


def save(stage: Stage, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the reward model as a plain one in the recipe's dtype, by the first rank; an adapter also by itself."""
    weights = gathered(model, stage.ranks)
    if stage.ranks.is_main:
        if stage.recipe.rm.lora:
            stage.record(adapter=save_merged(model, ADAPTER, stage.out, base=stage.inputs["policy"].path))
        else:
            model.save_pretrained(stage.out, state_dict=weights)
        tokenizer.save_pretrained(stage.out)
        if stage.recipe.model.dtype != "float32":
            load_reward_model(stage.out, DTYPES[stage.recipe.model.dtype], "cpu").save_pretrained(stage.out)
    stage.ranks.barrier()


def initial_reward_model(
    stage: Stage, tokenizer: PreTrainedTokenizerBase, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The policy's body in float32 with a fresh head, no dropout and the tokenizer's padding token.

    Raises UserError when the checkpoint is no causal language model that transformers can also classify with.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    path = stage.inputs["policy"].path
    try:
        architectures = AutoConfig.from_pretrained(path).architectures or []
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: no sequence classifier can be made from this checkpoint ({reason}).",
            mend="Set rm.init_from to a causal language model of an architecture with a sequence classifier.",
        ) from error
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        raise UserError(
            f"{path} is a sequence classifier; the rm stage starts from a language model, whose samples also fix the "
            "normalisation.",
            mend="Set rm.init_from to the SFT policy, or use this model as ppo.reward_model.",
        )
    fresh_head(model, stage.recipe.seed)
    disable_dropout(model)
    if stage.recipe.rm.lora:
        add_adapter(model, ADAPTER, stage.recipe.model.lora, seed=stage.recipe.seed)
        backbone_and_head(model)[1].requires_grad_(True)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        stage.say(f"rm.lora: {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters are trained")
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    torch.nn.Module.to(model, device)
    return model


def fresh_head(model: PreTrainedModel, seed: int) -> None:
    """Draw the head's weights from N(0, 1/sqrt(d+1)), d the hidden size; a bias becomes zero.

    The head of transformers' causal classifiers has no bias. Source: vwxyzjn/summarize_from_feedback_details and
    openai/lm-human-preferences (standard deviation 1/sqrt(d+1)).
    """
    _, head = backbone_and_head(model)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()


def rm_arguments(recipe: Recipe, state: Path, *, sharded: bool = False) -> RewardConfig:
    """Build the RewardConfig: the user's `rm.trainer` over our defaults, under what the stage fixes.

    Raises UserError for a setting that does not exist, has a wrong value, or is fixed.
    """
    from trl.trainer.reward_config import RewardConfig

    cuda = torch.cuda.is_available()
    return build_trainer_arguments(
        RewardConfig,
        recipe.rm.trainer,
        section="rm",
        fixed={
            **UNUSED,
            "output_dir": str(state),
            "seed": recipe.seed,
            "report_to": [],
            "remove_unused_columns": False,
            "disable_dropout": True,
            "dataloader_num_workers": 0,
        },
        **DEFAULTS,
        **precision(recipe.model.dtype, sharded=sharded),
        gradient_checkpointing=cuda,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda,
    )


def make_trainer(
    stage: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: RewardConfig,
    data: RankingData,
) -> RankingTrainer:
    """The trainer over the encoded rankings, with the loss of the recipe's `rm` section."""
    from transformers import PrinterCallback

    from reward_model.trainer import Objective, RankingTrainer

    section = stage.recipe.rm
    collator = RankingCollator(model.config.get_text_config().pad_token_id, with_ratings=section.margin > 0)
    trainer = RankingTrainer(
        objective=Objective(section.loss, section.margin, section.centering),
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=ranking_dataset(data.train),
        eval_dataset=ranking_dataset(data.held_out),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(trainer_callback(stage, "rm"))
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    pairs = len(pairs_of(data.train, [[0.0] * len(r.ranks) for r in data.train]).margin)
    answers = sum(len(ranking.ranks) for ranking in data.train)
    stage.say(
        f"rm: {len(data.train)} rankings ({answers} answers, {pairs} ordered pairs), "
        f"{per_step} rankings per optimiser step, {arguments.num_train_epochs:g} epochs"
    )
    return trainer


if __name__ == "__main__":
    stage_main("rm", run=run)
