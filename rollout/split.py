"""One rollout by several processes: each samples its share, or the first asks a server for all; all get everything.

What fails on one process fails on all of them with the same words, instead of leaving the others waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from pipeline.errors import UserError
from pipeline.ranks import Ranks
from rollout.batch import Completion
from rollout.engine import RolloutEngine, SamplingOptions, one_line
from rollout.server_client import RolloutServerError

T = TypeVar("T")
Named = Iterable[tuple[str, torch.Tensor]]


class SplitEngine:
    """An engine on every rank, each of which samples its part of the prompts; see `RolloutEngine`.

    All ranks call every method but `rest` and `close` together, with the same arguments.

    Attributes:
        seconds: wall seconds that this rank's own engine took in the last `generate`, waiting for others excluded.
    """

    def __init__(self, engine: RolloutEngine, ranks: Ranks) -> None:
        self.engine = engine
        self.ranks = ranks
        self.seconds = 0.0
        self.name = engine.name
        self.version = engine.version

    @property
    def policy_version(self) -> int:
        """The engine's."""
        return self.engine.policy_version

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingOptions, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order, on every rank."""
        own = self.ranks.share(range(len(prompts)))

        def sample() -> list[Completion]:
            if len(prompts) != len(seeds):
                raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
            if not own:
                return []
            return self.engine.generate([prompts[row] for row in own], sampling, [seeds[row] for row in own])

        start = time.perf_counter()
        outcome = _tried(sample)
        self.seconds = time.perf_counter() - start
        parts = _all_or_error(self.ranks, outcome)
        return joined(parts, len(prompts))

    def load_weights(self, named: Named, *, version: int | None = None) -> None:
        """Into every rank's engine."""
        everywhere(self.ranks, lambda: _load(self.engine, named, version))

    def rest(self) -> None:
        """Of this rank's engine."""
        self.engine.rest()

    def close(self) -> None:
        """Of this rank's engine."""
        self.engine.close()


class SharedEngine:
    """One engine for all ranks, a server's: the first rank talks to it and tells the others; see `RolloutEngine`.

    All ranks call every method but `rest` and `close` together, with the same arguments. The first rank's time with the
    server counts as waiting (`Ranks.waited`), as the others' does: it is not slower than they are.

    Args:
        engine: None on all ranks but the first.

    Attributes:
        seconds: wall seconds of the last `generate` or `start` on the first rank; 0 on the others.
    """

    def __init__(self, engine: RolloutEngine | None, ranks: Ranks) -> None:
        self.engine = engine
        self.ranks = ranks
        self.seconds = 0.0
        known = None if engine is None else (engine.name, engine.version, engine.policy_version)
        facts = ranks.broadcast(known)
        assert facts is not None
        self.name, self.version, self.policy_version = facts
        self._started: _Sampling | None = None

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingOptions, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order, on every rank."""
        return self.start(prompts, sampling, seeds)()

    def start(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingOptions, seeds: Sequence[int]
    ) -> Callable[[], list[Completion]]:
        """Begins `generate` and returns at once; what it returns waits for the completions, on all ranks together.

        No weights are loaded and nothing else is started before that.
        """
        self._refuse_while_sampling()
        started = _Sampling(self.engine, prompts, sampling, seeds)
        self._started = started

        def wait() -> list[Completion]:
            with _waiting(self.ranks):
                outcome = started.wait()
            self._started = None
            self.seconds = started.seconds
            return _all_or_error(self.ranks, outcome)[0]

        return wait

    def load_weights(self, named: Named, *, version: int | None = None) -> None:
        """Into the server; the other ranks go through the weights too, since gathering them may take all ranks."""
        self._refuse_while_sampling()

        def load() -> None:
            with _waiting(self.ranks):
                _load(self.engine, named, version)

        everywhere(self.ranks, load)
        self.policy_version = self.policy_version + 1 if version is None else version

    def rest(self) -> None:
        """Nothing: the server has a device of its own."""

    def close(self) -> None:
        """Of the engine."""
        if self.engine is not None:
            self.engine.close()

    def _refuse_while_sampling(self) -> None:
        if self._started is not None:
            raise RuntimeError("the responses that were started must be waited for first")


def start(
    engine: RolloutEngine, prompts: Sequence[Sequence[int]], sampling: SamplingOptions, seeds: Sequence[int]
) -> Callable[[], list[Completion]]:
    """Begins `generate` where the engine is a server, and does it all at once where it is not; see `SharedEngine`."""
    if isinstance(engine, SharedEngine):
        return engine.start(prompts, sampling, seeds)
    completions = engine.generate(prompts, sampling, seeds)
    return lambda: completions


def joined(parts: Sequence[Sequence[T]], size: int) -> list[T]:
    """The `size` rows of all ranks in order, of which rank r holds every world-th from r on (`Ranks.share`).

    Raises:
        ValueError: a rank holds more or fewer rows than its share.
    """
    rows: dict[int, T] = {}
    for rank, part in enumerate(parts):
        rows.update(zip(range(rank, size, len(parts)), part, strict=True))
    return [rows[row] for row in range(size)]


def everywhere(ranks: Ranks, act: Callable[[], T]) -> T:
    """What `act` returns on this rank; where it fails on one, the same error on all.

    Raises:
        UserError, RuntimeError: naming the first rank on which it failed. With one process, what `act` raises.
    """
    outcome = _tried(act)
    _all_or_error(ranks, _Outcome(None, outcome.error))
    return outcome.value  # pyright: ignore[reportReturnType]  (there is no error)


# Outcomes


@dataclass(frozen=True)
class _Outcome:
    value: Any
    error: Exception | None = None

    @property
    def told(self) -> tuple[type[Exception], str, str] | None:
        """The error as it is told to the other ranks: its class, message and mend."""
        if self.error is None:
            return None
        if isinstance(self.error, UserError):
            kind = RolloutServerError if isinstance(self.error, RolloutServerError) else UserError
            return kind, self.error.message, self.error.mend
        return RuntimeError, f"{type(self.error).__name__}: {one_line(self.error)}", ""


def _tried(act: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(act())
    except Exception as error:  # noqa: BLE001 raised by _all_or_error, on every rank
        return _Outcome(None, error)


def _all_or_error(ranks: Ranks, outcome: _Outcome) -> list[Any]:
    """Every rank's value; or the error of the first rank that has one, on all ranks."""
    if ranks.world == 1:
        if outcome.error is not None:
            raise outcome.error
        return [outcome.value]
    gathered = ranks.gather((outcome.told, outcome.value))
    for rank, (told, _) in enumerate(gathered):
        if told is not None:
            kind, message, mend = told
            text = f"rank {rank}: {message}"
            raise (kind(text, mend=mend) if issubclass(kind, UserError) else kind(text)) from outcome.error
    return [value for _, value in gathered]


def _load(engine: RolloutEngine | None, named: Named, version: int | None) -> None:
    """Loads, and goes through all of `named` whatever happens: making them is a collective that others wait in."""
    weights = iter(named)
    try:
        if engine is not None:
            engine.load_weights(weights, version=version)
    finally:
        _drain(weights)


@contextmanager
def _waiting(ranks: Ranks) -> Iterator[None]:
    """Counts all that happens inside as waiting."""
    start, before = time.perf_counter(), ranks.waited.seconds
    try:
        yield
    finally:
        ranks.waited.seconds = before + time.perf_counter() - start


def _drain(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    for _ in weights:
        pass


class _Sampling:
    """A `generate` in a thread of its own, which ends with the process; none where there is no engine."""

    def __init__(
        self,
        engine: RolloutEngine | None,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingOptions,
        seeds: Sequence[int],
    ) -> None:
        self.seconds = 0.0
        self._outcome = _Outcome(None)
        self._thread = None
        if engine is not None:
            arguments = (engine, prompts, sampling, seeds)
            self._thread = threading.Thread(target=self._run, args=arguments, daemon=True)
            self._thread.start()

    def wait(self) -> _Outcome:
        if self._thread is not None:
            self._thread.join()
        return self._outcome

    def _run(
        self,
        engine: RolloutEngine,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingOptions,
        seeds: Sequence[int],
    ) -> None:
        start = time.perf_counter()
        self._outcome = _tried(lambda: engine.generate(prompts, sampling, seeds))
        self.seconds = time.perf_counter() - start
