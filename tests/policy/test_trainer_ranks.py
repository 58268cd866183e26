"""A whole short training by two ranks equals the same training by one, with whole and with sharded weights."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from pipeline.equal_batches import NO_ROW, DealtSampler, turns
from pipeline.errors import UserError
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe
from pipeline.sharding import whole
from pipeline.stage import Preempted
from pipeline.stragglers import ForwardClock, straggler
from pipeline.tokens import EncodedExample
from pipeline.trainer_log import RankTimes, trainer_callback
from pipeline.trainer_ranks import is_sharded_run, owes_evaluation, place, precision, refuse_other_ranks, train_on
from policy.models import disable_dropout, load_policy
from policy.objectives import make_objective
from policy.preference_data import RowCollator, Rows
from policy.preference_trainer import PreferenceTrainer
from reward_model.data import LengthGroupedSampler
from tests.policy.test_preference_trainer import ANSWERS, METHODS, PROMPTS, rows_of
from tests.tiny_stage import save_tiny_policy

RECIPE = Recipe.model_validate({"name": "t", "model": {"name_or_path": "m"}, "ift": {"residual_noise": 0.5}})
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP |= {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
GLOBAL_BATCH = 4
Found = dict[str, Any]


def settings(place_: Path, stage: Any, sharded: bool, accumulation: int) -> dict[str, Any]:
    per_rank = GLOBAL_BATCH // stage.ranks.world // accumulation
    return {
        "output_dir": str(place_),
        "report_to": [],
        "num_train_epochs": 2,
        "per_device_train_batch_size": per_rank,
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": per_rank,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "group_by_length",
        **precision("float32", sharded=sharded),
    }


def found_by(trainer: Any, model: PreTrainedModel) -> Found:
    """Weights, every logged number and counted token of a trained model."""
    timed = ("runtime", "per_second", "preparation_time", "total_flos")
    rows = [{k: v for k, v in row.items() if not k.endswith(timed)} for row in trainer.state.log_history]
    weights = {name: tensor.detach().clone() for name, tensor in whole(model.state_dict().items())}
    return {"weights": weights, "rows": rows, "tokens": trainer.state.num_input_tokens_seen}


def direct(name: str, accumulation: int, policy: Path, out: Path, ranks: Ranks) -> Found:
    """Nine rows in steps of four: the last step of an epoch has one, and then one of two ranks has none."""
    stage: Any = SimpleNamespace(ranks=ranks, recipe=RECIPE, name=name)
    sharded = is_sharded_run(stage)
    model = place(stage, lambda device: load_policy(policy, "float32", device), sharded=sharded)
    disable_dropout(model)
    rows = [*rows_of(name), *rows_of(name)[:3]]
    shared = len(rows[0].group.answer_ids) > 1
    arguments = TrainingArguments(remove_unused_columns=False, **settings(out, stage, sharded, accumulation))
    trainer = PreferenceTrainer(
        objective=make_objective(name, RECIPE, shared=shared, labels=(2, 4)),
        model=model,
        args=arguments,
        data_collator=RowCollator(0, shared),
        train_dataset=Rows(rows),
        eval_dataset=Rows(rows[:5]),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return found_by(trainer, model)


def sft(accumulation: int, policy: Path, out: Path, ranks: Ranks) -> Found:
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig

    from policy.sft import make_trainer

    stage: Any = SimpleNamespace(ranks=ranks, recipe=RECIPE, name="sft")
    sharded = is_sharded_run(stage)
    model = place(stage, lambda device: load_policy(policy, "float32", device), sharded=sharded)
    pairs = [(p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)] * 2
    examples = [EncodedExample([*p, *a], len(p)) for p, a in pairs][:9]
    arguments = SFTConfig(max_length=None, **settings(out, stage, sharded, accumulation))
    trainer = make_trainer(model, AutoTokenizer.from_pretrained(policy), arguments, (examples, examples[:5]))
    trainer.train()
    return found_by(trainer, model)


def run_all(policy: Path, tiny: Path, out: Path, ranks: Ranks) -> dict[str, Found]:
    found = {name: direct(name, 1, policy, out, ranks) for name in METHODS}
    found["dpo, accumulated"] = direct("dpo", 2, policy, out, ranks)
    found["ift, untied"] = direct("ift", 1, tiny, out, ranks)
    found["kto, accumulated"] = direct("kto", 2, policy, out, ranks)
    return found | {"sft": sft(1, tiny, out, ranks), "sft, accumulated": sft(2, tiny, out, ranks)}


def as_rank(rank: int, places: tuple[Path, Path, Path], environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update(environment | {name: str(number) for name, number in numbers.items()})
    store = places[2] / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = run_all(*places, Ranks(rank, 2, rank, 2))
    torch.save(found, places[2] / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from transformers import LlamaForCausalLM

    from tests.policy.conftest import tiny_config

    folder = tmp_path_factory.mktemp("policies")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(attention_dropout=0.5)).save_pretrained(folder / "policy")
    return folder / "policy", save_tiny_policy(folder / "tiny", tied=False)


@pytest.fixture(scope="module")
def of_one_rank(policies: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return run_all(*policies, tmp_path_factory.mktemp("one"), Ranks())


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"ACCELERATE_USE_CPU": "true"}, FSDP], ids=["whole", "sharded"])
def test_two_ranks_do_what_one_does(
    policies: tuple[Path, Path], of_one_rank: dict[str, Found], tmp_path: Path, environment: dict[str, str]
) -> None:
    arguments = ((*policies, tmp_path), environment)
    processes.spawn(as_rank, arguments, nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert got.keys() == of_one_rank.keys()
        for name, expected in of_one_rank.items():
            assert got[name]["tokens"] == expected["tokens"], name
            assert len(got[name]["rows"]) == len(expected["rows"]), name
            for row, wanted in zip(got[name]["rows"], expected["rows"], strict=True):
                assert row == pytest.approx(wanted, rel=2e-4, abs=2e-5), name
            for key, weight in expected["weights"].items():
                torch.testing.assert_close(
                    got[name]["weights"][key],
                    weight,
                    rtol=1e-5,
                    atol=1e-5,
                    msg=lambda t, n=name, k=key: f"{n} {k}: {t}",
                )


@given(rows=st.integers(0, 40), batch=st.integers(1, 5), world=st.integers(1, 5), accumulation=st.integers(1, 3))
def test_every_row_is_dealt_once_and_steps_are_those_of_one_rank(
    rows: int, batch: int, world: int, accumulation: int
) -> None:
    dealt = DealtSampler(SequentialSampler(range(rows)), batch, world)
    batches = list(BatchSampler(dealt, batch, drop_last=False))
    assert sorted(row for each in batches for row in each if row != NO_ROW) == list(range(rows))
    assert len(dealt) == sum(map(len, batches)) == batch * len(batches)
    of_rank = [batches[rank::world] for rank in range(world)]  # as accelerate gives them out
    assert len({len(own) for own in of_rank}) == 1
    alone = list(BatchSampler(SequentialSampler(range(rows)), batch * world, drop_last=False))
    for number, together in enumerate(zip(*of_rank, strict=True)):
        assert sorted(row for part in together for row in part if row != NO_ROW) == alone[number]
    full = DealtSampler(SequentialSampler(range(rows)), batch, world, drop_last=True)
    assert list(full) == [row for row in dealt if row < len(full) and row != NO_ROW][: len(full)]


def test_steps_of_similar_length_are_the_same_whatever_the_ranks() -> None:
    lengths = [3, 9, 1, 4, 4, 8, 2, 7, 5, 6, 6, 2, 9]

    def steps(batch: int, world: int, accumulation: int) -> list[set[int]]:
        order = LengthGroupedSampler(lengths, batch * world * accumulation, seed=3)
        dealt = list(DealtSampler(order, batch, world))
        size = batch * world * accumulation
        return [set(dealt[at : at + size]) - {NO_ROW} for at in range(0, len(dealt), size)]

    assert steps(4, 1, 1) == steps(2, 2, 1) == steps(1, 4, 1) == steps(2, 1, 2) == steps(1, 2, 2)


def test_forwards_are_shared_and_can_be_kept_in_step() -> None:
    ranks = [Ranks(rank, 3) for rank in range(3)]
    assert [list(turns(4, each, in_step=False)) for each in ranks] == [
        [(0, True), (3, True)],
        [(1, True)],
        [(2, True)],
    ]
    assert [list(turns(4, each, in_step=True)) for each in ranks] == [
        [(0, True), (3, True)],
        [(1, True), (0, False)],
        [(2, True), (0, False)],
    ]
    assert list(turns(0, ranks[0], in_step=True)) == []


def test_a_straggler_is_over_one_and_a_half_medians() -> None:
    assert straggler([1.0, 1.1, 0.9, 1.8]) == "rank 3 is 1.7x slower than the median"  # 1.8 / 1.05
    assert straggler([1.0, 1.1, 0.9, 1.5]) is None
    assert straggler([2.0, 1.0]) == "rank 0 is 2.0x slower than the median"
    assert straggler([2.0]) is None
    assert straggler([0.0, 0.0]) is None


def test_a_checkpoint_of_other_ranks_is_refused(tmp_path: Path) -> None:
    stage: Any = SimpleNamespace(ranks=Ranks(), name="dpo")
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "rng_state.pth").touch()
    refuse_other_ranks(checkpoint, stage, sharded=False)
    (checkpoint / "rng_state.pth").unlink()
    for rank in (0, 1):
        (checkpoint / f"rng_state_{rank}.pth").touch()
    with pytest.raises(UserError, match="by 2 processes with whole weights, and the stage now runs as 1 process"):
        refuse_other_ranks(checkpoint, stage, sharded=False)
    (checkpoint / "rng_state_1.pth").unlink()
    (checkpoint / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(UserError, match="sharded weights, and the stage now runs as 1 process with whole weights"):
        refuse_other_ranks(checkpoint, stage, sharded=False)


@pytest.mark.parametrize(
    ("strategy", "step", "evaluated", "owed"),
    [("steps", 4, 0, True), ("steps", 4, 4, False), ("steps", 5, 0, False), ("no", 4, 0, False), ("epoch", 6, 0, True)],
)
def test_an_evaluation_that_a_signal_cut_off_is_made_up_for(
    tmp_path: Path, strategy: str, step: int, evaluated: int, owed: bool
) -> None:
    """Epochs have three steps, evaluations come every two."""
    history = [{"loss": 1.0, "step": step}, {"eval_loss": 1.0, "step": evaluated}]
    state = {"global_step": step, "eval_steps": 2, "epoch": step / 3, "log_history": history}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, eval_strategy=strategy, eval_steps=2)
    assert owes_evaluation(tmp_path, arguments) == owed


def test_a_slow_rank_is_named_once_it_is_steadily_slow() -> None:
    forwards = iter([(1.0, 1.0), (1.0, 2.0), (1.0, 2.0), (1.0, 2.0), (1.0, 2.0), (1.0, 1.2)])
    said: list[str] = []

    def gather(own: tuple[float, float, float]) -> list[tuple[float, float, float]]:
        return [(0.5 + rank, forward, 3.0 + rank) for rank, forward in enumerate(next(forwards))]

    stage: Any = SimpleNamespace(ranks=SimpleNamespace(world=2, gather=gather), name="rm", say=said.append)
    times = RankTimes(stage, torch.nn.Linear(2, 2))
    told, numbers = [], {}
    for _ in range(6):
        told.append(len(said))
        times.seconds.append(0.5)
        numbers = times.take()
    assert numbers == {  # of the last log
        "time/ranks/step_seconds_max": 1.5,
        "time/ranks/memory_gib_max": 4.0,
        "time/ranks/forward_seconds_max": 1.2,
        "time/ranks/forward_seconds_median": 1.1,
    }
    assert said == ["rm: rank 1 is 2.0x slower than the median in its forwards"]
    assert told == [0, 0, 0, 0, 1, 1]
    assert times.take() == {}  # no step since


def test_forwards_in_training_are_timed_and_no_others() -> None:
    model = torch.nn.Linear(2, 2)
    clock = ForwardClock(model)
    with torch.no_grad():
        model(torch.zeros(1, 2))
    model.eval()(torch.zeros(1, 2))
    assert clock.take() == 0.0
    model.train()(torch.zeros(1, 2))
    assert clock.take() > 0.0
    model(torch.zeros(1, 2))
    clock.close()
    model(torch.zeros(1, 2))
    assert clock.take() > 0.0
    assert clock.take() == 0.0


def test_bfloat16_runs_under_autocast(tmp_path: Path, policies: tuple[Path, Path]) -> None:
    """The objective calls parts of the model, around whose own forward alone accelerate puts autocast."""
    model, dtypes = load_policy(policies[0], "float32"), set()
    layer: Any = model.base_model.get_submodule("layers.0.mlp.down_proj")
    layer.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    options: dict[str, Any] = {"max_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    trainer = PreferenceTrainer(
        objective=make_objective("dpo", RECIPE, shared=True, labels=(2, 4)),
        model=model,
        args=TrainingArguments(str(tmp_path), use_cpu=True, bf16=True, remove_unused_columns=False, **options),
        data_collator=RowCollator(0, True),
        train_dataset=Rows(rows_of("dpo")),
        eval_dataset=Rows(rows_of("dpo")),
    )
    trainer.train()
    trainer.evaluate()
    assert dtypes == {torch.bfloat16}


class OneStage:
    """What a Trainer asks of its stage; told to save after step `at`."""

    def __init__(self, state: Path, at: int) -> None:
        self.name, self.state, self.ranks, self.tracker, self.displays = "dpo", state, Ranks(), self, ExitStack()
        self.rows: list[tuple[int, list[str]]] = []
        self.at, self.steps = at, 0

    def told_to_save(self) -> bool:
        self.steps += 1
        return self.steps == self.at

    def rewind(self, step: int) -> None:
        self.rows = [row for row in self.rows if row[0] <= step]

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.rows.append((step, sorted(numbers)))

    def progress(self, steps: int, title: str) -> Any:
        return nullcontext(SimpleNamespace(update=lambda step, numbers: None))

    def say(self, text: str) -> None:
        assert text == "dpo: resuming from checkpoint-4"

    def record(self, **entries: Any) -> None:
        assert entries.keys() == {"step_seconds"}


def test_a_run_told_to_end_saves_before_it_evaluates_and_goes_on(tmp_path: Path, policies: tuple[Path, Path]) -> None:
    """An evaluation is due at the very step after which the signal is seen: the resumed run begins with it."""

    def trainer(stage: Any) -> PreferenceTrainer:
        options = {**settings(stage.state, stage, False, 1), "num_train_epochs": 3, "eval_steps": 4}
        return PreferenceTrainer(
            objective=make_objective("dpo", RECIPE, shared=True, labels=(2, 4)),
            model=load_policy(policies[0], "float32"),
            args=TrainingArguments(remove_unused_columns=False, **options),
            data_collator=RowCollator(0, True),
            train_dataset=Rows(rows_of("dpo")),
            eval_dataset=Rows(rows_of("dpo")),
            callbacks=[trainer_callback(stage, "dpo")],
        )

    whole_run: Any = OneStage(tmp_path / "whole", at=-1)
    expected = trainer(whole_run)
    train_on(expected, whole_run, sharded=False)
    stage: Any = OneStage(tmp_path / "told", at=4)
    with pytest.raises(Preempted) as ended:
        train_on(trainer(stage), stage, sharded=False)
    assert ended.value.step == 4
    assert [row for row in stage.rows if row[0] == 4 and "eval/loss" in row[1]] == []
    again = trainer(stage)
    train_on(again, stage, sharded=False)
    assert sorted(stage.rows) == sorted(whole_run.rows)
    assert again.model is not None
    assert expected.model is not None
    for ours, theirs in zip(again.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
