"""Verdicts on a PPO run: what is wrong, the numbers that show it, and the recipe keys that mend it.

`Health.check` takes the row of metrics of each update; the checks see the first few and the last few rows. A threshold
without a source is a choice of ours: far enough outside what sound runs show to be worth a person's time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from pipeline.recipe import PpoSection

Row = Mapping[str, float]

PATIENCE = 3
"""Updates in a row that must show a fault where a single update may show it by chance."""
WINDOW = 10
"""Updates that the slow faults must last; also how many rows are kept."""
RATIO_TOLERANCE = 0.01
FIRST_APPROX_KL = 1e-3
"""The first ratio must be 1 (vwxyzjn/summarize_from_feedback_details) but for rounding. Its mean is blind: whatever
the new policy is, the ratio's expectation over the old one's samples is 1. 1e-3 is a root mean square of 0.045 nats per
token, above bfloat16's 0.01 to 0.02, below what dropout of 0.1 does."""
PROBABILITY_GAP = 0.01
"""verl's rule for the mean |probability difference| of rollout engine and trainer: below 0.005 fine, above 0.01 a
fault of the engine."""
NEGATIVE_KL_ERRORS = 5.0
NEGATIVE_KL = 0.01
"""KL is never negative, its k1 estimate only by sampling noise; five standard errors of the batch mean are not noise,
even with the fat tails of a batch of eight. Rounding stays below 0.01 nats per sequence."""
KL_TARGETS = 3.0
"""Multiples of `kl_target_per_sequence`: the controller, which raises kl_coef by at most 20% per horizon, has lost."""
KL_PER_TOKEN = 2.0
"""Nats per response token, where no target is set: each token is on average e^2 = 7 times likelier than under the
reference; the demo's sound runs end near 1."""
CLIPFRAC_HIGH = 0.3
"""Share of tokens whose gradient is clipped away; sound runs show 0.01 to 0.2 (the demo 0.23 in its first update)."""
CLIPFRAC_LOW = 1e-3
WARM_UP = 10
UNEXPLAINED = 5
"""Updates in which a critic may explain nothing, as it starts as the reward model and knows complete answers only; and
updates in a row after those, since a critic near 0 falls below it by chance every other time."""
EOS_RATE = 0.01
EMPTY_LENGTH = 1.1
ENDED_RATE = 0.5
"""Mean response tokens, EOS included, and share of responses with one: 1 is a response of nothing but its EOS."""
ENTROPY_SHARE = 0.25
"""Of the first updates' entropy; the demo's policy, whose score rises by 2.4 standard deviations, keeps 0.6."""
LENGTH_FACTOR = 2.0
"""Of the first updates' length; Singhal et al. 2023 (arXiv:2310.03716) find growing length behind most of the reward
that PPO gains."""
IDENTICAL_KL = 0.01
"""Nats per sequence. By Pinsker's inequality the two policies then differ in at most sqrt(0.01 / 2) = 7% of
responses."""
VALUE_CLIPS = 10.0
"""Multiples of `cliprange_value` that the critic is off: it moves by one of them per update at most, and the returns
move on meanwhile."""

REFERENCE_SCALE = "Raise ppo.kl_coef, set ppo.kl_target_per_sequence, or lower ppo.learning_rate."


class Finding(NamedTuple):
    """What a check found: the cause with its numbers, and the mend."""

    cause: str
    mend: str


@dataclass(frozen=True)
class Verdict:
    """One fault of a run, at the update where it first showed.

    Attributes:
        severity: `warning` lets the run go on; `stop` ends it, with its state saved.
    """

    name: str
    update: int
    severity: Literal["warning", "stop"]
    cause: str
    mend: str

    def __str__(self) -> str:
        return f"health, update {self.update}: {self.name}: {self.cause} {self.mend}"


@dataclass
class History:
    """The rows that checks look at: the first `PATIENCE` and the last `WINDOW` of `updates` so far."""

    first: list[Row] = field(default_factory=list)
    recent: list[Row] = field(default_factory=list)
    updates: int = 0

    def add(self, row: Row) -> None:
        """Takes the row of the next update."""
        self.first = [*self.first, row][:PATIENCE]
        self.recent = [*self.recent, row][-WINDOW:]
        self.updates += 1

    def now(self, key: str) -> float:
        """The newest value."""
        return self.recent[-1][key]

    def start(self, key: str) -> float:
        """Mean of the first `PATIENCE` updates."""
        return sum(row[key] for row in self.first) / len(self.first)

    def lately(self, key: str, count: int = PATIENCE) -> float:
        """Mean of the last `count` updates, of those there are."""
        return sum(row[key] for row in self.recent[-count:]) / len(self.recent[-count:])

    def lasts(self, shows: Callable[[Row], bool], count: int = PATIENCE) -> bool:
        """Whether each of the last `count` updates shows it; no before there are so many."""
        return len(self.recent) >= count and all(shows(row) for row in self.recent[-count:])


Check = Callable[[History, PpoSection], Finding | None]


def skipped_steps(history: History, ppo: PpoSection) -> Finding | None:
    """More optimiser steps than allowed had a loss or gradient that is not finite."""
    skipped = int(history.now("policy/skipped_steps"))
    if skipped <= ppo.max_skipped_steps:
        return None
    return Finding(
        f"{skipped} optimiser steps were skipped because their loss or gradient is not finite "
        f"(ppo.max_skipped_steps is {ppo.max_skipped_steps}); log.txt names their rows.",
        "Look at those rows; lower ppo.learning_rate and ppo.critic_learning_rate, or set model.dtype: float32, and "
        "start again with --overwrite. A higher ppo.max_skipped_steps goes on from the saved state.",
    )


def first_ratio(history: History, ppo: PpoSection) -> Finding | None:
    """The policy that learns is not the policy that old_logprobs were computed with."""
    ratio, approx_kl = history.now("val/ratio_first"), history.now("policy/approxkl_first")
    if abs(ratio - 1.0) <= RATIO_TOLERANCE and approx_kl <= FIRST_APPROX_KL:
        return None
    return Finding(
        f"before any step the ratio of new to old policy is {ratio:.4f} on average and the log-probabilities differ by "
        f"{(2.0 * approx_kl) ** 0.5:.2g} nats (root mean square); they must be 1 and 0. The model computes something "
        "else in training than in evaluation (dropout, batch statistics, coarse rounding).",
        "Set model.dtype: float32; if that does not help, use another architecture for ppo.policy.",
    )


def engine_gap(history: History, ppo: PpoSection) -> Finding | None:
    """The rollout engine samples from another policy than the trainer's; older weights on purpose are no fault."""
    gap = history.now("rollout/mean_probability_gap")
    if gap <= PROBABILITY_GAP or history.now("rollout/staleness") > 0:
        return None
    return Finding(
        f"the token probabilities of rollout engine and trainer differ by {gap:.3g} on average (rounding explains "
        f"0.005): responses are not samples of the policy that learns from them.",
        "Set rollout.engine: transformers, or model.dtype: float32 and a small rollout.logprob_tolerance, which stops "
        "at the first stale weight.",
    )


def negative_kl(history: History, ppo: PpoSection) -> Finding | None:
    """The mean of k1 lies further below zero than noise can take it."""
    kl, error = history.now("objective/kl"), history.now("objective/kl_error")
    if not kl < -max(NEGATIVE_KL_ERRORS * error, NEGATIVE_KL):
        return None
    return Finding(
        f"the KL to the reference is {kl:.3g} nats per sequence with a standard error of {error:.2g}, and no KL is "
        "negative: responses are not samples of the policy at rollout.temperature, and the penalty rewards that.",
        "Set rollout.engine: transformers, or rollout.temperature: 1.0.",
    )


def exploding_kl(history: History, ppo: PpoSection) -> Finding | None:
    """The policy runs away from the reference."""
    target = ppo.kl_target_per_sequence
    limit = KL_PER_TOKEN * history.lately("response/length") if target is None else KL_TARGETS * target
    kl = history.lately("objective/kl")
    if not kl > limit:
        return None
    set_by = f"{KL_PER_TOKEN:g} per token" if target is None else f"{KL_TARGETS:g} x ppo.kl_target_per_sequence"
    return Finding(
        f"the KL to the reference is {kl:.3g} nats per sequence, above {limit:.3g} ({set_by}): scores now come from "
        "text that the reward model was never trained on.",
        REFERENCE_SCALE,
    )


def clipfrac_high(history: History, ppo: PpoSection) -> Finding | None:
    """Most of each rollout batch is spent: its ratios lie outside the clip range."""
    if not history.lasts(lambda row: row["policy/clipfrac_avg"] > CLIPFRAC_HIGH):
        return None
    return Finding(
        f"{history.lately('policy/clipfrac_avg'):.0%} of the tokens were clipped in the last {PATIENCE} updates: the "
        "policy moves too far per update.",
        "Lower ppo.learning_rate, ppo.num_ppo_epochs or ppo.num_minibatches.",
    )


def clipfrac_low(history: History, ppo: PpoSection) -> Finding | None:
    """The policy hardly moves, while the schedule still has most of its learning rate."""
    steps = ppo.num_ppo_epochs * ppo.num_minibatches
    moving = history.now("lr/policy") >= 0.5 * ppo.learning_rate
    still = history.lasts(lambda row: row["policy/clipfrac_avg"] < CLIPFRAC_LOW, WINDOW)
    if steps == 1 or history.updates < ppo.critic_warmup_updates + WINDOW or not moving or not still:
        return None
    return Finding(
        f"no more than {CLIPFRAC_LOW:.1%} of the tokens reached the clip range in any of the last {WINDOW} updates of "
        f"{steps} steps: the policy hardly moves.",
        "Raise ppo.learning_rate or ppo.num_ppo_epochs.",
    )


def explained_variance(history: History, ppo: PpoSection) -> Finding | None:
    """The critic is worse than a constant."""
    below = history.lasts(lambda row: row["val/explained_variance"] < 0.0, UNEXPLAINED)
    if history.updates < WARM_UP + UNEXPLAINED or not below:
        return None
    return Finding(
        f"the critic explains {history.lately('val/explained_variance', UNEXPLAINED):.2f} of the returns' variance in "
        f"the last {UNEXPLAINED} updates; below 0 it is worse than a constant and adds noise to every advantage.",
        "Raise ppo.critic_learning_rate or ppo.num_ppo_epochs, widen ppo.cliprange_value, or set ppo.critic_head: "
        "zero.",
    )


def all_truncated(history: History, ppo: PpoSection) -> Finding | None:
    """No response ends by itself."""
    if not history.lasts(lambda row: row["response/eos_rate"] <= EOS_RATE):
        return None
    return Finding(
        f"{history.lately('response/eos_rate'):.1%} of the responses ended by themselves in the last {PATIENCE} "
        f"updates, the others were cut at {history.lately('response/length'):.0f} tokens on average.",
        "Raise data.max_response_tokens or ppo.missing_eos_penalty; see that the demonstrations of data.sft end.",
    )


def all_empty(history: History, ppo: PpoSection) -> Finding | None:
    """The policy answers with its EOS alone."""
    if not history.lasts(lambda row: row["response/length"] <= EMPTY_LENGTH and row["response/eos_rate"] >= ENDED_RATE):
        return None
    return Finding(
        f"responses have {history.lately('response/length'):.2f} tokens on average, EOS included, in the last "
        f"{PATIENCE} updates: the policy says nothing.",
        "Lower ppo.missing_eos_penalty or ppo.learning_rate, raise ppo.kl_coef; see whether the reward model prefers "
        "short answers (eval/score_length_spearman of the rm stage).",
    )


def entropy_collapse(history: History, ppo: PpoSection) -> Finding | None:
    """The policy became all but deterministic."""
    start, now = history.start("policy/entropy_avg"), history.lately("policy/entropy_avg")
    if not now < ENTROPY_SHARE * start:
        return None
    return Finding(
        f"the entropy per token fell from {start:.3g} to {now:.3g} nats: all responses are becoming the same.",
        REFERENCE_SCALE,
    )


def length_hacking(history: History, ppo: PpoSection) -> Finding | None:
    """The score rises while the length explodes."""
    length = history.start("response/length"), history.lately("response/length")
    score = history.start("objective/scores"), history.lately("objective/scores")
    if not (length[1] > LENGTH_FACTOR * length[0] and score[1] > score[0]):
        return None
    return Finding(
        f"the score rose from {score[0]:.2f} to {score[1]:.2f} while responses grew from {length[0]:.0f} to "
        f"{length[1]:.0f} tokens: the reward model pays for length.",
        "Look at eval/score_length_spearman of the rm stage and train it on preferences that do not favour length; "
        "lower data.max_response_tokens or raise ppo.kl_coef.",
    )


def value_clip(history: History, ppo: PpoSection) -> Finding | None:
    """The critic's error is many times what it may move in an update."""
    clip = ppo.cliprange_value
    if clip is None or not history.lasts(lambda row: _critic_error(row) > VALUE_CLIPS * clip):
        return None
    return Finding(
        f"returns vary by {history.now('val/returns_std'):.3g} and the critic misses them by "
        f"{_critic_error(history.recent[-1]):.3g} (standard deviations), but ppo.cliprange_value lets it move by "
        f"{clip:g} per update: it cannot follow.",
        "Set ppo.cliprange_value: null or near the returns' spread, or a smaller ppo.score_clip.",
    )


def identical(history: History) -> Finding | None:
    """The finished policy is the one that the run started from."""
    kl = history.lately("objective/kl", WINDOW)
    if not kl < IDENTICAL_KL:
        return None
    return Finding(
        f"at the end the KL to the reference is {kl:.2g} nats per sequence: the policy is still the one that PPO "
        "started from.",
        "Raise ppo.learning_rate or ppo.updates, or lower ppo.kl_coef.",
    )


def _critic_error(row: Row) -> float:
    """Standard deviation of returns - values: sqrt((1 - explained variance) Var(returns)); 0 where that is 0."""
    return row["val/returns_std"] * max(0.0, 1.0 - row["val/explained_variance"]) ** 0.5


CHECKS: tuple[Check, ...] = (
    first_ratio,
    engine_gap,
    negative_kl,
    exploding_kl,
    clipfrac_high,
    clipfrac_low,
    explained_variance,
    all_truncated,
    all_empty,
    entropy_collapse,
    length_hacking,
    value_clip,
)


class Health:
    """Checks every update of a run; each warning is given once, at the update where the fault first shows.

    Attributes:
        verdicts: all so far.
    """

    def __init__(self, ppo: PpoSection) -> None:
        self.verdicts: list[Verdict] = []
        self._ppo = ppo
        self._history = History()

    def check(self, update: int, row: Row) -> list[Verdict]:
        """The new verdicts of update `update`, whose metrics are `row`."""
        self._history.add({key: row[key] for key in _KEYS})
        found = {check.__name__: check(self._history, self._ppo) for check in CHECKS}
        new = self._new(update, found)
        finding = skipped_steps(self._history, self._ppo)
        if finding is not None:
            new.append(Verdict("skipped_steps", update, "stop", *finding))
        self.verdicts += new
        return new

    def finish(self, update: int) -> list[Verdict]:
        """The verdicts on the run as a whole, after its last update."""
        new = self._new(update, {identical.__name__: identical(self._history)})
        self.verdicts += new
        return new

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to say what the uninterrupted one says."""
        return {**asdict(self._history), "verdicts": [asdict(verdict) for verdict in self.verdicts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._history = History(list(state["first"]), list(state["recent"]), state["updates"])
        self.verdicts = [Verdict(**verdict) for verdict in state["verdicts"]]

    def _new(self, update: int, found: Mapping[str, Finding | None]) -> list[Verdict]:
        said = {verdict.name for verdict in self.verdicts}
        return [
            Verdict(name, update, "warning", *finding)
            for name, finding in found.items()
            if finding is not None and name not in said
        ]


_KEYS = (
    "lr/policy",
    "objective/kl",
    "objective/kl_error",
    "objective/scores",
    "policy/approxkl_first",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "policy/skipped_steps",
    "response/eos_rate",
    "response/length",
    "rollout/mean_probability_gap",
    "rollout/staleness",
    "val/explained_variance",
    "val/ratio_first",
    "val/returns_std",
)
