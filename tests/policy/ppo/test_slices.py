"""Which rows go through a model together, on which rank."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.ranks import Ranks
from policy.ppo.slices import most_padded_tokens, slices
from rollout.batch import Completion, RolloutBatch

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=20)


def batch_of(lengths: list[int]) -> RolloutBatch:
    """One token of prompt, the rest response."""
    completions = [Completion((5,) * (n - 1), (0.0,) * (n - 1), finished=True) for n in lengths]
    return RolloutBatch.from_completions([[1] for _ in lengths], completions, 0)


@given(LENGTHS, st.integers(1, 7), st.integers(1, 60))
def test_every_row_counts_once_on_one_rank_and_all_ranks_run_equally_often(
    lengths: list[int], world: int, limit: int
) -> None:
    batch = batch_of(lengths)
    each = [slices(batch, limit, Ranks(rank, world), in_step=True) for rank in range(world)]
    assert sorted(row for own in each for rows, counts in own if counts for row in rows) == list(range(len(lengths)))
    assert len({len(own) for own in each}) == 1
    for own in each:
        for rows, _ in own:
            assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= limit


@given(LENGTHS, st.integers(1, 7), st.integers(1, 60))
def test_without_a_need_to_be_in_step_no_rank_runs_in_vain(lengths: list[int], world: int, limit: int) -> None:
    each = [slices(batch_of(lengths), limit, Ranks(rank, world)) for rank in range(world)]
    assert all(counts for own in each for _, counts in own)
    assert sum(len(rows) for own in each for rows, _ in own) == len(lengths)


def test_ranks_take_turns_in_order_of_length() -> None:
    """Lengths 9 8 7 ... 1 on two ranks: 9 7 5 3 1 and 8 6 4 2; at most 16 padded tokens together."""
    batch = batch_of([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert slices(batch, 16, Ranks(0, 2), in_step=True) == [([8], True), ([6, 4], True), ([2, 0], True)]
    assert slices(batch, 16, Ranks(1, 2), in_step=True) == [([7, 5], True), ([3, 1], True), ([0], False)]
    assert most_padded_tokens(batch, 16, Ranks(0, 2)) == 9 + 14 + 6
    assert slices(batch_of([1, 2, 3, 4]), 99, Ranks(0, 2)) == [([3, 1], True)]
