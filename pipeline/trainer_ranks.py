"""A library's Trainer on several ranks: whole models under DDP or sharded ones, and where a saved run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import IntervalStrategy

from pipeline.checkpoints import SEAL, newest_complete_checkpoint
from pipeline.errors import UserError
from pipeline.ranks import Ranks
from pipeline.sharding import is_sharded, load_in_turn, wanted, whole
from pipeline.stage import Preempted, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments
    from transformers.trainer_utils import TrainOutput

ROLE = "trained"
SHARDED_WEIGHTS = "pytorch_model_fsdp*"
"""What a checkpoint of a sharded model holds. Source: accelerate/utils/constants.py, FSDP_MODEL_NAME."""
Load = Callable[[torch.device], "PreTrainedModel"]


def is_sharded_run(stage: Stage) -> bool:
    """Whether the stage's models lie in parts on the ranks, as accelerate's file asks; prepares the libraries for it.

    Errors:
        UserError: DeepSpeed, FSDP 1, or a setting of FSDP that the stages do not have.
    """
    environment = os.environ
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "launch.accelerate: the file asks for DeepSpeed, and the stages shard with torch's FSDP2 only.",
            mend="Use configs/accelerate/fsdp2.yaml.",
        )
    # Whatever the file says, every rank reads true weights: engines and reward models are loaded whole. The trained
    # model is read in turn instead.
    environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    environment["ACCELERATE_MIXED_PRECISION"] = "no"  # the recipe's model.dtype decides, see `precision`
    if not wanted(ROLE, (ROLE,), stage.ranks):
        environment["ACCELERATE_USE_FSDP"] = "false"
        return False
    environment["FSDP_AUTO_WRAP_POLICY"] = "NO_WRAP"  # models come sharded (`place`)
    if not torch.cuda.is_available():
        allow_sharding_on_cpu()
    return True


def allow_sharding_on_cpu() -> None:
    """Lets accelerate shard a Trainer's model on a machine without a GPU, for tests and trials.

    accelerate 1.15 reads its FSDP settings for GPUs only (`accelerate/state.py`, AcceleratorState), so that processes
    on the CPU would train whole copies without a word. Told that they are GPUs' that speak gloo, it does what it would
    do there; nothing of FSDP2 itself needs a GPU. The Trainer's `use_cpu` must be off.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = prepare_backend  # pyright: ignore[reportAttributeAccessIssue]


def precision(dtype: str, *, sharded: bool) -> dict[str, bool]:
    """`use_cpu` and `bf16` of TrainingArguments; sharded layers are gathered in the dtype, without autocast."""
    return {"use_cpu": not torch.cuda.is_available() and not sharded, "bf16": dtype == "bfloat16" and not sharded}


def check_arguments(arguments: TrainingArguments, stage: Stage) -> None:
    """Refuses a Trainer that would not train on the stage's ranks.

    Errors:
        UserError: one process that sees several GPUs, which the Trainer would spread it over; or the Trainer counts
            other processes than the stage.
    """
    if arguments.n_gpu > 1:
        raise UserError(
            f"{stage.name}: one process sees {arguments.n_gpu} GPUs.",
            mend=f"Set launch.processes: {arguments.n_gpu}, or CUDA_VISIBLE_DEVICES=0 for one of them.",
        )
    if arguments.world_size != stage.ranks.world:
        raise UserError(
            f"{stage.name}: {stage.ranks.world} processes run the stage, and its trainer sees {arguments.world_size}.",
            mend="Remove ACCELERATE_USE_CPU and ACCELERATE_TORCH_DEVICE from the environment.",
        )


def refuse_sharded_adapter(stage: Stage, lora: bool, *, sharded: bool) -> None:
    """Errors: UserError where an adapter was to be trained over a sharded base."""
    if sharded and lora:
        raise UserError(
            f"{stage.name}.lora: the base of an adapter is not sharded, and launch.accelerate asks for it.",
            mend=f"Set launch.accelerate: null, with which every rank has the whole base, or {stage.name}.lora: false.",
        )


def place(stage: Stage, load: Load, *, sharded: bool) -> PreTrainedModel:
    """The model to train: on this rank's device, or its part of it there.

    Gradients of a sharded one are means over the ranks, as DDP's are, by which the trainers' losses are scaled.
    """
    if not sharded:
        return load(stage.ranks.device)
    model = load_in_turn(lambda: load(torch.device("cpu")), stage.ranks, stage.recipe.model.dtype)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(float(stage.ranks.world))
    return model


def place_frozen(stage: Stage, load: Load, *, sharded: bool, dtype: str = "float32") -> PreTrainedModel:
    """A model that only reads, a sharded one in `dtype`: whole on this rank's device, or its part of it there."""
    if not sharded:
        return load(stage.ranks.device)
    return load_in_turn(lambda: load(torch.device("cpu")).requires_grad_(False), stage.ranks, dtype)


def gathered(model: nn.Module, ranks: Ranks) -> dict[str, Tensor] | None:
    """A sharded model's whole weights by name in the first rank's main memory, none on the others.

    None where the model has its weights itself.
    """
    if not is_sharded(model):
        return None
    found = {}
    for name, tensor in whole(model.state_dict().items()):
        if ranks.is_main:
            found[name] = tensor.cpu()
    return found


def train_on(trainer: Trainer, stage: Stage, *, sharded: bool) -> TrainOutput:
    """Trains, from the newest complete checkpoint if there is one.

    Errors:
        UserError: the checkpoint was written by other ranks.
        pipeline.stage.Preempted: the stage was told to save its state and end.
    """
    checkpoint = newest_complete_checkpoint(stage.state, stage.ranks, say=stage.say)
    if checkpoint is not None:
        refuse_other_ranks(checkpoint, stage, sharded=sharded)
        stage.say(f"{stage.name}: resuming from {checkpoint.name}")
        trainer.args.eval_on_start |= owes_evaluation(checkpoint, trainer.args)
        if _is_the_last(checkpoint):
            trainer._run_epoch = _nothing  # pyright: ignore[reportAttributeAccessIssue]
    output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return output if checkpoint is None else output._replace(training_loss=_mean_loss(trainer, output.training_loss))


def _mean_loss(trainer: Trainer, since: float) -> float:
    """Of all steps, from the log that checkpoints carry; the library's is of those `since` the run went on."""
    total, before = 0.0, 0
    for row in trainer.state.log_history:
        if "loss" in row:
            total, before = total + row["loss"] * (row["step"] - before), row["step"]
    return total / before if before else since


def refuse_other_ranks(checkpoint: Path, stage: Stage, *, sharded: bool) -> None:
    """Refuses a checkpoint of other ranks: a batch size is per process, so the remaining steps would be other ones.

    Errors:
        UserError: another number of processes wrote it, or it holds weights the other way.
    """
    ranks = stage.ranks
    files = (list(checkpoint.glob(pattern)) for pattern in ("rng_state*.pth", SHARDED_WEIGHTS))
    states, parts = map(len, files)
    wrote = ranks.broadcast((states, parts > 0))
    if wrote[0] not in (0, ranks.world) or wrote[1] != sharded:
        before, now = (
            f"{count} process{'es' if count > 1 else ''} with {'sharded' if parts else 'whole'} weights"
            for count, parts in (wrote, (ranks.world, sharded))
        )
        raise UserError(
            f"{checkpoint} was written by {before}, and the stage now runs as {now}.",
            mend="Start it with the launch.machines, launch.processes and launch.accelerate of before, or anew with "
            "--overwrite.",
        )


def leave_if_told(stage: Stage, step: int) -> None:
    """Ends the stage, where it was told to, between training's last step and long work that follows; all ranks ask.

    Errors:
        pipeline.stage.Preempted: it was, and has the checkpoint of that step to go on from.
    """
    seal = stage.state / f"checkpoint-{step}" / SEAL
    if stage.told_to_save() and stage.ranks.broadcast(seal.is_file()):
        raise Preempted(step)


def _is_the_last(checkpoint: Path) -> bool:
    """Whether no step is left after it. The library takes one more where the last step is not the end of an epoch."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"]


def _nothing(**_: Any) -> None:
    """In place of the passes over the data."""


def owes_evaluation(checkpoint: Path, args: TrainingArguments) -> bool:
    """Whether the run ended, when it was told to, before an evaluation that was due at the checkpoint's step."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    step, strategy = state["global_step"], IntervalStrategy(args.eval_strategy)
    if any("eval_loss" in row and row["step"] == step for row in state["log_history"]) or step < args.eval_delay:
        return False
    if strategy == IntervalStrategy.STEPS:
        return step % state["eval_steps"] == 0
    return strategy == IntervalStrategy.EPOCH and float(state["epoch"]).is_integer()
