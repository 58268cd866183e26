"""How responses are sampled: engine, temperature, stop texts."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from pipeline.recipe_base import Fraction, Positive, Section

_URL = r"^https?://([^/?#@\s]+@)?(\[[^/?#@\[\]\s]+\]|[^/?#@:\[\]\s]+)(:[0-9]+)?/?$"


class ServerSection(Section):
    """Where the server of `rollout.mode: server` is, and how long it is waited for."""

    url: Annotated[str, Field(pattern=_URL)] = "http://127.0.0.1:8000"
    """Address of a server that `tristage serve` started, without a path."""
    timeout_seconds: Positive = 600.0
    """Longest wait for one answer: a response of full length while the server is busy with all the others."""
    patience_seconds: Positive = 600.0
    """How long a server that does not answer is tried again, with growing pauses, before the stage ends with its state
    saved; a server that is starting counts."""
    options: tuple[str, ...] = ()
    """Further words for vLLM's server, such as [--tensor-parallel-size, "8"]; read by `tristage serve`."""
    weights_dir: str | None = None
    """Directory that the trainer and the server both see, for the weights on their way; null means
    `rollout_weights` below the run's directory."""

    @field_validator("url")
    @classmethod
    def _url_can_be_split(cls, url: str) -> str:
        """Raises for a port out of range, and for brackets around what is no address."""
        if urlsplit(url).port == 0:
            raise ValueError("port 0 is no address; give the server's port")
        return url


class RolloutSection(Section):
    """How responses are sampled."""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """`auto` is vLLM, or transformers with a notice where vLLM cannot be imported."""
    mode: Literal["colocate", "server"] = "colocate"
    """`colocate`: an engine inside each process of the stage; `server`: one that `tristage serve` started."""
    server: ServerSection = ServerSection()
    async_steps: Literal[0, 1] = 0
    """Updates by which the weights that sample are behind: with 1 the next responses are sampled while this update is
    computed, and importance weights correct for the difference."""
    temperature: Positive = 1.0
    """Sampling temperature; every log-probability of the pipeline is taken at it."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a response, beside the EOS; the response keeps the first one that it contains."""
    kv_cache_gib: Positive = 0.25
    """vLLM's key-value cache on a CPU, in GiB."""
    gpu_memory_utilization: Fraction = 0.3
    """Share of the GPU's memory that vLLM may use: beside the trainer, or of a server's own."""
    logprob_tolerance: Positive = 1e-4
    """Largest gap between the engine's and the trainer's log-probabilities in float32 before the run stops."""
