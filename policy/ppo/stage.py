"""STAGE ppo: proximal policy optimisation against a score, one readable loop.

Each update: sample responses from the current policy, score them, compute advantages, optimise policy and critic,
push the new weights into the rollout engine. `python -m policy.ppo.stage runs/<name>/ppo.partial`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from pipeline.counts import models_in_memory
from pipeline.data import load_prompts
from pipeline.errors import UserError
from pipeline.evaluation.judges import load_judges
from pipeline.evaluation.saved import load_report, save_report
from pipeline.evaluation.summary import summarise
from pipeline.recipe import Recipe
from pipeline.records import Prompt
from pipeline.stage import Stage, stage_main
from pipeline.tokens import EncodedPrompt, Encoder, encode_prompts, load_tokenizer
from pipeline.tracking import read_metrics
from policy.models import save_model
from policy.ppo.controllers import AdaptiveKLController, FixedKLController, RunningScale
from policy.ppo.experience import Experience, check_engine, experience_metrics, make_experience
from policy.ppo.gate import batch_arithmetic
from policy.ppo.health import Health, Verdict
from policy.ppo.held_out import HeldOut, report_metrics
from policy.ppo.order import pass_indices
from policy.ppo.ptx import PtxLoss, load_ptx
from policy.ppo.roles import Roles, load_roles, memory_by_role, model_names, save_roles
from policy.ppo.state import Stateful, load_newest_state, save_state
from policy.ppo.update import Learner, UpdateOptions, ppo_update
from rollout.batch import RolloutBatch
from rollout.engine import RolloutEngine, SamplingOptions
from rollout.open import open_engine

NAMED_ROWS = 4
"""Rows of a skipped optimiser step that are named in the log."""
SHOWN = ("objective/scores", "objective/kl", "policy/entropy_avg", "response/length", "response/eos_rate")


@dataclass
class Run:
    """Everything the loop works with."""

    stage: Stage
    roles: Roles
    learner: Learner
    controller: FixedKLController
    scale: RunningScale | None
    engine: RolloutEngine
    encoder: Encoder
    prompts: list[EncodedPrompt]
    held_out: HeldOut
    health: Health
    ptx: PtxLoss | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """The update's wall seconds by phase, and its `cpu_seconds`: those of all threads."""

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.stage.recipe

    @property
    def parts(self) -> dict[str, Stateful]:
        """All whose state an exact resume needs."""
        parts: dict[str, Stateful] = {
            **self.roles.parts,
            "learner": self.learner,
            "kl_controller": self.controller,
            "health": self.health,
        }
        return parts if self.scale is None else {**parts, "score_scale": self.scale}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the block's wall seconds to `seconds[phase]`."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def run(stage: Stage) -> dict[str, Any]:
    """Trains the policy and writes it with its critic, evaluations and summary."""
    ppo = stage.recipe.ppo
    training = set_up(stage)
    with closing(training.engine), stage.progress(ppo.updates, "ppo") as progress:
        done = resume(training)
        for update in range(done + 1, ppo.updates + 1):
            training.seconds, cpu_start = {}, time.process_time()
            with training.timed("rollout"):
                batch, prompts = sample(training, update)
            with training.timed("experience"):
                experience = make_experience(
                    training.roles,
                    batch,
                    ppo,
                    training.controller.kl_coef,
                    prompts,
                    scale=training.scale,
                    logprob_tolerance=stage.recipe.rollout.logprob_tolerance,
                )
                gap = check_engine(experience, stage.recipe, update, training.engine.name)
            with training.timed("update"):
                options = UpdateOptions(
                    ppo,
                    stage.recipe.data.max_response_tokens,
                    train_policy=update > ppo.critic_warmup_updates,
                    ptx=training.ptx,
                )
                losses = ppo_update(training.roles, training.learner, experience, options)
            say_skipped(training, update, experience.batch)
            with training.timed("sync"):
                training.engine.load_weights(training.roles.weights())
            training.seconds["cpu_seconds"] = time.process_time() - cpu_start
            metrics = summarise_update(training, experience, losses, gap)
            if math.isfinite(metrics["objective/kl"]):
                training.controller.update(metrics["objective/kl"], ppo.rollout_batch_size)
            stage.tracker.log(update, metrics)
            progress.update(update, {key.rpartition("/")[2]: metrics[key] for key in SHOWN})
            if update % ppo.eval_every == 0 or update == ppo.updates:
                evaluate(training, update)
            diagnose(training, update, metrics)
            if update % ppo.save_every == 0 and update < ppo.updates:
                save(training, update)
    return finish(training)


def set_up(stage: Stage) -> Run:
    """Loads data, the models and the engine; refuses what would train garbage before any model is loaded."""
    recipe, ppo = stage.recipe, stage.recipe.ppo
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the ppo stage runs in one process.", mend="Start it with `tristage ppo`.")
    policy_input = stage.inputs["policy"]
    tokenizer = load_tokenizer(policy_input.path, recipe.model)
    stage.record_tokenizer(tokenizer)
    judges = load_judges(recipe.eval)
    encoder = Encoder(tokenizer, recipe.data.max_prompt_tokens, recipe.data.max_response_tokens)
    train, held_out = _prompts(stage, encoder)
    ptx = load_ptx(stage, encoder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    roles = load_roles(stage, encoder, train, device)
    if ppo.kl_target_per_sequence is None:
        controller = FixedKLController(ppo.kl_coef)
    else:
        controller = AdaptiveKLController(ppo.kl_coef, ppo.kl_target_per_sequence, ppo.kl_horizon)
    engine = open_engine(recipe, _engine_directory(stage, roles, encoder), stage.say)
    stage.record(engine={"name": engine.name, "version": engine.version})
    _say_arithmetic(stage, roles, engine)
    return Run(
        stage=stage,
        roles=roles,
        learner=Learner.create(roles, ppo, recipe.seed),
        controller=controller,
        scale=RunningScale() if ppo.score_scaling == "running" else None,
        engine=engine,
        encoder=encoder,
        prompts=train,
        held_out=HeldOut(held_out, encoder, judges, recipe),
        health=Health(ppo),
        ptx=ptx,
    )


def resume(training: Run) -> int:
    """Restores the newest saved state and returns the number of updates done; a fresh run evaluates SFT first."""
    stage = training.stage
    done = load_newest_state(stage.state, training.parts)
    stage.tracker.rewind(-1 if done is None else done)
    if done is None:
        evaluate(training, 0)
        return 0
    training.engine.load_weights(training.roles.weights())
    stage.say(f"resumed after update {done} of {stage.recipe.ppo.updates}")
    return done


def sample(training: Run, update: int) -> tuple[RolloutBatch, list[Prompt]]:
    """Responses of the current policy to this update's prompts, and their records.

    Order and seeds depend on the update alone.
    """
    recipe, size = training.recipe, training.recipe.ppo.rollout_batch_size
    chosen = pass_indices(len(training.prompts), size, update, recipe.seed)
    prompts = [training.prompts[index] for index in chosen]
    prompt_ids = [prompt.ids for prompt in prompts]
    seeds = numpy.random.SeedSequence((recipe.seed, update)).generate_state(size).tolist()
    sampling = SamplingOptions(recipe.data.max_response_tokens, recipe.rollout.temperature)
    completions = training.engine.generate(prompt_ids, sampling, seeds)
    batch = RolloutBatch.from_completions(prompt_ids, completions, training.encoder.pad_token_id)
    return batch, [prompt.prompt for prompt in prompts]


def summarise_update(
    training: Run, experience: Experience, losses: dict[str, float], gap: tuple[float, float]
) -> dict[str, float]:
    """The update's row of metrics.jsonl, under the names of trl's PPOTrainer; all means are masked."""
    tokens = experience.batch.response_mask.sum().item()
    seconds = {f"time/{phase}": value for phase, value in training.seconds.items()}
    return {
        **experience_metrics(experience, training.controller.kl_coef),
        **losses,
        "policy/skipped_steps": float(training.learner.skipped_steps),
        "rollout/generated_tokens": tokens,
        "rollout/max_logprob_gap": gap[0],
        "rollout/mean_probability_gap": gap[1],
        "lr/policy": float(training.learner.policy_schedule.get_last_lr()[0]),
        "time/rollout_tokens_per_second": tokens / training.seconds["rollout"],
        **seconds,
    }


def say_skipped(training: Run, update: int, batch: RolloutBatch) -> None:
    """Names the rows of each optimiser step that was skipped, with the start of the first one's prompt."""
    for rows in training.learner.skipped_rows:
        if not rows:
            training.stage.say(
                f"update {update}: the loss on demonstrations (ppo.ptx_coef) was not finite, the optimiser step was "
                "skipped"
            )
            continue
        prompt = training.encoder.decode(batch.prompt_ids[rows[0]][batch.prompt_mask[rows[0]]].tolist())
        named = ", ".join(map(str, rows[:NAMED_ROWS])) + (" ..." if len(rows) > NAMED_ROWS else "")
        training.stage.say(
            f"update {update}: a loss or gradient was not finite, the optimiser step was skipped; {len(rows)} of "
            f"{len(batch)} rows did it: {named}; prompt of row {rows[0]}: {prompt[:80]!r}"
        )


def diagnose(training: Run, update: int, metrics: dict[str, float]) -> None:
    """Says what is wrong with the run; a verdict that stops it saves the state first.

    Errors:
        UserError: such a verdict.
    """
    for verdict in training.health.check(update, metrics):
        announce(training.stage, verdict)
        if verdict.severity == "stop":
            save(training, update)
            raise UserError(
                f"update {update}: {verdict.cause} The state after this update lies in {training.stage.state}.",
                mend=verdict.mend,
            )


def announce(stage: Stage, verdict: Verdict) -> None:
    """A verdict into the log and to W&B."""
    stage.say(str(verdict))
    stage.tracker.alert(f"{stage.recipe.name}: {verdict.name}", str(verdict))


def save(training: Run, update: int) -> None:
    """Writes everything that an exact resume after `update` needs."""
    save_state(training.stage.state, update, training.parts)


def evaluate(training: Run, update: int) -> None:
    """Held-out evaluation: numbers into metrics.jsonl, a fixed set of generations into samples.jsonl."""
    stage = training.stage
    report = training.held_out.evaluate(training.roles, training.engine)
    save_report(stage.out, update, report)
    stage.tracker.log(update, report_metrics(report))
    shown = report.rows[:: report.samples_per_prompt][: stage.recipe.eval.shown_samples]
    stage.tracker.samples(update, shown)
    numbers = {**{name: e.mean for name, e in report.judges.items()}, "kl": report_metrics(report)["eval/kl"]}
    stage.say(f"held out after update {update}: " + "  ".join(f"{k} {v:.3f}" for k, v in numbers.items()))


def finish(training: Run) -> dict[str, Any]:
    """Saves policy and critic, compares with SFT, prints and writes the summary; returns the final metrics."""
    stage, recipe = training.stage, training.recipe
    for verdict in training.health.finish(recipe.ppo.updates):
        announce(stage, verdict)
    stage.record(health=[asdict(verdict) for verdict in training.health.verdicts])
    before, after = load_report(stage.out, 0), load_report(stage.out, recipe.ppo.updates)
    save_roles(training.roles, recipe, training.encoder.tokenizer, stage.out, stage.inputs["policy"].path)
    summary = summarise(before, after, shown=recipe.eval.shown_samples, seed=recipe.seed)
    stage.console.print(summary)
    (stage.out / "summary.md").write_text(summary.markdown(), encoding="utf-8")
    stage.say(f"try it: tristage chat {stage.out.with_name(stage.name)}")
    differences = {name: estimate._asdict() for name, estimate in summary.differences.items()}
    counts = run_counts(read_metrics(stage.out), training.learner.skipped_steps)
    return {"updates": recipe.ppo.updates, "difference": differences, **counts, **report_metrics(after)}


def run_counts(rows: Sequence[Mapping[str, Any]], skipped_steps: int) -> dict[str, int]:
    """Of the whole run, resumed or not, from its rows of metrics.jsonl.

    `trained_tokens`: see `ppo_update`. `generated_tokens`: of the responses that were learnt from, EOS included; those
    of held-out evaluations are not. `optimizer_steps`: of policy and critic together, and in the critic's warm-up of
    the critic alone; skipped ones are not.
    """
    keys = ("policy/trained_tokens", "rollout/generated_tokens", "policy/steps")
    trained, generated, steps = (sum(int(row[key]) for row in rows if key in row) for key in keys)
    return {
        "trained_tokens": trained,
        "generated_tokens": generated,
        "optimizer_steps": steps - skipped_steps,
    }


def _prompts(stage: Stage, encoder: Encoder) -> tuple[list[EncodedPrompt], list[EncodedPrompt]]:
    data = stage.recipe.data
    split = load_prompts(data)
    train, train_lengths = encode_prompts(split.train, encoder, data)
    held_out, held_out_lengths = encode_prompts(split.eval, encoder, data)
    for line in [*split.lines(), *train_lengths.lines()]:
        stage.say(line)
    if not train or not held_out:
        raise UserError(
            "data.prompts: no prompt is left for training or evaluation.", mend="Raise data.max_prompt_tokens."
        )
    lengths = {"train": train_lengths.as_dict(), "eval": held_out_lengths.as_dict()}
    stage.record(data={"prompts": split.report}, lengths=lengths)
    return train, held_out[: stage.recipe.eval.prompts]


def _engine_directory(stage: Stage, roles: Roles, encoder: Encoder) -> Path:
    """A directory that the engine can start from; a policy from a hub is saved first."""
    path = Path(stage.inputs["policy"].path)
    if path.is_dir():
        return path
    directory = stage.state / "engine"
    save_model(roles.policy, encoder.tokenizer, directory, roles.weights())
    return directory


def _say_arithmetic(stage: Stage, roles: Roles, engine: RolloutEngine) -> None:
    ppo = stage.recipe.ppo
    size = sum(p.numel() for p in roles.policy.parameters()) / 1e6
    trained = sum(p.numel() for p in roles.trainable()) / 1e6
    stage.say(f"policy {size:.1f}M parameters, {trained:.2f}M trained; rollouts by {engine.name} {engine.version}")
    memory = memory_by_role(roles)
    stage.record(memory=memory, models_in_memory=models_in_memory(model_names(roles)))
    shown = (f"{role} {m['weights']:.1f} + {m['training']:.1f}" for role, m in memory.items())
    stage.say(f"MiB of weights + gradients and Adam, ppo.sharing {ppo.sharing}: " + ", ".join(shown))
    stage.say(batch_arithmetic(ppo))


if __name__ == "__main__":
    stage_main("ppo", run=run)
