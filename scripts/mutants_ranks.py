"""The mutants of what makes several ranks one: slices, shares, sums, shards, rollouts ahead, stragglers."""

from __future__ import annotations

from scripts.mutants_list import of

TWO_RANKS = "tests/policy/ppo/test_two_ranks.py::test_"
WHOLE = f"{TWO_RANKS}two_ranks_do_what_one_does[6-sharded0]"
SHARDED = f"{TWO_RANKS}two_ranks_do_what_one_does[6-sharded1]"
RANKS = (
    *of(
        "policy/ppo/slices.py",
        "tests/policy/ppo/test_slices.py",
        ("own += [Slice([0], counts=False)]", "own += [Slice([0])]"),
        ("(max(map(len, each)) - len(own))", "(max(map(len, each)) - 1)"),
        ("    if in_step:\n", "    if not in_step:\n"),
        ("order[rank :: ranks.world]", "order[rank : rank + 1]"),
        ("key=lambda row: lengths[row], reverse=True", "key=lambda row: lengths[row]"),
        ("return max(sum(len(rows)", "return min(sum(len(rows)"),
        ("each[ranks.rank]]", "each[0]]"),
    ),
    *of(
        "policy/ppo/rollouts.py",
        "tests/policy/ppo/test_rollouts.py",
        ("refuse_stale(batch, update - 1, lag", "refuse_stale(batch, update, lag"),
        ("lag=self.recipe.rollout.async_steps)", "lag=1)"),
        ("and update <= self.recipe.ppo.updates:", "and True:"),
        ("self._ahead.pop(update, None) or self._start(update)()", "self._start(update)()"),
        ("SeedSequence((recipe.seed, update))", "SeedSequence((recipe.seed, 0))"),
        ("c.finished, c.policy_version)", "c.finished, 0)"),
    ),
    *of(
        "pipeline/ranks.py",
        f"{TWO_RANKS}every_row_belongs_to_one_rank {WHOLE}",
        ("rows[self.rank :: self.world]", "rows[self.rank :]"),
        ("            dist.all_reduce(tensor)\n", "            pass\n"),
    ),
    *of(
        "pipeline/sharding.py",
        SHARDED,
        ("set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(2.0)"),
        ("return norm.full_tensor() if isinstance", "return norm.to_local() if isinstance"),
    ),
    *of(
        "policy/ppo/update.py",
        SHARDED,
        ("    loss = loss * float(one.counts)\n", ""),
        ("        critic_loss = critic_loss * float(one.counts)\n", ""),
        ("    if not one.counts:\n        return {}\n", ""),
    ),
    *of(
        "policy/ppo/ptx.py",
        SHARDED,
        ("part.response_mask, tokens) * float(counts)", "part.response_mask, tokens)"),
    ),
    *of(
        "policy/ppo/rewards.py",
        SHARDED,
        ("        self.ranks.sum_(each.values())\n", ""),
        ("            if own:\n                each", "            if True:\n                each"),
    ),
)
