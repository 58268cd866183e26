"""STAGE ppo: proximal policy optimisation against a score, one readable loop.

Each update: sample responses from the current policy, score them, compute advantages, optimise policy and critic,
push the new weights into the rollout engine. `python -m policy.ppo.stage runs/<name>/ppo.partial`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.counts import models_in_memory
from pipeline.data import load_prompts
from pipeline.errors import UserError
from pipeline.evaluation.judges import load_judges
from pipeline.evaluation.saved import has_report, load_report, save_report
from pipeline.evaluation.summary import summarise
from pipeline.recipe import PpoSection, Recipe
from pipeline.stage import Preempted, Stage
from pipeline.stage_main import stage_main
from pipeline.tokens import EncodedPrompt, Encoder, encode_prompts, load_tokenizer
from pipeline.tracking import read_metrics
from policy.models import save_model
from policy.ppo.controllers import AdaptiveKLController, FixedKLController, RunningScale
from policy.ppo.experience import Experience, check_engine, experience_metrics, make_experience
from policy.ppo.gate import batch_arithmetic
from policy.ppo.health import Health, Verdict
from policy.ppo.held_out import HeldOut, report_metrics
from policy.ppo.pace import Pace, compare_ranks
from policy.ppo.ptx import PtxLoss, load_ptx
from policy.ppo.roles import Roles, load_roles, memory_by_role, model_names, save_roles, sharded_models
from policy.ppo.rollouts import Rollouts
from policy.ppo.state import Stateful, load_newest_state, save_state
from policy.ppo.update import Learner, UpdateOptions, ppo_update
from rollout.batch import RolloutBatch
from rollout.engine import RolloutEngine
from rollout.open import open_engine
from rollout.server_client import RolloutServerError

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
    rollouts: Rollouts
    encoder: Encoder
    held_out: HeldOut
    health: Health
    ptx: PtxLoss | None = None
    pace: Pace = field(default_factory=Pace)

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.stage.recipe

    @property
    def engine(self) -> RolloutEngine:
        """What samples."""
        return self.rollouts.engine

    @property
    def parts(self) -> dict[str, Stateful]:
        """All whose state an exact resume needs."""
        parts: dict[str, Stateful] = {
            **self.roles.parts,
            "learner": self.learner,
            "policy_optimizer": self.learner.policy_optimizer,
            "critic_optimizer": self.learner.critic_optimizer,
            "rollouts": self.rollouts,
            "kl_controller": self.controller,
            "health": self.health,
        }
        return parts if self.scale is None else {**parts, "score_scale": self.scale}

    def begin_update(self) -> None:
        """Starts the clocks of an update."""
        self.pace = Pace(self.stage.ranks)

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """See `Pace.timed`."""
        return self.pace.timed(phase)


def run(stage: Stage) -> dict[str, Any]:
    """Trains the policy and writes it with its critic, evaluations and summary; all ranks run it."""
    ppo = stage.recipe.ppo
    training = set_up(stage)
    with closing(training.engine), stage.progress(ppo.updates, "ppo") as progress:
        for update in range(resume(training) + 1, ppo.updates + 1):
            metrics, lost = one_update(training, update)
            stage.tracker.log(update, metrics)
            progress.update(update, {key.rpartition("/")[2]: metrics[key] for key in SHOWN})
            if lost is None and evaluation_is_due(ppo, update):
                lost = lost_in(partial(evaluate, training, update))
            diagnose(training, update, metrics)
            told = stage.told_to_save() and update < ppo.updates
            if told or lost is not None or (update % ppo.save_every == 0 and update < ppo.updates):
                save(training, update)
            if lost is not None:
                raise lost
            if told:
                raise Preempted(update)
    return finish(training)


def one_update(training: Run, update: int) -> tuple[dict[str, float], RolloutServerError | None]:
    """Rollout, experience, optimisation, and new weights for the engine; returns the update's metrics.

    A server that is lost while it samples ends the run with the state before the update saved; one that is lost when
    it is to take the new weights, an error that is returned, with the state after it.
    """
    recipe, ppo = training.recipe, training.recipe.ppo
    training.begin_update()
    with training.timed("rollout"):
        try:
            batch, prompts = training.rollouts.take(update)
        except RolloutServerError:
            if update > 1:
                save(training, update - 1)
            raise
        training.rollouts.begin(update + 1)
        training.engine.rest()
    with training.timed("experience"):
        experience = make_experience(
            training.roles,
            batch,
            ppo,
            training.controller.kl_coef,
            prompts,
            scale=training.scale,
            logprob_tolerance=recipe.rollout.logprob_tolerance,
        )
        gap = check_engine(experience, recipe, update, training.engine.name)
    with training.timed("update"):
        options = UpdateOptions(
            ppo, recipe.data.max_response_tokens, train_policy=update > ppo.critic_warmup_updates, ptx=training.ptx
        )
        losses = ppo_update(training.roles, training.learner, experience, options)
    say_skipped(training, update, experience.batch)
    with training.timed("rollout"):
        lost = lost_in(training.rollouts.end)
    with training.timed("sync"):
        lost = lost or lost_in(lambda: training.engine.load_weights(training.roles.weights(), version=update))
    metrics = summarise_update(training, update, experience, losses, gap)
    if math.isfinite(metrics["objective/kl"]):
        training.controller.update(metrics["objective/kl"], ppo.rollout_batch_size)
    return metrics, lost


def set_up(stage: Stage) -> Run:
    """Loads data, the models and the engine; refuses what would train garbage before any model is loaded."""
    recipe, ppo = stage.recipe, stage.recipe.ppo
    policy_input = stage.inputs["policy"]
    tokenizer = load_tokenizer(policy_input.path, recipe.model)
    stage.record_tokenizer(tokenizer)
    judges = load_judges(recipe.eval)
    encoder = Encoder(tokenizer, recipe.data.max_prompt_tokens, recipe.data.max_response_tokens)
    train, held_out = _prompts(stage, encoder)
    ptx = load_ptx(stage, encoder)
    roles = load_roles(stage, encoder, train, stage.ranks.device)
    if ppo.kl_target_per_sequence is None:
        controller = FixedKLController(ppo.kl_coef)
    else:
        controller = AdaptiveKLController(ppo.kl_coef, ppo.kl_target_per_sequence, ppo.kl_horizon)
    engine = open_engine(recipe, _engine_directory(stage, roles, encoder), stage.say, ranks=stage.ranks)
    stage.record(engine={"name": engine.name, "version": engine.version})
    _say_arithmetic(stage, roles, engine)
    return Run(
        stage=stage,
        roles=roles,
        learner=Learner.create(roles, ppo, recipe.seed),
        controller=controller,
        scale=RunningScale() if ppo.score_scaling == "running" else None,
        rollouts=Rollouts(engine, train, recipe, encoder.pad_token_id),
        encoder=encoder,
        held_out=HeldOut(held_out, encoder, judges, recipe),
        health=Health(ppo),
        ptx=ptx,
    )


def resume(training: Run) -> int:
    """Restores the newest saved state and returns the number of updates done; a fresh run evaluates SFT first."""
    stage = training.stage
    done = load_newest_state(stage.state, training.parts, stage.ranks, say=stage.say)
    stage.tracker.rewind(-1 if done is None else done)
    if done is not None or stage.recipe.rollout.mode == "server":
        training.engine.load_weights(training.roles.weights(), version=done or 0)
    if done is None:
        evaluate(training, 0)
        return 0
    stage.say(f"resumed after update {done} of {stage.recipe.ppo.updates}")
    if evaluation_is_due(stage.recipe.ppo, done) and stage.ranks.broadcast(not has_report(stage.out, done)):
        evaluate(training, done)
    return done


def summarise_update(
    training: Run, update: int, experience: Experience, losses: dict[str, float], gap: tuple[float, float]
) -> dict[str, float]:
    """The update's row of metrics.jsonl, under the names of trl's PPOTrainer; all means are masked.

    It is that of rank 0 on all ranks, so that they decide alike.
    """
    batch = experience.batch
    tokens = batch.response_mask.sum().item()
    metrics = {
        **experience_metrics(experience, training.controller.kl_coef),
        **losses,
        "policy/skipped_steps": float(training.learner.skipped_steps),
        "rollout/generated_tokens": tokens,
        "rollout/max_logprob_gap": gap[0],
        "rollout/mean_probability_gap": gap[1],
        "lr/policy": float(training.learner.policy_schedule.get_last_lr()[0]),
        "rollout/staleness": update - 1 - batch.policy_versions.float().mean().item(),
        "time/rollout_tokens_per_second": tokens / training.pace.seconds["rollout"],
        **{f"time/{phase}": value for phase, value in training.pace.seconds.items()},
        "time/cpu_seconds": training.pace.cpu_seconds,
        **compare_ranks(training.stage, training.pace, update, tokens),
    }
    return training.stage.ranks.broadcast(metrics)


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
    stage = training.stage
    save_state(stage.state, update, training.parts, stage.ranks, keep=stage.recipe.ppo.keep_states)


def evaluation_is_due(ppo: PpoSection, update: int) -> bool:
    """Whether the policy is evaluated after `update`."""
    return update % ppo.eval_every == 0 or update == ppo.updates


def lost_in(act: Callable[[], None]) -> RolloutServerError | None:
    """Does it; a server that is lost meanwhile is returned, so that the state is saved before the run ends."""
    try:
        act()
    except RolloutServerError as error:
        return error
    return None


def evaluate(training: Run, update: int) -> None:
    """Held-out evaluation: numbers into metrics.jsonl, a fixed set of generations into samples.jsonl."""
    stage = training.stage
    report = training.held_out.evaluate(training.roles, training.engine)
    if report is None:
        return
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
    save_roles(training.roles, recipe, training.encoder.tokenizer, stage.out, stage.inputs["policy"].path)
    if not stage.ranks.is_main:
        return {}
    before, after = load_report(stage.out, 0), load_report(stage.out, recipe.ppo.updates)
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
    save_model(roles.policy, encoder.tokenizer, directory, roles.weights(), ranks=stage.ranks)
    return directory


def _say_arithmetic(stage: Stage, roles: Roles, engine: RolloutEngine) -> None:
    ppo = stage.recipe.ppo
    size = sum(p.numel() for p in roles.policy.parameters()) / 1e6
    trained = sum(p.numel() for p in roles.trainable()) / 1e6
    stage.say(f"policy {size:.1f}M parameters, {trained:.2f}M trained; rollouts by {engine.name} {engine.version}")
    memory = memory_by_role(roles)
    stage.record(memory=memory, models_in_memory=models_in_memory(model_names(roles)))
    if stage.ranks.world > 1:
        sharded = ", ".join(sharded_models(roles)) or "none"
        stage.say(f"{stage.ranks.world} ranks share every batch; models in parts on them: {sharded}")
    shown = (f"{role} {m['weights']:.1f} + {m['training']:.1f}" for role, m in memory.items())
    stage.say(f"MiB of weights + gradients and Adam, ppo.sharing {ppo.sharing}: " + ", ".join(shown))
    stage.say(batch_arithmetic(ppo))


if __name__ == "__main__":
    stage_main("ppo", run=run)
