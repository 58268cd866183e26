"""Trainer processes for tests/rollout/test_processes.py: `python -m tests.rollout.processes`."""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist

from pipeline.errors import UserError
from rollout.engine import EngineOptions, RolloutEngine, SamplingOptions, make_engine
from tests.rollout.tiny import (
    POSITIONS,
    STOP,
    forward_logprobs,
    load_llama,
    perturb,
    prompts_of,
)

OPTIONS = EngineOptions(POSITIONS, 64, STOP, kv_cache_gib=0.05)


def state() -> dict[str, object]:
    """What vLLM's start-up must leave as it was."""
    names = (
        "LD_PRELOAD",
        "LOCAL_WORLD_SIZE",
        "NUMEXPR_MAX_THREADS",
        "TORCHINDUCTOR_COMPILE_THREADS",
    )
    return {
        "environment": {name: os.environ.get(name) for name in names},
        "set_num_threads": torch.set_num_threads.__module__,
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "collector": (gc.isenabled(), gc.get_freeze_count()),
    }


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def seed_everything() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


def reduced() -> float:
    """A collective on the default group: 1 + 2 + ... over its processes."""
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    return float(total)


def gap(engine: RolloutEngine, directory: Path, seed: int) -> float:
    """Largest log-prob error after an update, over prompts of this process's own."""
    model = load_llama(directory)
    perturb(model, seed)
    engine.load_weights(model.named_parameters())
    prompts = prompts_of([3, 9], seed)
    answers = engine.generate(prompts, SamplingOptions(8), [seed, seed + 1])
    return max(
        float((torch.tensor(a.logprobs) - forward_logprobs(model, p, a.token_ids)).abs().max())
        for p, a in zip(prompts, answers, strict=True)
    )


def life(directory: Path) -> None:
    """One trainer process: three engines, closed, collected and interrupted; then left open."""
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    before = state()
    seed_everything()
    expected = draws()
    seed_everything()
    started = time.process_time()
    engine = make_engine("vllm", directory, OPTIONS)
    report: dict[str, object] = {"start_seconds": time.process_time() - started}
    started = time.process_time()
    engine.generate(prompts_of([5]), SamplingOptions(4), [1])
    report["first_seconds"] = time.process_time() - started
    report["draws"] = [expected, draws()]
    report["state"] = [before, state()]
    engine.close()
    report["after_close"] = reduced()

    engine = make_engine("vllm", directory, OPTIONS)
    report["second_gap"] = gap(engine, directory, seed=1)
    del engine
    gc.collect()
    report["after_collection"] = reduced()

    engine = make_engine("vllm", directory, OPTIONS)
    report["interrupted"] = interrupt(engine)
    report["third_gap"] = gap(engine, directory, seed=2)
    report["children"] = len(psutil.Process().children(recursive=True))
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    while True:
        engine.generate(prompts_of([8] * 64), SamplingOptions(400), range(64))


def failure(directory: Path) -> None:
    """A trainer that dies of an error of its own while its engine is open."""
    engine = make_engine("vllm", directory, OPTIONS)
    engine.generate(prompts_of([5]), SamplingOptions(4), [1])
    raise ArithmeticError("the trainer's own error")


def interrupt(engine: RolloutEngine) -> bool:
    """Ctrl-C in the middle of a rollout."""
    import _thread

    threading.Timer(0.3, _thread.interrupt_main).start()
    try:
        for seed in range(10**6):
            engine.generate(prompts_of([8] * 64), SamplingOptions(400), range(seed, seed + 64))
    except KeyboardInterrupt:
        return True
    return False


def ranks(directory: Path) -> None:
    """One of two ranks under torchrun: refused too early, right after the Accelerator."""
    from accelerate import Accelerator

    report: dict[str, object] = {}
    try:
        make_engine("vllm", directory, OPTIONS)
    except UserError as error:
        report["refusal"] = str(error)
    accelerator = Accelerator(cpu=True)
    report["processes"] = accelerator.num_processes
    report["rank"] = accelerator.process_index
    engine = make_engine("vllm", directory, OPTIONS)
    report["gap"] = gap(engine, directory, seed=5)
    seed = 100 * accelerator.process_index
    sampled = engine.generate(prompts_of([4]), SamplingOptions(20), [seed])
    report["tokens"] = list(sampled[0].token_ids)
    for _ in range(accelerator.process_index + 1):  # ranks need not step together
        engine.generate(prompts_of([4] * 3), SamplingOptions(4), [1, 2, 3])
    report["while_open"] = reduced()
    engine.close()
    report["after_close"] = reduced()
    path = Path(sys.argv[3]) / f"rank{accelerator.process_index}.json"
    path.write_text(json.dumps(report))
    accelerator.end_training()


if __name__ == "__main__":
    {"life": life, "failure": failure, "ranks": ranks}[sys.argv[1]](Path(sys.argv[2]))
