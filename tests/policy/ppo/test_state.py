"""Saving and restoring the whole training state."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.recipe import PpoSection
from pipeline.tokens import EncodedExample
from policy.ppo.controllers import AdaptiveKLController
from policy.ppo.experience import make_experience
from policy.ppo.order import pass_indices
from policy.ppo.ptx import PtxLoss
from policy.ppo.roles import Roles
from policy.ppo.state import Parts, PerRank, load_newest_state, save_state
from policy.ppo.update import Learner, UpdateOptions, ppo_update
from tests.policy.conftest import EOS, make_batch, make_roles

PPO = PpoSection(rollout_batch_size=6, num_ppo_epochs=2, num_minibatches=2, learning_rate=1e-3, updates=4)


class Number:
    """The smallest part that has a state."""

    def __init__(self, value: int = 0) -> None:
        self.value = torch.tensor(value)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def parts_of(roles: Roles, learner: Learner, controller: AdaptiveKLController) -> Parts:
    return {
        "policy": roles.policy,
        "critic": roles.critic,
        "learner": learner,
        "policy_optimizer": learner.policy_optimizer,
        "critic_optimizer": learner.critic_optimizer,
        "kl_controller": controller,
    }


def nobody_speaks(line: str) -> None:
    raise AssertionError(line)


def save(directory: Path, update: int, **options: Any) -> None:
    """A state whose number is that of the update."""
    save_state(directory, update, {"number": Number(update)}, **options)


def load(directory: Path, say: Callable[[str], None] = nobody_speaks) -> int | None:
    """The update of the newest state, once its number is right."""
    number = Number(-1)
    update = load_newest_state(directory, {"number": number}, say=say)
    assert update is None or int(number.value) == update
    return update


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_two_updates_equal_one_update_saved_restored_and_one_more(
    policy_dir: Path, reward_dir: Path, tmp_path: Path
) -> None:
    examples = [EncodedExample([1, 20 + row, 30, EOS], 2) for row in range(9)]
    ptx = PtxLoss(examples, 0.5, 2, 0, 0)

    def one_more(roles: Roles, learner: Learner, controller: AdaptiveKLController) -> dict[str, float]:
        experience = make_experience(roles, make_batch(), PPO, controller.kl_coef)
        metrics = ppo_update(roles, learner, experience, UpdateOptions(PPO, 8, ptx=ptx))
        controller.update(9.0, 6)
        return metrics

    roles = make_roles(policy_dir, reward_dir)
    learner, controller = Learner.create(roles, PPO, 0), AdaptiveKLController(0.1, 6.0, 100.0)
    one_more(roles, learner, controller)
    learner.skipped_steps = 2
    save_state(tmp_path / "state", 1, parts_of(roles, learner, controller))
    drawn = (torch.rand(1), numpy.random.rand(), random.random())
    expected = one_more(roles, learner, controller)

    fresh = make_roles(policy_dir, reward_dir)
    other, other_controller = Learner.create(fresh, PPO, 5), AdaptiveKLController(0.3, 6.0, 100.0)
    assert load_newest_state(tmp_path / "state", parts_of(fresh, other, other_controller), say=nobody_speaks) == 1
    assert (torch.rand(1), numpy.random.rand(), random.random()) == drawn
    assert one_more(fresh, other, other_controller) == expected
    assert other.skipped_steps == 2
    assert other.ptx_steps == learner.ptx_steps == 8
    assert other_controller.kl_coef == controller.kl_coef
    for a, b in zip(roles.policy.parameters(), fresh.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimiser_that_has_not_stepped_stays_so(tmp_path: Path) -> None:
    """While the critic warms up the policy's Adam has no moments, and its first step must still be its first."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    save_state(tmp_path / "state", 1, {"model": model, "optimizer": optimizer})
    assert not optimizer.state
    load_newest_state(tmp_path / "state", {"model": model, "optimizer": optimizer}, say=nobody_speaks)
    assert not optimizer.state


def test_weights_and_moments_are_stored_once(tmp_path: Path) -> None:
    """Tied weights, and a part that is given under two names, take the space of one: 4 bytes x 256 x 256 x 3."""
    model = nn.ModuleDict({"a": nn.Linear(256, 256, bias=False), "b": nn.Linear(256, 256, bias=False)})
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model["a"](torch.ones(256)).sum().backward()
    optimizer.step()
    save_state(tmp_path, 1, {"model": model, "optimizer": optimizer, "again": optimizer})
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.pt"))
    assert 4 * 256 * 256 * 3 < size < 4 * 256 * 256 * 3 * 1.1


def test_the_newest_two_states_are_kept_and_the_newest_is_used(tmp_path: Path) -> None:
    assert load(tmp_path / "state") is None
    for update in (5, 10, 15):
        save(tmp_path / "state", update)
    assert names(tmp_path / "state") == ["update_000010", "update_000015"]
    assert load(tmp_path / "state") == 15
    save(tmp_path / "state", 1_000_000, keep=3)
    assert load(tmp_path / "state") == 1_000_000
    assert len(names(tmp_path / "state")) == 3


def test_what_is_no_state_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    save(tmp_path, 1, keep=1)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["engine", "update_000002"]


def test_a_state_may_be_saved_again(tmp_path: Path) -> None:
    save_state(tmp_path, 3, {"number": Number(1)})
    save(tmp_path, 3)
    assert load(tmp_path) == 3
    assert names(tmp_path) == ["update_000003"]


FILES = ("checkpoint.json", "replicated.pt", "rank_0.pt")


def damage(file: Path, how: str) -> None:
    """Removes the file, or keeps the fraction `how` of it."""
    if how == "removed":
        file.unlink()
    else:
        os.truncate(file, int(file.stat().st_size * float(how)))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["removed", "0", "0.5", "0.99"])
def test_a_file_cut_off_or_lost_sends_back_to_the_state_before(tmp_path: Path, name: str, how: str) -> None:
    for update in (4, 8, 12):
        save(tmp_path / "state", update)
    damage(tmp_path / "state" / "update_000012" / name, how)
    said: list[str] = []
    assert load(tmp_path / "state", said.append) == 8
    what = {"checkpoint.json": "is missing or damaged"}.get(
        name, "is missing" if how == "removed" else "does not have its sha256"
    )
    assert said == [f"state/update_000012/{name} {what}: going on from update 8"]
    assert names(tmp_path / "state") == ["update_000008", "update_000012.damaged"]
    assert load(tmp_path / "state") == 8
    save(tmp_path / "state", 9)
    assert names(tmp_path / "state") == ["update_000008", "update_000009"]


@pytest.mark.parametrize("name", FILES)
def test_any_changed_byte_is_seen(tmp_path: Path, name: str) -> None:
    save(tmp_path / "state", 4)
    file = tmp_path / "state" / "update_000004" / name
    content = file.read_bytes()
    step = 1 if name == "checkpoint.json" else len(content) // 40
    for place in range(0, len(content), step):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(UserError, match=f"update_000004/{name} "):
            load(tmp_path / "state")
    file.write_bytes(content)
    assert load(tmp_path / "state") == 4


def test_all_states_damaged_is_an_error_until_they_are_restored(tmp_path: Path) -> None:
    for update in (4, 8):
        save(tmp_path / "state", update)
    file = tmp_path / "state" / "update_000008" / "replicated.pt"
    content = file.read_bytes()
    damage(file, "0.5")
    damage(tmp_path / "state" / "update_000004" / "rank_0.pt", "removed")
    for _ in range(2):
        with pytest.raises(UserError) as error:
            load(tmp_path / "state")
        assert str(error.value) == (
            "no saved state of this stage is whole: state/update_000008/replicated.pt does not have its sha256; "
            "state/update_000004/rank_0.pt is missing. Restore the files, or run the stage again with --overwrite: it "
            "starts anew."
        )
    file.write_bytes(content)
    assert load(tmp_path / "state") == 8


def test_another_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.seals.VERSION", 2)
        save(tmp_path, 4)
    with pytest.raises(UserError, match=r"checkpoint\.json has version 2, this tristage reads 1\."):
        load(tmp_path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "state", 4)

    def refuse(file: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("pipeline.seals.sha256_file", refuse)
    with pytest.raises(PermissionError):
        load(tmp_path / "state")
    assert names(tmp_path / "state") == ["update_000004"]


class PowerCut(BaseException):
    """Nothing in the writing may catch it."""


CALLS = ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink")


def cut_at(patch: pytest.MonkeyPatch, step: int) -> list[str]:
    """From the `step`th change of the disk on nothing is written; returns the calls that were made."""
    done: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(done) >= step:
                raise PowerCut
            done.append(name)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        patch.setattr(os, name, counted(name, getattr(os, name)))
    return done


@pytest.mark.parametrize("update", [12, 8])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_between_any_two_steps_leaves_a_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int, keep: int
) -> None:
    """Also where the state of that update is replaced, and where the only state before is to go."""
    step, found, complete = 0, [], False
    while not complete:
        place = tmp_path / str(step)
        for before in (4, 8):
            save_state(place, before, {"number": Number(before)}, keep=keep)
        with monkeypatch.context() as patch:
            cut_at(patch, step)
            try:
                save_state(place, update, {"number": Number(99)}, keep=keep)
                complete = True
            except PowerCut:
                step += 1
        number = Number(-1)
        assert load_newest_state(place, {"number": number}, say=nobody_speaks) in (8, update)
        found.append(int(number.value))
        assert not [name for name in names(place) if name.startswith(".")]
        save(place, 16, keep=keep)
        assert load(place) == 16
        assert len(names(place)) == keep
    assert step > 10
    assert found == sorted(found)
    assert set(found) == {8, 99}


def test_a_failed_save_leaves_the_states_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 4)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 8)
    assert load(tmp_path) == 4
    assert names(tmp_path) == ["update_000004"]


def test_the_seal_says_what_it_is_of(tmp_path: Path) -> None:
    save(tmp_path, 12)
    seal = json.loads((tmp_path / "update_000012" / "checkpoint.json").read_text())
    assert {key: seal[key] for key in ("version", "update", "world")} == {"version": 1, "update": 12, "world": 1}
    assert sorted(seal["files"]) == ["rank_0.pt", "replicated.pt"]


def test_a_renamed_state_is_not_taken_for_another_update(tmp_path: Path) -> None:
    save(tmp_path, 12)
    (tmp_path / "update_000012").rename(tmp_path / "update_000013")
    with pytest.raises(UserError, match=r"update_000013/checkpoint\.json is missing or damaged"):
        load(tmp_path)


def test_a_state_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("true",)

    part = Number()
    monkeypatch.setattr(part, "state_dict", lambda: {"value": Evil()})
    save_state(tmp_path, 1, {"number": part})
    with pytest.raises(pickle.UnpicklingError):
        load(tmp_path)


def test_a_part_of_one_rank_lies_in_its_file(tmp_path: Path) -> None:
    """A batch that was generated ahead is such a part: any dictionary of tensors."""
    save_state(tmp_path, 1, {"number": Number(1), "ahead": PerRank(Number(7))})
    assert "ahead" not in torch.load(tmp_path / "update_000001" / "replicated.pt")["parts"]
    ahead = Number()
    load_newest_state(tmp_path, {"number": Number(), "ahead": PerRank(ahead)}, say=nobody_speaks)
    assert int(ahead.value) == 7


def test_each_pass_uses_every_prompt_once_in_a_fresh_order() -> None:
    first = [i for update in (1, 2, 3) for i in pass_indices(12, 4, update, seed=0)]
    second = [i for update in (4, 5, 6) for i in pass_indices(12, 4, update, seed=0)]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert pass_indices(12, 4, 2, seed=0) == first[4:8]
    assert pass_indices(12, 4, 2, seed=1) != first[4:8]
    uneven = [i for update in range(1, 6) for i in pass_indices(10, 4, update, seed=0)]
    assert sorted(uneven) == sorted([*range(10), *range(10)])
