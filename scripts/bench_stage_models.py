"""What `scripts.bench_stage` runs on: shapes, random models with prompts and a recipe's inputs, and the machine.

`python -m scripts.bench_stage_models machine` prints what there is, as JSON; `... make JOB` writes policy, reward model
and prompts. Both are processes of their own, for the benchmark itself never imports torch: on Linux a child's peak
memory begins at that of its parent.
"""

from __future__ import annotations

import json
import os
import random
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench_ppo_models import (
    EOS,
    HELD_OUT,
    PAD,
    POSITIONS,
    UNK,
    WORKLOADS,
    Shape,
    Workload,
    make_eos_prone,
    random_model,
    write_reward_model,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHAPES: dict[str, Shape] = {
    "tiny": WORKLOADS["tiny"].shape,
    "0.5b": WORKLOADS["qwen2.5-0.5b"].shape,
    "1.5b": WORKLOADS["qwen2.5-1.5b"].shape,
}
"""A Llama of 0.1M parameters for tests, and Qwen2.5 0.5B and 1.5B."""
POLICY, REWARD, PROMPTS = "policy", "rm", "prompts.jsonl"
SHORTEST = 8
"""Tokens of the shortest prompts: with fewer, two of them could be the same."""
LETTERS = string.ascii_letters + string.digits
"""What prompts are made of: each is a token."""
FUNCTION = """\
def words(prompts, responses, columns):
    return [len(set(response.split())) / 10 for response in responses]
"""
"""The reward of `--reward function`: how many different words a response has."""


@dataclass(frozen=True)
class Job:
    """What to make, in names that JSON can carry.

    Attributes:
        prompts: to train on; two more are held out.
        dtype: of the policy's file; a reward model's is float32.
        device: `cpu` or `cuda`, where weights are drawn.
    """

    shape: str
    batch: int
    prompt: int
    response: int
    prompts: int
    dtype: str
    device: str
    reward: str

    @property
    def workload(self) -> Workload:
        """Responses end by chance after half their limit on average, the cut left out."""
        return Workload(SHAPES[self.shape], self.batch, self.prompt, self.response, max(2, self.response // 2), 0)


def make(job: Job, directory: Path) -> None:
    """Writes `policy`, `prompts.jsonl`, and the artifact `rm` or the module `bench_reward`.

    Errors:
        ValueError: more tokens than the models have positions.
    """
    import torch

    if job.prompt + job.response > POSITIONS:
        raise ValueError(f"{job.prompt} + {job.response} tokens; the models have {POSITIONS} positions")
    torch.manual_seed(0)
    policy = random_model(job.workload.shape, "causal", job.device)
    make_eos_prone(policy, job.workload.mean_length)
    tokenizer = byte_tokenizer(job.workload.shape.vocab_size)
    torch.nn.Module.to(policy, vars(torch)[job.dtype])
    policy.save_pretrained(directory / POLICY)
    tokenizer.save_pretrained(directory / POLICY)
    del policy
    if job.reward == "model":
        write_reward_model(job.workload, directory / REWARD, tokenizer, job.device)
    else:
        (directory / "bench_reward.py").write_text(FUNCTION, encoding="utf-8")
    write_prompts(job, directory / PROMPTS)


def byte_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token per byte, and words that no text is cut into, but that responses may hold; no BOS.

    It is a `Qwen2Tokenizer`, for transformers takes no other one beside a Qwen2 model.
    """
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    tokens = {"<unk>": UNK, "</s>": EOS, "<pad>": PAD}
    for token in sorted(pre_tokenizers.ByteLevel.alphabet()):
        tokens[token] = len(tokens)
    tokens |= {f"\u0120w{index}": index for index in range(len(tokens), vocabulary)}
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    return Qwen2Tokenizer(vocab=tokens, merges=[], padding_side="left", **special)


def write_prompts(job: Job, file: Path) -> None:
    """Prompts of random letters, to train on, and two that are held out."""
    draw = random.Random(3)
    rows = [
        {
            "prompt": "".join(draw.choices(LETTERS, k=job.prompt)),
            "split": "train" if index < job.prompts else "eval",
        }
        for index in range(job.prompts + HELD_OUT)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def machine() -> dict[str, Any]:
    """Device, memory, processors and versions; whether vLLM is installed."""
    import torch

    from pipeline.surroundings import device_name, git_commit, package_versions
    from rollout.engine import engine_availability

    cuda = torch.cuda.is_available()
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else None
    return {
        "kind": "cuda" if cuda else "cpu",
        "device": device_name(),
        "gpus": torch.cuda.device_count() if cuda else 0,
        "gpu_memory_gib": None if gpu is None else round(gpu, 1),
        "cuda": torch.version.cuda,
        "processors": os.cpu_count(),
        "memory_gib": round(ram, 1),
        "engines": {engine.name: engine.version for engine in engine_availability()},
        "packages": package_versions(),
        "code": git_commit(),
    }


def main(arguments: Sequence[str]) -> None:
    """One of the two commands."""
    match arguments:
        case ["machine"]:
            print(json.dumps(machine()))
        case ["make", job]:
            make(Job(**json.loads(job)), Path.cwd())
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
