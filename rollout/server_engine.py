"""Rollouts by a vLLM server that `tristage serve` started, on this machine or another.

Token ids go to the server and come back as they are; seeds travel with the prompts, so that a request that is sent
again, to a server that was restarted in the meantime, gives the same response. Weights go through files that trainer
and server both see. The server labels every response with the weights that sampled it; the label is made of the engine
and the version, and responses with another one are thrown away and sampled again with the right weights.

There is no other way for weights than files: vLLM's transfer by NCCL, and TRL's client of it, work between CUDA devices
only and cannot be tested where there are none.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipeline.recipe_rollout import ServerSection
from rollout.batch import Completion
from rollout.engine import EngineOptions, SamplingOptions, check_model_dir, check_request
from rollout.server_client import RolloutServerError, ServerClient, ServerDown
from rollout.weight_files import SHARD_BYTES, WeightsPlace, write_weights

T = TypeVar("T")
RECEIVER = "rollout.server_worker.WeightReceiver"
UNFINISHED = "unfinished"
"""Label while weights are being replaced."""
TIED_HEAD = "lm_head.weight"
KEPT_VERSIONS = 2
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
VISIBLE_SECONDS = 60.0
"""How long files may take to appear on the server's machine."""
FOREIGN_ROUNDS = 5
"""Rounds in which another program has changed the server's weights before this one gives up."""
LOWEST_LOGPROB = -9999.0
"""What vLLM's server sends in place of minus infinity and NaN."""


class ServerEngine:
    """The policy's copy in a vLLM server; this process alone loads weights into it.

    Args:
        model_dir: checkpoint directory, which the server sees too: its weights are version 0.
        options: see `EngineOptions`; the server must have been started for the same.
        settings: address and patience.
        weights_dir: for weights on their way to the server, of this engine and others; made when needed. `close`
            removes the engine's own part, and the directory where no other engine uses it.
        notify: receives one line when the server is waited for, and when its weights had to be loaded again.

    Raises:
        RolloutServerError: no server within `patience_seconds`, or one that was started otherwise or serves a model of
            another shape.
    """

    name = "vllm server"

    def __init__(
        self,
        model_dir: str | Path,
        options: EngineOptions,
        settings: ServerSection,
        weights_dir: Path,
        notify: Callable[[str], None],
    ) -> None:
        directory = check_model_dir(model_dir, options.max_model_len).resolve()
        self.policy_version = 0
        self._options = options
        self._settings = settings
        self._weights_dir = weights_dir.resolve()
        self._place: WeightsPlace | None = None
        self._notify = notify
        self._token = uuid.uuid4().hex[:12]
        self._unusable: str | None = None
        self._current = directory
        self._written: list[Path] = []
        self._random = random.Random()  # pauses must not move the generators that a run is seeded with
        self._worked = time.monotonic()
        self._client = ServerClient(settings)
        try:
            self.version = str(self._patiently(lambda: self._client.get("/version"))["version"])
            self._shapes, self._vocab_size = self._patiently(self._checked_model)
            self._patiently(self._hand_over)
        except (TypeError, KeyError) as error:
            raise self._client.unreadable("/version", error) from error

    # Sampling

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingOptions, seeds: Sequence[int]
    ) -> list[Completion]:
        """See `RolloutEngine.generate`.

        Raises:
            RolloutServerError: the server did not come back within `patience_seconds`, refuses the requests, or
                another program keeps loading weights into it.
        """
        self._refuse_unusable()
        check_request(prompts, seeds, self._options.max_model_len - sampling.max_new_tokens, self._vocab_size)
        bodies = [self._body(prompt, sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        found: dict[int, Completion] = {}
        foreign = 0
        while len(found) < len(bodies):
            before = len(found)
            self._patiently(lambda: self._round(bodies, found))
            foreign = foreign + 1 if len(found) == before else 0
            if foreign == FOREIGN_ROUNDS:
                raise RolloutServerError(
                    f"rollout.server.url: another program loads weights into {self._client.url} again and again.",
                    mend="Start a server of its own for each run.",
                )
        return [found[index] for index in range(len(bodies))]

    def _round(self, bodies: Sequence[dict[str, Any]], found: dict[int, Completion]) -> None:
        """Asks for what is not `found` yet, and keeps what was sampled by the current weights.

        Raises ServerDown where a request failed.
        """
        if self._label_there() != self._label:
            self._notify(f"the rollout server does not hold weights {self.policy_version}: loading them again")
            self._hand_over()
        missing = [index for index in range(len(bodies)) if index not in found]
        failures: list[ServerDown] = []

        async def ask() -> None:
            asked = [bodies[index] for index in missing]
            async for place, answer in self._client.post_all(_GENERATE, asked, self._options.max_sequences):
                if isinstance(answer, ServerDown):
                    failures.append(answer)
                    continue
                completion = self._completion(answer)
                if completion is not None:
                    found[missing[place]] = completion
                    self._worked = time.monotonic()

        asyncio.run(ask())
        if failures:
            raise failures[0]

    def _body(self, prompt: Sequence[int], sampling: SamplingOptions, seed: int) -> dict[str, Any]:
        """Plain sampling: nothing of the model directory's generation_config takes part."""
        parameters = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": int(seed),
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "ignore_eos": True,
            "stop_token_ids": list(self._options.stop_token_ids),
            "logprobs": 0,
            "detokenize": False,
        }
        return {"token_ids": [int(token) for token in prompt], "sampling_params": parameters}

    def _completion(self, answer: Any) -> Completion | None:
        """The response; None where it was broken off or sampled, if only in part, by other weights."""
        try:
            (choice,) = answer["choices"]
            token_ids = tuple(int(token) for token in choice["token_ids"])
            logprobs = tuple(float(entry["logprob"]) for entry in choice["logprobs"]["content"])
            labels = {span["version"] for span in choice["weight_versions"] or ()}
            aborted = choice["finish_reason"] == "abort"
        except (TypeError, KeyError, ValueError):
            raise self._client.unreadable(_GENERATE, answer) from None
        if aborted or labels != {self._label} or not token_ids:
            return None
        finite = tuple(value if value > LOWEST_LOGPROB else math.nan for value in logprobs)
        return Completion(token_ids, finite, token_ids[-1] in self._options.stop_token_ids, self.policy_version)

    # Weights

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]], *, version: int | None = None) -> None:
        """See `RolloutEngine.load_weights`: through files, of which the two newest versions are kept.

        Raises:
            RolloutServerError: the server does not see the files, or did not come back within `patience_seconds`.
            OSError: the disk is full or forbidden.
        """
        if self._unusable == _CLOSED:
            raise RuntimeError(f"the engine cannot load weights: {_CLOSED}")
        self._unusable = "its last weight update failed half-way"
        version = self.policy_version + 1 if version is None else version
        if self._place is None:
            self._place = WeightsPlace(self._weights_dir, self._token)
        directory = self._place.directory / f"version-{version}"
        given: set[str] = set()
        write_weights(self._checked(named, given), directory, getattr(torch, self._options.dtype), SHARD_BYTES)
        missing = sorted(self._shapes.keys() - given)
        if missing:
            shutil.rmtree(directory)
            raise ValueError(f"{len(missing)} weights were not given to load_weights, first {missing[0]!r}")
        self._written = [*(path for path in self._written if path != directory), directory]
        self._current, self.policy_version = directory, version
        self._unusable = None
        self._worked = time.monotonic()
        self._patiently(self._hand_over)
        for path in self._written[:-KEPT_VERSIONS]:
            shutil.rmtree(path, ignore_errors=True)
        self._written = self._written[-KEPT_VERSIONS:]

    def rest(self) -> None:
        """Nothing: the server has a device of its own."""

    def close(self) -> None:
        """See `RolloutEngine.close`; the server goes on with the weights it has."""
        if self._unusable != _CLOSED:
            self._unusable = _CLOSED
            self._client.close()
            if self._place is not None:
                self._place.remove()

    @property
    def _label(self) -> str:
        return f"{self._token}/{self.policy_version}"

    def _label_there(self) -> str:
        answer = self._client.get("/weight_info")
        try:
            return str(answer["weight_version"])
        except (TypeError, KeyError):
            raise self._client.unreadable("/weight_info", answer) from None

    def _hand_over(self) -> None:
        """Makes the server load the current weights: requests that run end first, new ones wait.

        The label says "unfinished" meanwhile, so that a failure at any point leaves nothing that passes for current.
        """
        self._client.post("/pause", mode="wait")
        try:
            self._client.post("/update_weight_version", {"new_version": UNFINISHED})
            self._receive()
            if self._client.post("/reset_prefix_cache") != {"success": True}:
                raise ServerDown("kept its prefix cache: requests are still in flight")
            self._client.post("/update_weight_version", {"new_version": self._label})
        except BaseException:
            with contextlib.suppress(ServerDown):
                self._client.post("/resume")
            raise
        self._client.post("/resume")

    def _receive(self) -> None:
        deadline = time.monotonic() + min(VISIBLE_SECONDS, self._settings.patience_seconds)
        while True:
            answer = self._client.rpc("receive_weights", str(self._current))
            if answer["error"] is None:
                return
            if not answer["passing"] or time.monotonic() > deadline:
                raise RolloutServerError(
                    f"the rollout server at {self._client.url} refuses the weights: {answer['error']}.",
                    mend="Serve a checkpoint of the same model, and let the run's directory or rollout.server."
                    "weights_dir lie where the trainer and the server see the same files under the same path.",
                )
            time.sleep(FIRST_PAUSE_SECONDS)

    def _checked(
        self, named: Iterable[tuple[str, torch.Tensor]], given: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass the model's weights on and note their names in `given`; a tied head goes with the embedding."""
        for name, tensor in named:
            if name not in self._shapes:
                if name == TIED_HEAD:
                    continue
                raise ValueError(f"the model has no weight named {name!r}")
            if tuple(tensor.shape) != self._shapes[name]:
                raise ValueError(
                    f"weight {name!r} has shape {tuple(tensor.shape)}, but the model's has {self._shapes[name]}"
                )
            given.add(name)
            yield name, tensor

    # The server

    def _checked_model(self) -> tuple[dict[str, tuple[int, ...]], int]:
        """Shapes of the server's weights and size of its vocabulary, once it is known to answer as is needed.

        Whether it has `RECEIVER` is asked first: a call that its worker does not know would end the server.
        """
        info = self._client.get("/server_info?config_format=json")
        try:
            receiver = info["vllm_config"]["parallel_config"]["worker_extension_cls"]
        except (TypeError, KeyError):
            raise self._client.unreadable("/server_info", info) from None
        if receiver != RECEIVER:
            raise RolloutServerError(
                f"rollout.server.url: the server at {self._client.url} was not started by `tristage serve`.",
                mend=f"{self._client.start}.",
            )
        model = self._client.rpc("describe_model")
        wanted = {"logprobs_mode": "processed_logprobs", "dtype": self._options.dtype}
        for key, value in wanted.items():
            if model[key] != value:
                raise self._other(f"has {key} {model[key]}, but {value} is needed")
        if model["max_model_len"] < self._options.max_model_len:
            raise self._other(f"takes {model['max_model_len']} tokens, but {self._options.max_model_len} are needed")
        return {name: tuple(shape) for name, shape in model["weights"].items()}, int(model["vocab_size"])

    def _other(self, difference: str) -> RolloutServerError:
        return RolloutServerError(
            f"rollout.server.url: the server at {self._client.url} {difference}.",
            mend="Start it again with `tristage serve` and this recipe.",
        )

    def _patiently(self, act: Callable[[], T]) -> T:
        """Does it again while the server is down, with growing pauses, for `patience_seconds` without a response.

        Raises:
            RolloutServerError: it stays down.
        """
        self._worked = time.monotonic()
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return act()
            except ServerDown as error:
                waited = time.monotonic() - self._worked
                if waited + pause > self._settings.patience_seconds:
                    raise RolloutServerError(
                        f"rollout.server.url: the server at {self._client.url} {error}; it was waited for "
                        f"{waited:.0f} seconds (rollout.server.patience_seconds).",
                        mend=f"{self._client.start}, see in its output why it went away, and run the same command "
                        "again.",
                    ) from error
                if pause == FIRST_PAUSE_SECONDS:
                    self._notify(f"the rollout server at {self._client.url} {error}: waiting for it")
                time.sleep(pause * self._random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _refuse_unusable(self) -> None:
        if self._unusable is not None:
            raise RuntimeError(f"the engine cannot generate: {self._unusable}")


_GENERATE = "/inference/v1/generate"
_CLOSED = "it is closed"
