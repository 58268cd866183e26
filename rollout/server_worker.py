"""What `tristage serve` adds to the workers of a vLLM server: they say what they hold, and load weights from files.

Loaded by vLLM (`--worker-extension-cls rollout.server_worker.WeightReceiver`) and called through its development route
`POST /collective_rpc`. A reload that fails half-way leaves a model that answers nothing or nonsense, and vLLM's own
reload of a path that does not exist ends the server: so everything is checked before the model is touched, and what is
wrong is an answer instead of an exception.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.vllm_engine import model_shapes, renew_packed_heads
from rollout.vllm_process import count_plainly
from rollout.weight_files import UnusableWeights, check_shapes, read_weights

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import VllmConfig

count_plainly()


class WeightReceiver:
    """Becomes a base class of vLLM's worker; the attributes named here are the worker's."""

    if TYPE_CHECKING:
        vllm_config: VllmConfig

        def get_model(self) -> nn.Module: ...

        def reload_weights(self, **kwargs: Any) -> None: ...

    def describe_model(self) -> dict[str, Any]:
        """What the engine compares with what it needs."""
        config = self.vllm_config.model_config
        return {
            "vocab_size": config.hf_text_config.vocab_size,
            "max_model_len": config.max_model_len,
            "logprobs_mode": str(config.logprobs_mode),
            "dtype": str(config.dtype).removeprefix("torch."),
            "weights": {name: list(shape) for name, shape in model_shapes(config.hf_config).items()},
        }

    def receive_weights(self, directory: str) -> dict[str, Any]:
        """Replaces all weights by those of a directory of safetensors files.

        Returns:
            `error`: why the directory is refused, None once its weights are loaded; `passing`: it may yet appear.
        """
        path = Path(directory)
        try:
            check_shapes(path, model_shapes(self.vllm_config.model_config.hf_config))
        except UnusableWeights as error:
            return {"error": str(error), "passing": error.passing}
        self.reload_weights(weights_iterator=read_weights(path))
        renew_packed_heads(self.get_model())
        return {"error": None, "passing": False}
