"""What `scripts.bench_ppo` trains on: shapes, their arithmetic, and random models that end their answers by chance.

`python -m scripts.bench_ppo_models make WORKLOAD DIR PROMPTS DEVICE` writes policy, reward model and prompts;
`python -m scripts.bench_ppo_models gemm DTYPE DEVICE SIZE` measures a large matrix product. Both are processes of their
own: the benchmark itself never imports torch, for on Linux a child's peak memory begins at that of its parent.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

UNK, EOS, PAD = 0, 1, 2
FIRST_WORD = 3
CONSTANT = 0.25
"""First entry of every embedding, which the layers pass through: what is added to a token's own one is its bias."""
POSITIONS = 1024
HELD_OUT = 2
CALIBRATION = (8, 64)
TOLERANCE = 1e-3
GEMM_REPEATS = 5


@dataclass(frozen=True)
class Shape:
    """A Llama or Qwen2 with tied embeddings, in the names of its transformers configuration."""

    family: Literal["llama", "qwen2"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int

    @property
    def trunk_parameters(self) -> int:
        """Weights of the layers' matrix products; biases, norms and embeddings are left out."""
        hidden, heads = self.hidden_size, self.num_attention_heads
        key_value = hidden // heads * self.num_key_value_heads
        return self.num_hidden_layers * hidden * (2 * hidden + 2 * key_value + 3 * self.intermediate_size)

    @property
    def parameters(self) -> int:
        """Weights of the matrix products and the embedding."""
        return self.trunk_parameters + self.vocab_size * self.hidden_size


@dataclass(frozen=True)
class Workload:
    """One update's work: `batch` prompts of `prompt_tokens`, geometric responses of about `mean_length` before the cut.

    Attributes:
        micro_batch_tokens: our ppo.max_tokens_per_micro_batch.
    """

    shape: Shape
    batch: int
    prompt_tokens: int
    response_tokens: int
    mean_length: int
    micro_batch_tokens: int


WORKLOADS = {
    "tiny": Workload(Shape("llama", 512, 64, 128, 2, 2, 1), 8, 8, 16, 6, 128),
    "a": Workload(Shape("llama", 4096, 256, 816, 4, 4, 4), 64, 64, 96, 24, 2048),
    "b": Workload(Shape("llama", 49152, 576, 1536, 30, 9, 3), 16, 64, 48, 24, 768),
    "qwen2.5-0.5b": Workload(Shape("qwen2", 151936, 896, 4864, 24, 14, 2), 64, 256, 512, 256, 16384),
    "qwen2.5-1.5b": Workload(Shape("qwen2", 151936, 1536, 8960, 28, 12, 2), 64, 256, 512, 256, 16384),
}


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one pass over some tokens: layers, attention scores, vocabulary projection."""

    trunk: float
    attention: float
    projection: float


def forward_flops(shape: Shape, tokens: float, pairs: float, projected: float) -> Flops:
    """Two operations per weight and token; four per (query, key) pair and channel; `projected` tokens get logits.

    Source: Chowdhery et al. 2022 (arXiv:2204.02311), appendix B.
    """
    return Flops(
        trunk=2 * shape.trunk_parameters * tokens,
        attention=4 * shape.num_hidden_layers * shape.hidden_size * pairs,
        projection=2 * shape.hidden_size * shape.vocab_size * projected,
    )


def update_flops(
    workload: Workload, mean_length: float, epochs: float, sharing: str = "full", *, recompute: bool
) -> float:
    """Operations that one update phase cannot do without: policy and critic, `epochs` passes, no padding.

    Under `lora-shared` one trunk serves both; an adapter's own operations are left out.

    Forward 1, gradients of activations 1, gradients of weights 1 (none where the base is frozen). Response tokens
    alone are projected on the vocabulary, by the policy; `recompute` counts the second forward through that
    projection, which is done in the backward pass to save memory. Every sequence is taken as of mean length, so the
    attention's share is a lower bound.
    """
    length = workload.prompt_tokens + mean_length
    tokens, pairs = workload.batch * length, workload.batch * length * (length + 1) / 2
    once = forward_flops(workload.shape, tokens, pairs, workload.batch * mean_length)
    passes = 3 if sharing == "full" else 2
    trunks = 1 if sharing == "lora-shared" else 2
    trunk = passes * once.trunk + 3 * once.attention
    return epochs * (trunks * trunk + (passes + recompute) * once.projection)


def make(workload: Workload, directory: Path, prompts: int, device: str) -> None:
    """Writes `policy`, the artifact `rm`, and prompts as text (`prompts.jsonl`) and as tokens (`prompts.json`)."""
    import torch

    torch.manual_seed(0)
    policy = random_model(workload.shape, "causal", device)
    make_eos_prone(policy, workload.mean_length)
    tokenizer = word_tokenizer(workload.shape.vocab_size)
    policy.save_pretrained(directory / "policy")
    tokenizer.save_pretrained(directory / "policy")
    del policy
    write_reward_model(workload, directory / "rm", tokenizer, device)
    write_reward_model(workload, directory / "rm_adapter", tokenizer, device, policy=directory / "policy")
    write_prompts(workload, directory, prompts)


def random_model(shape: Shape, kind: Literal["causal", "classifier"], device: str) -> PreTrainedModel:
    """A float32 model of the shape, initialised as transformers does."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    sizes = {key: value for key, value in asdict(shape).items() if key != "family"}
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    labels = {"num_labels": 1} if kind == "classifier" else {}
    config = AutoConfig.for_model(
        shape.family, **sizes, **special, **labels, max_position_embeddings=POSITIONS, tie_word_embeddings=True
    )
    build = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    with torch.device(device):
        return build.from_config(config, dtype=torch.float32).eval()


def make_eos_prone(policy: PreTrainedModel, mean_length: int) -> None:
    """Makes the EOS about 1 / mean_length probable after any text, and padding impossible.

    The first entry of the residual stream is the same constant everywhere: no layer writes to it. The first entry of a
    token's row of the tied head is then a bias of its logit. The last hidden states do not depend on the EOS' row, so
    one forward is enough to find its bias by bisection.
    """
    import torch

    vocabulary = policy.config.vocab_size
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(FIRST_WORD, vocabulary, CALIBRATION, generator=generator).to(policy.device)
    with torch.no_grad():
        embedding = policy.get_parameter("model.embed_tokens.weight")
        embedding[:, 0] = CONSTANT
        embedding[PAD] = 0.0
        embedding[PAD, 0] = -4.0
        embedding[EOS, 1:] = 0.0
        for name, parameter in policy.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[0] = 0.0
        hidden = policy.get_submodule("model")(input_ids=ids).last_hidden_state.flatten(0, 1)
        logits = hidden @ embedding.t()
        eos = logits[:, EOS].double()
        logits[:, EOS] = -torch.inf
        against = eos - logits.logsumexp(-1).double()
        low, high = 0.0, 1024.0
        for _ in range(60):
            middle = (low + high) / 2
            rare = torch.sigmoid(against + middle * hidden[:, 0]).mean().item() < 1 / mean_length
            low, high = (middle, high) if rare else (low, middle)
        embedding[EOS, 0] += low
        found = torch.sigmoid(against + low * hidden[:, 0]).mean().item()
    if abs(found * mean_length - 1) > TOLERANCE:
        raise ValueError(f"P(EOS) came out as {found:.3g}, not 1 / {mean_length}")


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per word: `w3`, `w4` ...; no BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": UNK, "</s>": EOS, "<pad>": PAD} | {f"w{index}": index for index in range(FIRST_WORD, vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def write_reward_model(
    workload: Workload, final: Path, tokenizer: PreTrainedTokenizerFast, device: str, policy: Path | None = None
) -> None:
    """A random reward model as an artifact of the rm stage, which PPO's gate admits; an adapter over `policy`."""
    import torch

    from pipeline.artifacts import finish
    from pipeline.tokens import chat_template_sha256, tokenizer_sha256

    partial = final.with_name(final.name + ".partial")
    torch.manual_seed(1)
    manifest: dict[str, Any] = {}
    if policy is None:
        random_model(workload.shape, "classifier", device).save_pretrained(partial)
    else:
        manifest["adapter"] = random_adapter(policy, partial)
    tokenizer.save_pretrained(partial)
    manifest |= {
        "kind": "rm",
        "fingerprint": {"sha256": "random weights"},
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": chat_template_sha256(tokenizer),
        "normalisation": {"mean": 0.0, "std": 1.0},
        "metrics": {"eval/accuracy": 0.8, "eval/accuracy_low": 0.7, "eval/accuracy_high": 0.9, "eval/pairs": 50},
    }
    finish(partial, final, manifest)


def random_adapter(policy: Path, directory: Path) -> dict[str, str]:
    """A random adapter and head over the policy's trunk, written as `rm.lora` writes them."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from pipeline.adapters import add_adapter, save_merged
    from pipeline.recipe import LoraSection

    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.float32)
    add_adapter(model, "reward", LoraSection(), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.01)
    return save_merged(model, "reward", directory, base=str(policy))


def write_prompts(workload: Workload, directory: Path, count: int) -> None:
    """`count` prompts of random words to train on, and two that are held out of our stage."""
    draw = random.Random(3)
    ids = [
        [draw.randrange(FIRST_WORD, workload.shape.vocab_size) for _ in range(workload.prompt_tokens)]
        for _ in range(count + HELD_OUT)
    ]
    rows = [
        {"prompt": " ".join(f"w{token}" for token in row), "split": "train" if index < count else "eval"}
        for index, row in enumerate(ids)
    ]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "prompts.json").write_text(json.dumps(ids[:count]))


def gemm(dtype: str, device: str, size: int) -> dict[str, float | str]:
    """FLOP/s of the best of a few [size, size] matrix products, the device and its threads."""
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=vars(torch)[dtype]) for _ in range(2))
    best = float("inf")
    for _ in range(GEMM_REPEATS):
        start = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"flops": 2 * size**3 / best, "device": name, "size": size, "dtype": dtype}


def main(arguments: Sequence[str]) -> None:
    """One of the two commands; `gemm` prints JSON."""
    if "cuda" in arguments:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("torch finds no CUDA device.")
    match arguments:
        case ["make", name, directory, prompts, device]:
            make(WORKLOADS[name], Path(directory), int(prompts), device)
        case ["gemm", dtype, device, size]:
            print(json.dumps(gemm(dtype, device, int(size))))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
