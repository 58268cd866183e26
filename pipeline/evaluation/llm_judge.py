"""A language model as the judge: asked in both orders, its answers kept, its costs and its position bias counted.

Every contest is asked twice, with either answer shown first, and the outcome is the mean of the two verdicts; so a
judge that goes by position comes out at a tie (Zheng et al. 2023, "Judging LLM-as-a-Judge", section 3.4, call for the
same two questions). Two equal answers are a tie that nobody is asked about. An answer without a verdict is told so and
asked again in the same conversation; a contest that stays without one, or is too long for the model, has no outcome.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.chat_client import ChatClient, TooLong
from pipeline.evaluation.contests import EQUAL, Contest, Decision, Selection
from pipeline.evaluation.judge_cache import AnswerCache, Reply, cache_key, open_cache
from pipeline.evaluation.judge_question import NOTE, VERDICTS, question, read_template, verdict
from pipeline.functions import EXCERPT, excerpt
from pipeline.recipe_judges import LlmJudge

HOPELESS = 20
"""Contests without a verdict, and none with one, after which a judge is given up."""
SAY_EVERY_SECONDS = 10.0
NO_VERDICT = "no verdict"
IS_TOO_LONG = "too long for the judge"
SEEN_FIRST = {"A": ("a", "b"), "B": ("b", "a"), "TIE": ("tie", "tie")}
"""Verdict -> the winner where `contest.a` was shown first, and where `contest.b` was."""
POINTS = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass
class _Asking:
    """What one call of `decide` works with."""

    client: ChatClient
    cache: AnswerCache
    contests: int
    locks: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    done: int = 0
    decided: int = 0
    undecided: int = 0
    too_long: int = 0
    last_answer: str = ""
    said_at: float = field(default_factory=time.monotonic)

    def count(self, decision: Decision) -> None:
        self.done += 1
        if decision.outcome is None:
            self.undecided += 1
            self.too_long += decision.reason == IS_TOO_LONG
        elif decision.reason != EQUAL:
            self.decided += 1


class ChatJudge:
    """Judge `eval.judges.<name>.llm`.

    Args:
        name: key of `eval.judges`.
        settings: of that section.
        folder: where `<name>.answers.jsonl` keeps its answers.
        say: shows a line of progress.
        backoff_seconds: see `ChatClient`.

    Errors:
        UserError: the template lacks a slot.
    """

    kind = "llm"

    def __init__(
        self,
        name: str,
        settings: LlmJudge,
        folder: Path,
        say: Callable[[str], None],
        backoff_seconds: float = 1.0,
    ) -> None:
        self.name = name
        self.about = f"{settings.model}, asked in both orders, by: {settings.criterion}"
        self.selection = Selection(settings.pairs, settings.prompts, settings.samples_per_prompt)
        self._settings = settings
        self._template = read_template(name, settings)
        self._file = folder / f"{name}.answers.jsonl"
        self._say = say
        self._backoff_seconds = backoff_seconds
        self._decisions: list[Decision] = []
        self._used: dict[str, Reply] = {}
        self._old: set[str] = set()
        self._sent = 0
        self._retried = 0

    def decide(self, contests: Sequence[Contest]) -> list[Decision]:
        """One decision per contest, in their order; answers in the cache are not asked for again.

        Ctrl-C ends it at once, and a failure too: every answer that came is in the cache by then.

        Errors:
            UserError: the server cannot be reached, refuses, or fails at every try; the judge comes to no verdict on
                any contest; the cache is damaged or in use.
        """
        with open_cache(self._file) as cache:
            decisions = asyncio.run(self._decide_all(contests, cache))
        self._decisions += decisions
        return decisions

    def details(self) -> dict[str, Any]:
        """What it is, and the counts of its decisions: contests, tokens and money as if all had been asked now."""
        asked = [decision for decision in self._decisions if decision.reason != EQUAL]
        return {
            "model": self._settings.model,
            "base_url": self._settings.base_url,
            "criterion": self._settings.criterion,
            "template_sha256": hashlib.sha256(self._template.encode()).hexdigest(),
            "temperature": self._settings.temperature,
            **vars(self.selection),
            "contests": len(self._decisions),
            "equal_answers": len(self._decisions) - len(asked),
            "undecided": sum(decision.outcome is None for decision in asked),
            "too_long": sum(decision.reason == IS_TOO_LONG for decision in asked),
            "position_bias": position_bias(self._decisions),
            **self._spent(self._used.values()),
        }

    def costs(self) -> dict[str, Any]:
        """Counts of what the decisions rest on, and under "now" of what this process sent and paid.

        `requests` are answers that the decisions use, each counted once, and `cached` those of them that an earlier
        process left. `now.requests` counts failed and repeated ones too.
        """
        cached = len(self._old)
        fresh = [reply for key, reply in self._used.items() if key not in self._old]
        now = {"requests": self._sent, "retries": self._retried, **self._spent(fresh)}
        return {
            "requests": len(self._used),
            "cached": cached,
            **self._spent(self._used.values()),
            "position_bias": position_bias(self._decisions),
            "now": now,
        }

    def _spent(self, replies: Iterable[Reply]) -> dict[str, Any]:
        """Tokens that the server counted, money at the recipe's prices, and answers whose tokens it did not tell."""
        replies = list(replies)
        asked = sum(reply.prompt_tokens or 0 for reply in replies)
        answered = sum(reply.completion_tokens or 0 for reply in replies)
        prices = (self._settings.price_per_million_input_tokens, self._settings.price_per_million_output_tokens)
        money = None if prices[0] is None or prices[1] is None else (asked * prices[0] + answered * prices[1]) / 1e6
        untold = sum(reply.prompt_tokens is None or reply.completion_tokens is None for reply in replies)
        return {"prompt_tokens": asked, "completion_tokens": answered, "money": money, "tokens_untold": untold}

    async def _decide_all(self, contests: Sequence[Contest], cache: AnswerCache) -> list[Decision]:
        decisions: dict[int, Decision] = {}
        waiting = iter(enumerate(contests))

        async def work(asking: _Asking) -> None:
            for index, contest in waiting:
                decisions[index] = await self._decide(contest, asking)
                asking.count(decisions[index])
                self._refuse_the_hopeless(asking)
                if time.monotonic() - asking.said_at > SAY_EVERY_SECONDS:
                    asking.said_at = time.monotonic()
                    self._say(f"judge {self.name}: {asking.done} of {asking.contests} contests")

        async with ChatClient(self.name, self._settings, self._backoff_seconds) as client:
            asking = _Asking(client, cache, len(contests))
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self._settings.concurrency, len(contests))):
                        group.create_task(work(asking))
            except ExceptionGroup as errors:  # the first cancels the others
                raise errors.exceptions[0] from None
            finally:
                self._sent += client.sent
                self._retried += client.retried
        return [decisions[index] for index in range(len(contests))]

    async def _decide(self, contest: Contest, asking: _Asking) -> Decision:
        if contest.response_a == contest.response_b:
            return Decision(contest, 0.5, reason=EQUAL)
        try:
            straight = await self._verdict(contest, "a", asking)
            swapped = None if straight is None else await self._verdict(contest, "b", asking)
        except TooLong:
            return Decision(contest, None, reason=IS_TOO_LONG)
        if straight is None or swapped is None:
            return Decision(contest, None, reason=NO_VERDICT)
        orders = (SEEN_FIRST[straight][0], SEEN_FIRST[swapped][1])
        return Decision(contest, (POINTS[orders[0]] + POINTS[orders[1]]) / 2, orders)

    async def _verdict(self, contest: Contest, first: str, asking: _Asking) -> str | None:
        """The verdict on the answers in the order shown; None when no try ends with one."""
        shown = (contest.response_a, contest.response_b)
        shown = shown if first == "a" else shown[::-1]
        asked = question(self._template, self._settings.criterion, contest.prompt, *shown)
        messages = [{"role": "user", "content": asked}]
        for tries in range(self._settings.retries + 1):
            try:
                reply = await self._answer(messages, {"contest": contest.id, "first": first}, asking)
            except TooLong:
                if tries:  # the question fitted, what was said since does not
                    return None
                raise
            cut = reply.finish == "length" and not self._settings.constrain
            found = None if cut else verdict(reply.text)
            if found is not None:
                return found
            asking.last_answer = reply.text
            messages += [
                {"role": "assistant", "content": reply.text.strip() or "(no answer)"},
                {"role": "user", "content": NOTE},
            ]
        return None

    async def _answer(self, messages: list[dict[str, str]], about: dict[str, str], asking: _Asking) -> Reply:
        request = self._request(messages)
        key = cache_key(self._settings.base_url, request)
        async with asking.locks[key]:  # the same question of two contests is asked once
            reply = asking.cache.get(key)
            if reply is None:
                reply = await asking.client.ask(request)
                asking.cache.put(key, reply, about)
            elif asking.cache.was_there(key) and key not in self._used:
                self._old.add(key)
            self._used[key] = reply
        return reply

    def _request(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        settings = self._settings
        request: dict[str, Any] = {"model": settings.model, "messages": list(messages)}
        if settings.temperature is not None:
            request["temperature"] = settings.temperature
        if settings.max_tokens is not None:
            request["max_tokens"] = settings.max_tokens
        if settings.constrain:
            request["structured_outputs"] = {"choice": list(VERDICTS)}
        return {**request, **settings.request}

    def _refuse_the_hopeless(self, asking: _Asking) -> None:
        """Ends the judge that decides nothing, before it has been paid for all the rest."""
        is_last = asking.done == asking.contests
        if asking.decided or not asking.undecided or not (is_last or asking.undecided >= HOPELESS):
            return
        last = f" The last answer that came ends in {excerpt(asking.last_answer[-EXCERPT:])}." * bool(
            asking.last_answer
        )
        raise UserError(
            f"eval.judges.{self.name}.llm: {self._settings.model} came to a verdict on none of "
            f"{asking.undecided} contests ({asking.too_long} of them too long for it).{last}",
            mend="Take a model that follows the template, raise max_tokens (lower it where the model's context is "
            "short), or set `constrain: true` on a vLLM server.",
        )


def position_bias(decisions: Iterable[Decision]) -> dict[str, float | int | None]:
    """How far a judge goes by the place of an answer, over the contests with a verdict in both orders.

    Returns:
        contests: their number C.
        first_in_both: share in which the answer shown first won in both orders.
        second_in_both: share in which the one shown second did.
        first_shown_wins: share of the 2C verdicts for the answer shown first, ties half; 0.5 is no bias.
        Shares are None where C is 0.
    """
    orders = [decision.orders for decision in decisions if decision.orders is not None]
    if not orders:
        return {"contests": 0, "first_in_both": None, "second_in_both": None, "first_shown_wins": None}
    wins = [POINTS[straight] + (1.0 - POINTS[swapped]) for straight, swapped in orders]
    return {
        "contests": len(orders),
        "first_in_both": orders.count(("a", "b")) / len(orders),
        "second_in_both": orders.count(("b", "a")) / len(orders),
        "first_shown_wins": sum(wins) / (2 * len(orders)),
    }
