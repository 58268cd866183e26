from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.batch import Completion, RolloutBatch

PAD = 0
PROMPTS = [[11, 12, 13], [21], [31, 0]]
COMPLETIONS = [
    Completion((14, 2), (-0.5, -0.25), finished=True),
    Completion((22, 0, 24), (-1.0, -2.0, -3.0), finished=False, policy_version=3),
    Completion((), (), finished=True, policy_version=2),
]


def make() -> RolloutBatch:
    return RolloutBatch.from_completions(PROMPTS, COMPLETIONS, PAD)


def test_from_completions_by_hand() -> None:
    batch = make()
    assert batch.prompt_ids.tolist() == [[11, 12, 13], [0, 0, 21], [0, 31, 0]]
    assert batch.prompt_mask.int().tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert batch.response_ids.tolist() == [[14, 2, 0], [22, 0, 24], [0, 0, 0]]
    assert batch.response_mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert batch.rollout_logprobs.tolist() == [[-0.5, -0.25, 0], [-1, -2, -3], [0, 0, 0]]
    assert batch.rollout_logprobs.dtype == torch.float32
    assert batch.finished.tolist() == [True, False, True]
    assert batch.lengths.tolist() == [2, 3, 0]
    assert batch.n_empty == 1
    assert len(batch) == 3
    assert batch.policy_versions.tolist() == [0, 3, 2]


def test_input_ids_and_attention_mask_stand_side_by_side() -> None:
    batch = make()
    assert batch.input_ids[1].tolist() == [0, 0, 21, 22, 0, 24]
    assert batch.attention_mask.int().tolist() == [
        [1, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1],
        [0, 1, 1, 0, 0, 0],
    ]


def test_select_keeps_order_and_trims_padding() -> None:
    chosen = make().select([2, 1])
    assert chosen.prompt_ids.tolist() == [[31, 0], [0, 21]]
    assert chosen.prompt_mask.int().tolist() == [[1, 1], [0, 1]]
    assert chosen.response_ids.tolist() == [[0, 0, 0], [22, 0, 24]]
    assert chosen.rollout_logprobs.tolist() == [[0, 0, 0], [-1, -2, -3]]
    assert chosen.finished.tolist() == [True, False]
    assert chosen.policy_versions.tolist() == [2, 3]
    short = make().select(torch.tensor([0]))
    assert short.response_ids.tolist() == [[14, 2]]
    assert short.prompt_ids.shape == (1, 3)
    empty = make().select([2])
    assert empty.response_ids.shape == (1, 1)
    assert empty.n_empty == 1
    with pytest.raises(IndexError):
        make().select([3])


token_rows = st.lists(st.integers(0, 9), max_size=5)


@given(st.lists(st.tuples(token_rows.filter(bool), token_rows), min_size=1, max_size=5), st.randoms())
@settings(max_examples=40, deadline=None)
def test_no_token_is_lost_and_selecting_equals_building(rows: list, random: object) -> None:
    prompts = [prompt for prompt, _ in rows]
    completions = [Completion(tuple(ids), tuple(-0.5 * i for i, _ in enumerate(ids)), len(ids) < 5) for _, ids in rows]
    batch = RolloutBatch.from_completions(prompts, completions, PAD)
    for i, completion in enumerate(completions):
        assert batch.prompt_ids[i][batch.prompt_mask[i]].tolist() == prompts[i]
        mask = batch.response_mask[i]
        assert tuple(batch.response_ids[i][mask].tolist()) == completion.token_ids
        assert tuple(batch.rollout_logprobs[i][mask].tolist()) == completion.logprobs
    order = list(range(len(rows)))
    random.shuffle(order)  # pyright: ignore[reportAttributeAccessIssue]
    order = order[: max(1, len(order) // 2)]
    selected = batch.select(order)
    built = RolloutBatch.from_completions([prompts[i] for i in order], [completions[i] for i in order], PAD)
    for name in ("input_ids", "attention_mask", "rollout_logprobs", "finished", "lengths"):
        torch.testing.assert_close(getattr(selected, name), getattr(built, name))


def test_it_is_frozen_and_moves_as_a_whole() -> None:
    batch = make()
    with pytest.raises(FrozenInstanceError):
        batch.finished = batch.finished  # pyright: ignore[reportAttributeAccessIssue]
    moved = batch.to("cpu")
    assert moved is not batch
    assert moved.input_ids.tolist() == batch.input_ids.tolist()


def test_versions_that_are_left_out_are_zero() -> None:
    batch = make()
    whole = RolloutBatch(
        batch.prompt_ids,
        batch.prompt_mask,
        batch.response_ids,
        batch.response_mask,
        batch.rollout_logprobs,
        batch.finished,
    )
    assert whole.policy_versions.tolist() == [0, 0, 0]


def test_lists_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="3 prompts but 2 completions"):
        RolloutBatch.from_completions(PROMPTS, COMPLETIONS[:2], PAD)
    with pytest.raises(ValueError, match="0 prompts"):
        RolloutBatch.from_completions([], [], PAD)
    with pytest.raises(ValueError, match="2 token ids but 1"):
        Completion((1, 2), (-0.5,), finished=True)
    with pytest.raises(ValueError, match="not finite"):
        Completion((1, 2), (-0.5, float("nan")), finished=True)
    with pytest.raises(ValueError, match="policy_version is -1"):
        Completion((1,), (-0.5,), finished=True, policy_version=-1)
    with pytest.raises(ValueError, match="empty prompt"):
        RolloutBatch.from_completions([[1], []], COMPLETIONS[:2], PAD)


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("prompt_ids", torch.ones(3), "must be"),
        ("prompt_ids", torch.ones(3, 4).long(), "prompt_mask has shape"),
        ("prompt_ids", torch.ones(3, 3), "prompt_ids has dtype"),
        ("prompt_mask", torch.ones(3, 3), "prompt_mask has dtype"),
        ("response_ids", torch.ones(3, 3).int(), "response_ids has dtype"),
        ("response_mask", torch.ones(3, 2).bool(), "response_mask has shape"),
        ("response_mask", torch.ones(3, 3).long(), "response_mask has dtype"),
        ("rollout_logprobs", torch.ones(3, 3).long(), "expected a float type"),
        ("rollout_logprobs", torch.ones(3, 1), "rollout_logprobs has shape"),
        ("finished", torch.ones(3, 1).bool(), "finished has shape"),
        ("finished", torch.ones(3), "finished has dtype"),
        ("prompt_mask", torch.tensor([[1, 0, 1]] * 3).bool(), "False, then True"),
        ("prompt_mask", torch.tensor([[1, 1, 0]] * 3).bool(), "last column"),
        ("response_mask", torch.tensor([[1, 0, 1]] * 3).bool(), "True, then False"),
        ("response_mask", torch.tensor([[0, 1, 1]] * 3).bool(), "True, then False"),
        ("finished", torch.ones(3, device="meta").bool(), "one device"),
        ("policy_versions", torch.ones(2).long(), "policy_versions has shape"),
        ("policy_versions", torch.ones(3), "policy_versions has dtype"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_refused(field: str, wrong: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make(), **{field: wrong})
