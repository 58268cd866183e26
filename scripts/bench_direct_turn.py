"""One side's process in `scripts.bench_direct`: trains one direct method once and writes what every step cost.

`python -m scripts.bench_direct_turn make DIR SHAPE.json` writes the random model and its tokenizer;
`python -m scripts.bench_direct_turn JOB.json` takes one turn. Both sides read the same token ids in the same order:
trl gets them as text of one word per token.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback, TrainingArguments

from scripts.bench_ppo_models import EOS, PAD, Shape, random_model, word_tokenizer

if TYPE_CHECKING:
    from policy.objectives import Objective, Sizes, Step
    from policy.preference_data import Row

GIB = 2**20
"""Of the kibibytes that Linux counts `ru_maxrss` in."""
RESULT = "turn.json"
PACKAGES = ("trl", "torch", "transformers", "accelerate")
PEER_SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": ["sigmoid"], "beta": 0.1},
    "ipo": {"loss_type": ["ipo"], "beta": 0.1},
    "kto": {"beta": 0.1},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
    "orpo": {"beta": 0.1},
}
"""trl's settings that give the losses of our defaults."""


@dataclass(frozen=True)
class Job:
    """A turn to take.

    Attributes:
        side: `trl` (which computes a reference in every step), `trl-precomputed`, `ours` (cached) or `ours-live`.
        data: JSON file of rows [prompt, chosen, rejected], token ids without EOS; whole batches of them.
        scratch: an empty folder of this turn's own.
    """

    method: str
    side: str
    model: str
    data: str
    scratch: str
    batch: int
    threads: int


@dataclass(frozen=True)
class Tokens:
    """A prompt and its two answers; answers end in EOS."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def answer(self, number: int) -> list[int]:
        """The answer that KTO learns from in row `number`: chosen and rejected in turns, one per prompt."""
        return self.rejected if number % 2 else self.chosen


class Clock(TrainerCallback):
    """CPU and wall seconds of every optimiser step, its data and its logging included."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.last = (0.0, 0.0)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts."""
        self.last = time.process_time(), time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Notes a step."""
        now = time.process_time(), time.perf_counter()
        cpu, wall = (after - before for before, after in zip(self.last, now, strict=True))
        self.steps.append({"cpu_seconds": cpu, "wall_seconds": wall})
        self.last = now


@dataclass(frozen=True)
class LiveReference:
    """Our objective with the reference's log-probabilities computed in every step."""

    objective: Objective
    reference: PreTrainedModel
    shared: bool

    def sizes(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        """The objective's."""
        return self.objective.sizes(inputs)

    def begin_step(self, model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], step: Step) -> None:
        """The objective's."""
        self.objective.begin_step(model, batches, step)

    def loss(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], sizes: Sizes) -> Any:
        """The objective's, after a forward of the reference."""
        from policy.answers import AnswerBatch, answer_logprobs

        with torch.no_grad():
            found = answer_logprobs(self.reference, AnswerBatch.of(inputs, shared=self.shared))
        return self.objective.loss(model, {**inputs, "reference": found.answers}, sizes)


@dataclass(frozen=True)
class Prepared:
    """A trainer that has not started, and what it took.

    Attributes:
        reference_seconds: CPU seconds of the reference's log-probabilities of all rows, where they were computed first.
        start_memory: peak memory before model and data, in kibibytes.
    """

    trainer: Any
    clock: Clock
    reference_seconds: float
    start_memory: int


def take_turn(job: Job) -> dict[str, Any]:
    """Trains for one epoch; returns the costs, the losses and what they were measured with."""
    torch.set_num_threads(job.threads)
    tokens = read_tokens(job)
    prepared = prepare_trl(job, tokens) if job.side.startswith("trl") else prepare_ours(job, tokens)
    settings = common_arguments(job) | (peer_arguments(job) if job.side.startswith("trl") else {})
    prepared.trainer.train()
    losses = [entry["loss"] for entry in prepared.trainer.state.log_history if "loss" in entry]
    steps = [{**cost, "loss": loss} for cost, loss in zip(prepared.clock.steps, losses, strict=True)]
    return {
        "steps": steps,
        "reference_seconds": prepared.reference_seconds,
        "start_memory_gib": prepared.start_memory / GIB,
        "peak_memory_gib": peak_memory() / GIB,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "settings": {"threads": torch.get_num_threads(), **settings},
    }


def read_tokens(job: Job) -> list[Tokens]:
    """The rows of the job."""
    rows = json.loads(Path(job.data).read_text())
    return [Tokens(prompt, [*chosen, EOS], [*rejected, EOS]) for prompt, chosen, rejected in rows]


def common_arguments(job: Job) -> dict[str, Any]:
    """Settings of transformers' Trainer that both sides run with: every row once, in order."""
    return {
        "per_device_train_batch_size": job.batch,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1.0,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }


def prepare_ours(job: Job, tokens: Sequence[Tokens]) -> Prepared:
    """`PreferenceTrainer` as the stages of the direct methods set it up, at the defaults of the recipe."""
    from contextlib import nullcontext

    from pipeline.recipe import Recipe
    from policy.answers import can_share_prompts
    from policy.losses import METHODS
    from policy.models import disable_dropout, load_policy
    from policy.objectives import make_objective
    from policy.preference_data import RowCollator, Rows, cached_sums, reference_sums, with_reference
    from policy.preference_trainer import PreferenceTrainer

    start_memory, clock, spent = peak_memory(), Clock(), 0.0
    model = load_policy(job.model, "float32")
    disable_dropout(model)
    rows = our_rows(job, tokens)
    shared = job.method != "kto" and can_share_prompts(model.eval())
    if METHODS[job.method].needs_reference and job.side != "ours-live":
        begin = time.process_time()
        sums, _ = cached_sums(
            Path(job.scratch) / "ref_logprobs",
            job.model,
            rows,
            lambda: reference_sums(rows, model, PAD, shared=shared, autocast=nullcontext),
        )
        rows = with_reference(rows, sums)
        spent = time.process_time() - begin
    recipe = Recipe.model_validate({"name": "bench", "model": {"name_or_path": job.model}})
    labels = (len(rows) + 1) // 2, len(rows) // 2
    objective = make_objective(job.method, recipe, shared=shared, labels=labels)
    if job.side == "ours-live":
        objective = LiveReference(objective, load_policy(job.model, "float32").eval(), shared)
    trainer = PreferenceTrainer(
        objective=objective,
        model=model,
        args=TrainingArguments(output_dir=job.scratch, remove_unused_columns=False, **common_arguments(job)),
        data_collator=RowCollator(PAD, shared),
        train_dataset=Rows(rows),
        callbacks=[clock],
    )
    return Prepared(trainer, clock, spent, start_memory)


def our_rows(job: Job, tokens: Sequence[Tokens]) -> list[Row]:
    """Pairs; under KTO single answers, each prompt's mismatched answer being that of the row before in the batch."""
    from policy.answers import Group
    from policy.preference_data import Row

    if job.method != "kto":
        return [Row(Group(row.prompt, [row.chosen, row.rejected]), ((0, 1),)) for row in tokens]
    rows = []
    for number, row in enumerate(tokens):
        before = number - 1 if number % job.batch else number + job.batch - 1
        other = Group(row.prompt, [tokens[before].answer(before)])
        rows.append(Row(Group(row.prompt, [row.answer(number)]), desirable=number % 2 == 0, other=other))
    return rows


def prepare_trl(job: Job, tokens: Sequence[Tokens]) -> Prepared:
    """trl's trainer of the method as it is."""
    from datasets import Dataset

    trainer_class, config_class = peer_classes(job.method)
    start_memory, clock, spent = peak_memory(), Clock(), [0.0]

    class Timed(trainer_class):
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            found = super()._precompute_ref_logps(*args, **kwargs)
            spent.append(time.process_time() - begin)
            return found

    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        args=config_class(output_dir=job.scratch, **common_arguments(job), **peer_arguments(job)),
        train_dataset=Dataset.from_list(peer_rows(job, tokens)),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[clock],
    )
    return Prepared(trainer, clock, sum(spent), start_memory)


def peer_arguments(job: Job) -> dict[str, Any]:
    """trl's settings of the method, and whether it computes the reference first."""
    return PEER_SETTINGS[job.method] | ({"precompute_ref_log_probs": True} if job.side == "trl-precomputed" else {})


def peer_rows(job: Job, tokens: Sequence[Tokens]) -> list[dict[str, Any]]:
    """The same rows as text; trl adds the EOS."""
    if job.method == "kto":
        return [
            {"prompt": words(row.prompt), "completion": f" {words(row.answer(number)[:-1])}", "label": number % 2 == 0}
            for number, row in enumerate(tokens)
        ]
    return [
        {
            "prompt": words(row.prompt),
            "chosen": f" {words(row.chosen[:-1])}",
            "rejected": f" {words(row.rejected[:-1])}",
        }
        for row in tokens
    ]


def words(ids: Sequence[int]) -> str:
    """Text that `word_tokenizer` reads as `ids`."""
    return " ".join(f"w{token}" for token in ids)


def peer_classes(method: str) -> tuple[Any, Any]:
    """trl's trainer and configuration of a method."""
    if method == "kto":
        from trl.trainer.kto_config import KTOConfig
        from trl.trainer.kto_trainer import KTOTrainer

        return KTOTrainer, KTOConfig
    if method == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOTrainer, CPOConfig
    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    return DPOTrainer, DPOConfig


def peak_memory() -> int:
    """Peak resident memory of this process up to now, in kibibytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make(directory: Path, shape: Shape) -> None:
    """Writes a random model and the tokenizer that reads one word as one token."""
    torch.manual_seed(0)
    random_model(shape, "causal", "cpu").save_pretrained(directory)
    word_tokenizer(shape.vocab_size).save_pretrained(directory)


def main(arguments: Sequence[str]) -> None:
    """One of the two commands; a turn's costs are written into its scratch folder."""
    match arguments:
        case ["make", directory, shape]:
            make(Path(directory), Shape(**json.loads(Path(shape).read_text())))
        case [file]:
            job = Job(**json.loads(Path(file).read_text()))
            (Path(job.scratch) / RESULT).write_text(json.dumps(take_turn(job)))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
