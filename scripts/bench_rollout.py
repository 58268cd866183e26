"""Rollout speed: vLLM and the transformers engine beside transformers' own `generate`.

    python -m scripts.bench_rollout MODEL_DIR [--prompts 256 --max-new-tokens 64 --repeats 5]

Answers end at one of several stop tokens, chosen so that their mean length is 0.4 of the longest, as
in RLHF, where a batch waits for its longest answer. Only tokens up to the stop token count. The
contenders take turns (A B C A B C ...), so that another load on the machine meets all of them, and a
ratio is the median over the rounds of the ratio within a round. CPU-seconds are those of this process.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError
from rollout.engine import EngineOptions, RolloutEngine, SamplingOptions, make_engine, text_config

BASELINE = "transformers generate"
MEAN_LENGTH = 0.4  # of max_new_tokens

Prompts = list[list[int]]
Contender = Callable[[Prompts, int], int]  # prompts and the round's seed -> useful tokens


@dataclass(frozen=True)
class Round:
    """One contender's rollout of all prompts."""

    contender: str
    useful_tokens: int
    cpu_seconds: float
    wall_seconds: float


@dataclass(frozen=True)
class Speed:
    """Medians over the rounds; the ratios are to the baseline of the same round."""

    contender: str
    tokens_per_cpu_second: float
    tokens_per_wall_second: float
    cpu_ratio: float
    wall_ratio: float
    tokens_per_answer: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns the exit code."""
    options = _parse(arguments)
    try:
        rounds, stop = measure(options)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    speeds = summarise(rounds, options.prompts)
    print(f"{options.prompts} prompts, at most {options.max_new_tokens} tokens, {len(stop)} stop tokens, float32")
    print(table(speeds))
    if options.json is not None:
        settings = {name: str(value) for name, value in vars(options).items() if name != "json"}
        report = {
            "settings": settings,
            "threads": torch.get_num_threads(),
            "rounds": [asdict(one) for one in rounds],
            "speeds": [asdict(one) for one in speeds],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure(options: argparse.Namespace) -> tuple[list[Round], tuple[int, ...]]:
    """All rounds, contenders in turn, after one untimed rollout of each; and the stop tokens."""
    vocabulary = text_config(Path(options.model_dir)).vocab_size
    prompts = random_prompts(options.prompts, options.prompt_tokens, vocabulary)
    sampling = SamplingOptions(options.max_new_tokens)
    sizes = EngineOptions(
        max_model_len=options.prompt_tokens + options.max_new_tokens,
        max_sequences=options.prompts,
        stop_token_ids=(),
        kv_cache_gib=options.kv_cache_gib,
    )
    probe = make_engine("transformers", options.model_dir, sizes)
    lengthy = probe.generate(prompts, sampling, range(options.prompts))
    probe.close()
    stop = choose_stop_tokens([answer.token_ids for answer in lengthy], vocabulary)
    sizes = replace(sizes, stop_token_ids=stop)
    vllm = make_engine("auto", options.model_dir, sizes)
    engines = [vllm, make_engine("transformers", options.model_dir, sizes)] if vllm.name == "vllm" else [vllm]
    contenders: dict[str, Contender] = {
        f"{engine.name} {engine.version}" if engine.name == "vllm" else "transformers engine": _engine_rollout(
            engine, sampling
        )
        for engine in engines
    }
    contenders[BASELINE] = _plain_generate(options.model_dir, stop, sampling)
    try:
        for contender in contenders.values():
            contender(prompts, 0)
        rounds = [
            _timed(name, contender, prompts, seed)
            for seed in range(1, options.repeats + 1)
            for name, contender in contenders.items()
        ]
    finally:
        for engine in engines:
            engine.close()
    return rounds, stop


def random_prompts(count: int, longest: int, vocabulary: int) -> Prompts:
    """Prompts of random tokens, between a quarter of `longest` and `longest` long."""
    generator = random.Random(0)
    lengths = [generator.randint(max(1, longest // 4), longest) for _ in range(count)]
    return [[generator.randrange(vocabulary) for _ in range(length)] for length in lengths]


def choose_stop_tokens(answers: Sequence[Sequence[int]], vocabulary: int) -> tuple[int, ...]:
    """Random tokens, as many as cut the answers to 0.4 of their length on average."""
    order = list(range(vocabulary))
    random.Random(1).shuffle(order)
    target = MEAN_LENGTH * sum(map(len, answers))
    chosen: set[int] = set()
    for token in order:
        chosen.add(token)
        if sum(useful_length(answer, chosen) for answer in answers) <= target:
            break
    return tuple(sorted(chosen))


def useful_length(answer: Sequence[int], stop: set[int]) -> int:
    """Tokens up to the first stop token, that one included."""
    return next((index + 1 for index, token in enumerate(answer) if token in stop), len(answer))


def summarise(rounds: Sequence[Round], prompts: int) -> list[Speed]:
    """Median speeds, and median ratios to the baseline's speed in the same round."""
    by_contender: dict[str, list[Round]] = {}
    for one in rounds:
        by_contender.setdefault(one.contender, []).append(one)
    baseline = by_contender[BASELINE]
    speeds = []
    for contender, own in by_contender.items():
        cpu = [one.useful_tokens / one.cpu_seconds for one in own]
        wall = [one.useful_tokens / one.wall_seconds for one in own]
        cpu_base = [one.useful_tokens / one.cpu_seconds for one in baseline]
        wall_base = [one.useful_tokens / one.wall_seconds for one in baseline]
        speeds.append(
            Speed(
                contender=contender,
                tokens_per_cpu_second=statistics.median(cpu),
                tokens_per_wall_second=statistics.median(wall),
                cpu_ratio=statistics.median(a / b for a, b in zip(cpu, cpu_base, strict=True)),
                wall_ratio=statistics.median(a / b for a, b in zip(wall, wall_base, strict=True)),
                tokens_per_answer=statistics.mean(one.useful_tokens / prompts for one in own),
            )
        )
    return speeds


def table(speeds: Sequence[Speed]) -> str:
    """The speeds as text, one line per contender."""
    lines = [f"{'useful tokens per':24}{'CPU-s':>9}{'ratio':>8}{'wall-s':>9}{'ratio':>8}{'answer':>9}"]
    lines += [
        f"{one.contender:24}{one.tokens_per_cpu_second:9.0f}{one.cpu_ratio:8.2f}"
        f"{one.tokens_per_wall_second:9.0f}{one.wall_ratio:8.2f}{one.tokens_per_answer:9.1f}"
        for one in speeds
    ]
    return "\n".join(lines)


def _timed(name: str, contender: Contender, prompts: Prompts, seed: int) -> Round:
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = contender(prompts, seed)
    return Round(name, tokens, time.process_time() - cpu, time.perf_counter() - wall)


def _engine_rollout(engine: RolloutEngine, sampling: SamplingOptions) -> Contender:
    def roll(prompts: Prompts, seed: int) -> int:
        seeds = range(seed * len(prompts), (seed + 1) * len(prompts))
        return sum(len(answer.token_ids) for answer in engine.generate(prompts, sampling, seeds))

    return roll


def _plain_generate(model_dir: str, stop: tuple[int, ...], sampling: SamplingOptions) -> Contender:
    """`model.generate` on all prompts at once, left-padded; it reports no log-probs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    torch.nn.Module.to(model, device)
    model.eval()

    @torch.inference_mode()
    def roll(prompts: Prompts, seed: int) -> int:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        torch.manual_seed(seed)
        output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]  (a mixin's method)
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=list(stop),
            pad_token_id=stop[0],
        )
        return sum(useful_length(row, set(stop)) for row in output[:, longest:].tolist())

    return roll


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model_dir", nargs="?", default="assets/demo-base", help="checkpoint directory")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=24, help="longest prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kv-cache-gib", type=float, default=0.5, help="vLLM's, on a CPU")
    parser.add_argument("--json", type=Path, help="also write rounds and medians to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
