"""Memory of one rank of the ppo stage: roles, engine, activations, what is gathered and what the batch holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scripts.estimate_plan import CONTEXT_GIB, GIB, MASTER, REDUCED, SERVER_SHARE, TRAINING, USABLE, Plan
from scripts.estimate_shapes import ModelShape

Computed = Literal["float32", "autocast", "bfloat16"]
CHUNK = 1024
"""Rows whose logits exist at a time (`policy.tensors.logprobs_from_hidden`)."""
LOGITS_ALIVE = 4
"""Float32 tensors [CHUNK, V] alive in its backward pass: log-probabilities, probabilities, slope and one temporary."""
PREFETCHED = 2
"""Layers whose gathered weights exist at a time: the one that computes and the next."""
ENGINE_SLACK_GIB = 2.0
"""The engine's activations and CUDA graphs within its share of the memory. Assumed."""


@dataclass(frozen=True)
class Item:
    """One line of the memory table: GiB per rank, and its formula in words."""

    name: str
    gib: float
    formula: str


@dataclass(frozen=True)
class Memory:
    """Memory of one rank.

    Attributes:
        kv_gib: the engine's key-value cache; wanted_kv_gib: what all its sequences of mean length fill.
        engine_fits: whether the engine's share holds its weights at all.
        host_gib: of one machine's main memory while models are loaded.
    """

    items: list[Item]
    limit_gib: float
    kv_gib: float
    wanted_kv_gib: float
    engine_fits: bool
    host_gib: float

    @property
    def total_gib(self) -> float:
        """Peak, in the update."""
        return sum(item.gib for item in self.items)

    @property
    def fits(self) -> bool:
        """Whether the peak is within what may be planned for and the engine has room."""
        return self.total_gib <= self.limit_gib and self.engine_fits


@dataclass(frozen=True)
class Role:
    """Parameters of one role: `weights` of its own of so many bytes each, `trained` ones (always float32)."""

    weights: int
    trained: int
    bytes: int = MASTER

    @property
    def weight_bytes(self) -> int:
        """All weights of the role."""
        return self.weights * self.bytes

    @property
    def training_bytes(self) -> int:
        """Gradients and Adam's moments."""
        return self.trained * TRAINING


def roles(plan: Plan) -> dict[str, Role]:
    """What `policy.ppo.roles.memory_by_role` counts, for the same `ppo.sharing` and `ppo.critic`.

    Shared weights count once, as `base`.
    """
    shape, ppo = plan.shape, plan.recipe.ppo
    whole, classifier = shape.parameters, shape.classifier_parameters
    adapter = 0 if ppo.sharing == "full" else shape.adapter_parameters(plan.recipe.model.lora)
    head = shape.hidden_size
    found: dict[str, Role] = {}
    if ppo.sharing == "full":
        found["policy"] = Role(whole, whole)
        found["reference"] = Role(whole, 0)
    else:
        found["base"] = Role(whole, 0, plan.model_bytes)
        found["policy"] = Role(adapter, adapter)
        found["reference"] = Role(0, 0)
    if plan.critic_on_policy:
        found["critic"] = Role(head, head)
    elif ppo.sharing == "lora":
        found["critic"] = Role(adapter + head, adapter + head)
    else:
        found["critic"] = Role(classifier, classifier)
    each = adapter + head if ppo.sharing == "lora" else classifier
    names = [name for name, source in ppo.rewards.items() if source.model is not None]
    return {**found, **{f"reward {name}": Role(each, 0) for name in names}}


def computed_in(plan: Plan) -> Computed:
    """How the policy's layers compute: sharded weights are gathered in bfloat16, whole ones cast by autocast."""
    if plan.recipe.model.dtype == "float32":
        return "float32"
    return "bfloat16" if plan.sharded("policy") else "autocast"


def layer_activation_bytes(shape: ModelShape, computed: Computed) -> int:
    """Bytes that one token leaves in one layer for the backward pass, without checkpointing.

    Two norms: input, normalised input (float32 but for the latter in a bfloat16 model) and a scale. Inputs of linear
    layers: one for q, k and v, one for gate and up, one for the output, each d or q wide; autocast casts each of the
    five anew. q, k, v and the attention's log-sum-exp. Feed-forward: gate, its SiLU, up and their product.
    """
    small = 4 if computed == "float32" else 2
    d, q, kv = shape.hidden_size, shape.query_size, shape.key_size
    norms = 12 * d + 8 if computed == "bfloat16" else 16 * d + 8
    inputs = (5 if computed == "autocast" else 2) * d + q
    rest = q + 2 * kv + 4 * shape.intermediate_size
    return norms + small * (inputs + rest) + 4 * shape.num_attention_heads


def activation_bytes(plan: Plan) -> int:
    """Of one micro-batch through one trunk: policy and critic follow one another, or share it."""
    shape, computed = plan.shape, computed_in(plan)
    layer = layer_activation_bytes(shape, computed)
    per_token = shape.num_hidden_layers * layer
    if plan.recipe.ppo.gradient_checkpointing:
        between = shape.hidden_size * (2 if computed == "bfloat16" else 4)
        per_token = shape.num_hidden_layers * between + layer
    return int(plan.micro_batch_tokens * (per_token + 2 * MASTER * shape.hidden_size))


def cast_bytes(plan: Plan) -> int:
    """Copies of the layers' weights in bfloat16 that autocast leaves for the backward pass.

    Of all layers without checkpointing, of one with it. Sharded weights come in bfloat16.
    """
    if computed_in(plan) != "autocast" or plan.model_bytes * (plan.recipe.ppo.sharing != "full") == 2:
        return 0
    layers = 1 if plan.recipe.ppo.gradient_checkpointing else plan.shape.num_hidden_layers
    return 2 * plan.shape.trunk_parameters // plan.shape.num_hidden_layers * layers


def logits_bytes(plan: Plan) -> int:
    """A chunk of logits, and beside the output matrix its cast under autocast, or its float32 gradient."""
    beside = {"float32": 0, "autocast": 2, "bfloat16": 4}[computed_in(plan)]
    return CHUNK * plan.shape.vocab_size * MASTER * LOGITS_ALIVE + plan.shape.embedding_parameters * beside


def gathered_bytes(plan: Plan) -> int:
    """Whole weights of the policy under fsdp2: two layers, and embedding, last norm and head, the root's unit.

    The root and one layer also have gradients, and a copy of them in float32 that is summed over the ranks.
    """
    if not plan.sharded("policy"):
        return 0
    shape, weight = plan.shape, plan.model_bytes
    root = shape.parameters - shape.num_hidden_layers * shape.layer_parameters
    layer = shape.layer_parameters
    return weight * (PREFETCHED * layer + root) + (weight + REDUCED) * (layer + root)


def batch_bytes(plan: Plan) -> int:
    """Token tensors of the whole rollout batch, which every rank holds.

    A prompt position: id (8) and mask (1). A response position: id, mask, and nine float32 of batch and experience.
    """
    data = plan.recipe.data
    row = 9 * data.max_prompt_tokens + (9 + 9 * 4) * data.max_response_tokens
    return plan.recipe.ppo.rollout_batch_size * row


def kv_bytes(plan: Plan) -> int:
    """Keys and values of one token in the engine: 2 x layers x key heads x head size."""
    return 2 * plan.shape.num_hidden_layers * plan.shape.key_size * plan.model_bytes


def memory(plan: Plan) -> Memory:
    """The memory of one rank at its peak, in the update."""
    items: list[Item] = []
    for name, role in roles(plan).items():
        pieces = plan.pieces if plan.sharded(name) else 1
        if role.weights:
            cut = f" / {pieces} ranks" if pieces > 1 else ""
            train = f" + {role.trained:,} x {TRAINING} B training" if role.trained else ""
            words = f"({role.weights:,} x {role.bytes} B{train}){cut}"
            items.append(Item(name, (role.weight_bytes + role.training_bytes) / pieces / GIB, words))
    engine, kv, engine_fits = _engine(plan)
    items += engine
    ckpt = "checkpointed" if plan.recipe.ppo.gradient_checkpointing else "all kept"
    items += [
        Item("activations", activation_bytes(plan) / GIB, f"{plan.micro_batch_tokens:.0f} tokens, {ckpt}"),
        Item("autocast copies", cast_bytes(plan) / GIB, "layers' weights x 2 B, left for the backward pass"),
        Item("logits", logits_bytes(plan) / GIB, f"{LOGITS_ALIVE} x {CHUNK} x V x 4 B, and beside the output matrix"),
        Item(
            "gathered",
            gathered_bytes(plan) / GIB,
            "weights of 2 layers, embedding and head; gradients of 1 layer and these",
        ),
        Item("rollout batch", batch_bytes(plan) / GIB, "sequences x (9 P + 45 R) B, whole on every rank"),
        Item("context", CONTEXT_GIB[plan.gpu.kind], "libraries, CUDA context, NCCL buffers"),
    ]
    engine_rows = plan.recipe.ppo.rollout_batch_size / plan.engines
    wanted = engine_rows * (plan.prompt_tokens + plan.response_tokens) * kv_bytes(plan) / GIB
    return Memory(
        items=[item for item in items if item.gib > 0],
        limit_gib=plan.gpu.memory_gib * (USABLE if plan.gpu.kind == "cuda" else 1.0),
        kv_gib=kv,
        wanted_kv_gib=wanted,
        engine_fits=engine_fits,
        host_gib=_host_bytes(plan) / GIB,
    )


def _host_bytes(plan: Plan) -> int:
    """Ranks of a machine read a sharded model in turn, whole, and others all at once; the first one gathers to save."""
    found = roles(plan)
    return max(role.weight_bytes * (1 if plan.sharded(name) else plan.gpus) for name, role in found.items())


def _engine(plan: Plan) -> tuple[list[Item], float, bool]:
    """The engine's item on the trainer's GPU, its cache in GiB, and whether its weights fit."""
    weights, rollout = plan.shape.parameters * plan.model_bytes / GIB, plan.recipe.rollout
    if plan.mode == "server":
        share = weights / plan.tensor_parallel
        kv = plan.gpu.memory_gib * SERVER_SHARE - share - ENGINE_SLACK_GIB
        return [], kv * plan.tensor_parallel, kv > 0
    if plan.gpu.kind == "cpu":
        words = f"{plan.shape.parameters:,} x {plan.model_bytes} B + rollout.kv_cache_gib"
        return [Item("engine", weights + rollout.kv_cache_gib, words)], rollout.kv_cache_gib, True
    share = rollout.gpu_memory_utilization * plan.gpu.memory_gib
    kv = share - weights - ENGINE_SLACK_GIB
    words = f"rollout.gpu_memory_utilization {rollout.gpu_memory_utilization:g} x {plan.gpu.memory_gib:g} GiB"
    return [Item("engine", share, words)], max(kv, 0.0), kv > 0
