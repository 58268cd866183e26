"""The peer's process in `scripts.bench_ppo`: `python bench_ppo_trl.py JOB.json` with TRL's own environment.

Drives trl's `trl.experimental.ppo.PPOTrainer` as it is and writes what each update cost to the file that the job names.
It runs in an environment without this project, so it imports nothing of it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


def main(job: dict[str, Any]) -> None:
    """Trains for the job's updates and writes their costs."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(job["threads"])
    models = Path(job["models"])
    tokenizer = AutoTokenizer.from_pretrained(models / "policy", padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(models / "policy", dtype=torch.float32) for _ in range(2))
    reward_model, critic = (
        AutoModelForSequenceClassification.from_pretrained(models / "rm", dtype=torch.float32) for _ in range(2)
    )
    prompts = json.loads((models / "prompts.json").read_text())
    lengths: list[float] = []
    updates: list[dict[str, float]] = []

    def note_lengths(module: object, args: object, kwargs: dict[str, Any]) -> None:
        """The reward model reads each update's responses once, cut after their EOS and padded with what is masked."""
        lengths.append(kwargs["attention_mask"].sum(1).float().mean().item() - len(prompts[0]))

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.last = time.process_time(), time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.process_time(), time.perf_counter()
            cpu, wall = (after - before for before, after in zip(self.last, now, strict=True))
            updates.append({"cpu_seconds": cpu, "wall_seconds": wall, "response_length": lengths[-1]})
            self.last = now

    reward_model.base_model.register_forward_pre_hook(note_lengths, with_kwargs=True)
    data = Dataset.from_dict({"input_ids": prompts})
    PPOTrainer(
        args=PPOConfig(output_dir=job["scratch"], **job["config"]),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=critic,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[Clock()],
    ).train()
    if len(lengths) != len(updates):
        raise SystemExit(f"the reward model was called {len(lengths)} times in {len(updates)} updates")
    result = {
        "updates": updates,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "threads": torch.get_num_threads(),
        "packages": {name: metadata.version(name) for name in ("trl", "torch", "transformers", "accelerate")},
    }
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
