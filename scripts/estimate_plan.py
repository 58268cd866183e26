"""What `scripts.estimate` reckons with: GPUs by their data sheets, constants with their sources, and one plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.recipe import Recipe
from scripts.estimate_shapes import ModelShape

GIB = 1024**3
Sharding = Literal["ddp", "fsdp2"]
Mode = Literal["colocate", "server"]

BYTES = {"float32": 4, "bfloat16": 2}
MASTER = 4
"""Bytes of a weight that is trained, of its reference and of reward models: all lie in float32."""
REDUCED = 4
"""Bytes of a gradient that is summed over ranks; a gathered weight has the recipe's dtype (`pipeline.sharding`)."""
TRAINING = 3 * MASTER
"""Bytes per trained weight beside it: gradient and Adam's two moments (`policy.ppo.roles.memory_by_role`)."""
USABLE = 0.95
"""Share of a GPU's memory that may be planned for; the rest is lost to fragmentation. Assumed."""
CONTEXT_GIB = {"cuda": 1.5, "cpu": 0.8}
"""CUDA context, NCCL's buffers and libraries: assumed. On a CPU the process after all imports: measured."""
MFU = {"cuda": 0.40, "cpu": 0.60}
"""Achieved share of the peak in matrix products. GPUs: 38-43% in Llama 3's training (arXiv:2407.21783, table 4).
CPU: benchmarks/bench_ppo_*_cpu.json, 0.52 to 0.75 of a large float32 product."""
MBU = 0.55
"""Achieved share of the memory's bandwidth in decoding: 0.5 to 0.6 is usual for serving on A100s. Assumed."""
LINK_SHARE = 0.7
"""Achieved share of a link's bandwidth in collectives of large messages. Assumed."""
STEP_SECONDS = {"cuda": 0.004, "cpu": 0.005}
"""Host time of one decoding step of the engine: scheduler, sampling, launches. Assumed."""
ROW_SECONDS = {"cuda": 0.0, "cpu": 0.00014}
"""Host time per sequence and decoding step: measured on a CPU with vLLM; hidden behind the GPU there."""
PACK_SECONDS, PACK_RATE = 0.02, 150e6
"""vLLM packs every matrix anew on a CPU: seconds, and weights per second, measured with models of 6M to 135M."""
SERVER_SHARE = 0.9
"""Share of its memory that vLLM takes on a GPU of its own: its default."""
DISK = 2e9
"""Bytes per second to and from a shared file system. Assumed."""
MAX_SEQUENCES = 256
"""Sequences that the engine decodes at once (`rollout.open.MAX_SEQUENCES`)."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one process's share of a CPU.

    Attributes:
        memory_gib: what torch can use of it.
        flops: dense peak in the recipe's dtype, per second.
        bandwidth: bytes per second of its memory.
        link: bytes per second in one direction to the other GPUs of the machine; network: to other machines.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    memory_gib: float
    flops: float
    bandwidth: float
    link: float
    network: float


GPUS = {
    "a100-80g": Gpu("a100-80g", "cuda", 79.1, 312e12, 2.039e12, 300e9, 25e9),
    "h100-80g": Gpu("h100-80g", "cuda", 79.1, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu("h200", "cuda", 139.8, 989e12, 4.8e12, 450e9, 50e9),
    "cpu": Gpu("cpu", "cpu", 16.0, 0.08e12, 50e9, 10e9, 1e9),
}
"""Data sheets of NVIDIA's A100 SXM 80 GB, H100 SXM and H200: bfloat16 without sparsity, NVLink one way. Network: a DGX
has an InfiniBand port per GPU, 200 Gb/s (A100) or 400 Gb/s. `cpu`: the two cores of benchmarks/bench_ppo_*_cpu.json."""


@dataclass(frozen=True)
class Plan:
    """One PPO run on one cluster.

    Attributes:
        gpus: per machine, of the trainer.
        mode: `colocate`: every rank has a whole engine beside its trainer; `server`: engines on `server_gpus` of their
            own, each spread over `tensor_parallel` of them.
        prompt_tokens, response_tokens: means; the recipe's `data` section has the limits.
        overlap: the next batch is sampled while this one is learnt from (`rollout.async_steps`).
    """

    shape: ModelShape
    recipe: Recipe
    gpu: Gpu
    gpus: int
    machines: int
    sharding: Sharding
    mode: Mode
    prompt_tokens: float
    response_tokens: float
    server_gpus: int = 0
    tensor_parallel: int = 1
    overlap: bool = False

    @property
    def world(self) -> int:
        """Ranks of the trainer."""
        return self.gpus * self.machines

    @property
    def model_bytes(self) -> int:
        """Of a weight in the engine, and of a frozen base under LoRA."""
        return BYTES[self.recipe.model.dtype]

    @property
    def pieces(self) -> int:
        """Parts that a sharded role is cut into."""
        return self.world if self.sharding == "fsdp2" else 1

    @property
    def rows(self) -> int:
        """Sequences of a rollout batch on the rank with the most."""
        return math.ceil(self.recipe.ppo.rollout_batch_size / self.world)

    @property
    def tokens_per_rank(self) -> float:
        """Prompt and response tokens of a rollout batch on one rank."""
        return self.rows * (self.prompt_tokens + self.response_tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the recipe allows."""
        return self.recipe.data.max_prompt_tokens + self.recipe.data.max_response_tokens

    @property
    def micro_batch_tokens(self) -> float:
        """Padded tokens of the largest forward: the budget, or all that a rank has of a minibatch, longest rows."""
        rows = math.ceil(self.rows / self.recipe.ppo.num_minibatches)
        return min(self.recipe.ppo.max_tokens_per_micro_batch, rows * self.longest)

    @property
    def passes(self) -> int:
        """Micro-batches per rank of one pass over the rollout batch."""
        return math.ceil(self.tokens_per_rank / self.recipe.ppo.max_tokens_per_micro_batch)

    @property
    def steps(self) -> int:
        """Optimiser steps of one update."""
        return self.recipe.ppo.num_ppo_epochs * self.recipe.ppo.num_minibatches

    @property
    def micro_batches(self) -> int:
        """Micro-batches per rank of one update."""
        per_step = self.tokens_per_rank / self.recipe.ppo.num_minibatches
        return self.steps * math.ceil(per_step / self.recipe.ppo.max_tokens_per_micro_batch)

    @property
    def engines(self) -> int:
        """Copies of the engine."""
        return self.world if self.mode == "colocate" else max(self.server_gpus // self.tensor_parallel, 1)

    def sharded(self, role: str) -> bool:
        """Whether the weights of a role (a name of `estimate_memory.roles`) lie in parts on the ranks.

        A base under adapters is never cut, and a head or an adapter is too small to be.
        """
        ppo, adapted = self.recipe.ppo, self.recipe.ppo.sharing != "full"
        whole = role == "base" or (adapted and role in ("policy", "reference"))
        whole = whole or (role == "critic" and (self.critic_on_policy or ppo.sharing == "lora"))
        if self.pieces == 1 or whole:
            return False
        if role.startswith("reward "):
            return "rewards" in ppo.shard and ppo.sharing != "lora"
        return role in ppo.shard

    @property
    def reward_models(self) -> int:
        """Sources of the score that are models."""
        return sum(source.model is not None for source in self.recipe.ppo.rewards.values())

    @property
    def critic_on_policy(self) -> bool:
        """Whether one forward serves policy and critic (`ppo.critic: shared`)."""
        return self.recipe.ppo.critic == "shared"
