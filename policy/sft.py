"""STAGE sft: supervised fine-tuning with trl's SFTTrainer on rows that the project tokenises
itself.

The trainer receives `input_ids` and `labels`. It would ignore a `completion_mask` column unless
told otherwise, and would cut rows at 1,024 tokens, EOS first; with labels and no `max_length` it
does neither. Dropout stays as the model's configuration has it. Weights are trained in float32,
under bfloat16 autocast where `model.dtype` says bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoints import final_evaluation
from pipeline.counts import models_in_memory, training_counts
from pipeline.data import Split
from pipeline.errors import UserError
from pipeline.evaluation.policy_eval import sample_seed
from pipeline.preferences import load_demonstrations
from pipeline.recipe import DataSection, Recipe
from pipeline.records import Prompt, SftExample
from pipeline.stage import Stage
from pipeline.stage_main import stage_main
from pipeline.tokens import EncodedExample, Encoder, encode_prompts, encode_sft, load_tokenizer
from pipeline.trainer_log import trainer_callback
from pipeline.trainer_ranks import check_arguments, is_sharded_run, place, precision, train_on
from pipeline.trl_args import build_trainer_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl.trainer.sft_config import SFTConfig

    from policy.sft_trainer import TokenMeanTrainer

IGNORED = -100
"""Label of a token that carries no loss."""
OPENING_WORDS = 4
"""Words of a held-out plain text that its shown generation continues."""


def run(stage: Stage) -> dict[str, Any]:
    """Train on `data.sft`, save the model into `stage.out` and return the final metrics."""
    from policy.models import load_policy, save_policy

    recipe, sharded = stage.recipe, is_sharded_run(stage)
    source = stage.inputs["model"].path
    tokenizer = load_tokenizer(source, recipe.model)
    stage.record_tokenizer(tokenizer)
    encoder = Encoder(tokenizer, recipe.data.max_prompt_tokens, recipe.data.max_response_tokens)
    split = load_demonstrations(recipe.data)
    train, held_out = _encode(stage, split, encoder)
    arguments = sft_arguments(recipe, stage.state, max(map(len, _ids(train))), sharded=sharded)
    check_arguments(arguments, stage)
    model = place(stage, lambda device: load_policy(source, "float32", device), sharded=sharded)
    trainer = make_trainer(model, tokenizer, arguments, (train, held_out), [trainer_callback(stage, "sft")])
    result = train_on(trainer, stage, sharded=sharded)
    loss = validation_loss(trainer)
    save_policy(model, tokenizer, stage.out, recipe.model.dtype, ranks=stage.ranks)
    metrics = {
        "validation_loss": loss,
        "validation_perplexity": math.exp(loss),
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        **training_counts(trainer),
    }
    stage.record(models_in_memory=models_in_memory(["policy"]))
    stage.say(f"validation loss {loss:.4f} nats/token (perplexity {math.exp(loss):.1f})")
    prompts = shown_prompts(split.eval, recipe.eval.shown_samples)
    _show_generations(stage, trainer.state.global_step, prompts, encoder)
    return metrics


def sft_rows(examples: Sequence[EncodedExample]) -> dict[str, list[list[int]]]:
    """Return the columns `input_ids` and `labels`; labels are -100 before the response.

    The EOS is part of the response. A plain text carries loss on every token but its BOS.
    """
    return {
        "input_ids": _ids(examples),
        "labels": [[IGNORED] * example.response_start + example.ids[example.response_start :] for example in examples],
    }


def sft_arguments(recipe: Recipe, state: Path, longest_row: int, *, sharded: bool = False) -> SFTConfig:
    """Build the SFTConfig: the user's `sft.trainer` over our defaults, under what the stage fixes.

    Defaults: bfloat16 autocast only for `model.dtype: bfloat16`, gradient checkpointing only on
    CUDA, an evaluation and a checkpoint every fifth of the run. Raises UserError for a setting that
    does not exist, is fixed, or packs into rows shorter than the longest example.
    """
    import torch
    from trl.trainer.sft_config import SFTConfig

    cuda = torch.cuda.is_available()
    fixed: dict[str, Any] = {
        "output_dir": str(state),
        "report_to": [],
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "completion_only_loss": None,
        "assistant_only_loss": False,
        "packing_strategy": "bfd",
        "padding_free": False,
        "dataset_kwargs": None,
        "remove_unused_columns": True,
        "eos_token": None,
        "pad_token": None,
        "chat_template_path": None,
        "model_init_kwargs": None,
        "push_to_hub": False,
        "disable_tqdm": True,
    }
    settings = recipe.sft.trainer
    if settings.get("packing"):
        _check_packed_length(settings, longest_row)
    else:
        fixed["max_length"] = None
    return build_trainer_arguments(
        SFTConfig,
        settings,
        section="sft",
        fixed=fixed,
        **precision(recipe.model.dtype, sharded=sharded),
        gradient_checkpointing=cuda,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda,
        eval_packing=False,
        eval_strategy="steps",
        eval_steps=0.2,
        save_strategy="steps",
        save_steps=0.2,
        save_total_limit=2,
        logging_steps=0.02,
    )


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: SFTConfig,
    examples: tuple[Sequence[EncodedExample], Sequence[EncodedExample]],
    callbacks: Sequence[TrainerCallback] = (),
) -> TokenMeanTrainer:
    """Build the trainer over (train, held-out) examples.

    Loss of a step: -sum over supervised tokens of log p / their number, over all sequences of the
    step and its gradient accumulation.
    """
    from datasets import Dataset
    from transformers import PrinterCallback

    from policy.sft_trainer import TokenMeanTrainer

    train, held_out = (Dataset.from_dict(sft_rows(part)) for part in examples)
    trainer = TokenMeanTrainer(
        model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def validation_loss(trainer: TokenMeanTrainer) -> float:
    """Return -sum log p / n over all n supervised held-out tokens of the trained model, in nats."""
    return final_evaluation(trainer)["eval_loss"]


def shown_prompts(held_out: Sequence[SftExample], count: int) -> list[Prompt]:
    """Return the first `count` different held-out prompts; of plain texts, their first words."""
    prompts = [
        example.prompt
        if example.prompt is not None
        else Prompt(" ".join(example.response.split()[:OPENING_WORDS]), example.source)
        for example in held_out
    ]
    return list(dict.fromkeys(prompts))[:count]


def _encode(
    stage: Stage, split: Split[SftExample], encoder: Encoder
) -> tuple[list[EncodedExample], list[EncodedExample]]:
    for line in split.lines():
        stage.say(line)
    data: DataSection = stage.recipe.data
    encoded, reports = {}, {}
    for name, examples in (("train", split.train), ("eval", split.eval)):
        encoded[name], report = encode_sft(examples, encoder, data)
        reports[name] = report.as_dict()
        for line in report.lines():
            stage.say(f"{name}: {line}")
        if not encoded[name]:
            raise UserError(
                f"data.sft: data.long_prompts: {data.long_prompts} leaves no {name} example.",
                mend="Raise data.max_prompt_tokens.",
            )
    stage.record(data={"sft": split.report}, lengths=reports)
    return encoded["train"], encoded["eval"]


def _check_packed_length(settings: Mapping[str, Any], longest_row: int) -> None:
    length = settings.get("max_length")
    if not isinstance(length, int) or length < longest_row:
        raise UserError(
            "sft.trainer.packing needs sft.trainer.max_length, the length of a packed row. The "
            f"longest example has {longest_row} tokens and max_length is {length}: examples over it "
            "would lose their end and their EOS.",
            mend=f"Set sft.trainer.max_length to at least {longest_row}.",
        )


def _show_generations(stage: Stage, step: int, prompts: Sequence[Prompt], encoder: Encoder) -> None:
    """Sample one response per prompt with the transformers engine, which starts at once."""
    from rollout.engine import SamplingOptions
    from rollout.open import open_engine

    recipe, data = stage.recipe, stage.recipe.data
    encoded, _ = encode_prompts(prompts, encoder, data)
    engine = open_engine(recipe, stage.out, stage.say, kind="transformers", ranks=stage.ranks)
    completions = engine.generate(
        [item.ids for item in encoded],
        SamplingOptions(data.max_response_tokens, recipe.rollout.temperature),
        seeds=[sample_seed(recipe.seed, index, 0) for index in range(len(encoded))],
    )
    engine.close()
    rows = [
        {
            "prompt": encoder.prompt_text(item.prompt),
            "response": encoder.decode(completion.token_ids),
            "finished": completion.finished,
            "tokens": len(completion.token_ids),
        }
        for item, completion in zip(encoded, completions, strict=True)
    ]
    stage.tracker.samples(step, rows)
    for row in rows:
        stage.say(f"  {row['prompt']} >{row['response']}")


def _ids(examples: Sequence[EncodedExample]) -> list[list[int]]:
    return [example.ids for example in examples]


if __name__ == "__main__":
    stage_main("sft", run=run)
