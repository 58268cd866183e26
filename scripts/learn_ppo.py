"""Whether PPO learns: several seeds against two baselines, the reward-KL frontier, and a reward that is broken.

    python -m scripts.learn_ppo [RECIPE] [--seeds 0,1,2 --frontier 0.4,0.2,0.1,0.05] [--section.key value ...]

All runs are ordinary stages below `--out`; finished ones are skipped and an interrupted one goes on when the same
command is given again. Gold scores are those of the recipe's judges, which no stage trains on. Exit code 1 when a
claim fails. `--quick` makes one seed with 2 updates per run, to try the experiment itself: its claims mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import open_artifact, read_manifest, write_json, write_text
from pipeline.data import load_prompts, load_rankings
from pipeline.errors import UserError
from pipeline.evaluation.judges import load_judges
from pipeline.evaluation.policy_eval import PolicyReport, SampledResponses, measure, sample_responses
from pipeline.evaluation.saved import load_report, load_reports
from pipeline.exits import EXIT_USER_ERROR, print_error
from pipeline.load import load_recipe
from pipeline.recipe import Recipe
from pipeline.runner import run_stage
from pipeline.tokens import Encoder, encode_prompts, load_tokenizer
from reward_model.score import load_reward_model, read_normalisation, score_responses
from rollout.open import open_engine
from scripts.learn_ppo_report import Arms, LengthRun, Outcome, write
from scripts.learn_ppo_stats import best_of

KL_TARGET = 10.0
"""Nats per sequence, about where the demo's runs at its fixed kl_coef end."""
KL_START, KL_HORIZON = 0.2, 1280.0
"""The controller starts at twice the demo's kl_coef and moves it by at most 2% per update of 128, so that the KL comes
up to its target from below: a run of 40 updates is too short to come back from beyond it."""
BROKEN_KL_COEF = 0.01
LENGTH_RANKINGS = 1000
"""Training rankings of the reward model that pays for length, which is easily learnt."""
QUICK = ("--ppo.updates", "2", "--ppo.eval_every", "1")


@dataclass
class Experiment:
    """What is run and where.

    Attributes:
        overrides: recipe keys for every run, as on the command line.
        commands: every stage's command so far.
    """

    recipe: str
    out: str
    seeds: Sequence[int]
    frontier: Sequence[float]
    best_of: int
    overrides: Sequence[str]
    commands: list[str] = field(default_factory=list)

    def stage(self, stage: str, name: str, seed: int, *keys: str) -> Path:
        """Runs one stage of the pipeline `name` unless it is done; returns its directory."""
        words = ["tristage", stage, *self._words(name, seed, *keys)]
        self.commands.append(shlex.join(words))
        return run_stage(load_recipe(words[2], words[3:]), stage, overwrite=False, command=words, inputs={})

    def resolved(self, name: str, seed: int, *keys: str) -> Recipe:
        """The recipe of the pipeline `name`."""
        path, *overrides = self._words(name, seed, *keys)
        return load_recipe(path, overrides)

    def _words(self, name: str, seed: int, *keys: str) -> list[str]:
        fixed = ["--output_dir", self.out, "--name", name, "--seed", str(seed)]
        return [self.recipe, *fixed, *self.overrides, *keys]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment and writes its report; returns the exit code."""
    experiment = _parse(arguments)
    try:
        outcome = run(experiment)
    except UserError as error:
        print_error(str(error))
        return EXIT_USER_ERROR
    failed = [claim for claim in write(Path(experiment.out), outcome) if not claim.holds]
    for claim in failed:
        sys.stderr.write(f"claim fails: {claim.text}\n")
    return 1 if failed else 0


def run(experiment: Experiment) -> Outcome:
    """All runs in order, then the baselines that need an engine in this process.

    Errors:
        UserError, SystemExit: a stage refuses or fails, as under `tristage`.
    """
    policies = {seed: _seed_runs(experiment, seed) for seed in experiment.seeds}
    first = experiment.seeds[0]
    made = Path(experiment.out) / f"seed{first}"
    shared = ("--ppo.policy", str(made / "sft"), "--ppo.reward_model", str(made / "rm"))
    frontier = {}
    for kl_coef in sorted(experiment.frontier, reverse=True):
        frontier[kl_coef] = _last(experiment.stage("ppo", f"kl_coef-{kl_coef:g}", first, *shared, *_fixed(kl_coef)))
    length = _length_run(experiment, first)
    arms = {
        seed: Arms(load_report(ppo, 0), _best_of_n(experiment, seed, ppo), _last(ppo), read_manifest(ppo)["health"])
        for seed, ppo in policies.items()
    }
    return Outcome(arms, frontier, length, experiment.best_of, KL_TARGET, tuple(experiment.commands))


def length_rankings(recipe: Recipe, most: int) -> list[dict[str, Any]]:
    """Rows of `data.preferences` with the longest answer ranked best, by words: `most` training ones, all held out."""
    split = load_rankings(recipe.data)
    sides = [("train", ranking) for ranking in split.train[:most]] + [("eval", ranking) for ranking in split.eval]
    rows = []
    for side, ranking in sides:
        words = [len(response.split()) for response in ranking.responses]
        ranks = [sum(other > own for other in words) for own in words]
        row = {"prompt": ranking.prompt.content, "responses": ranking.responses, "ranks": ranks, "split": side}
        rows.append(row)
    return rows


def best_of_n(recipe: Recipe, sft: Path, reward_model: Path, n: int) -> PolicyReport:
    """For each held-out prompt and sample slot the best of `n` SFT samples by the reward model, judged.

    Prompts, number of slots, temperature and token limit are those of PPO's evaluations.
    """
    tokenizer = load_tokenizer(str(sft), recipe.model)
    encoder = Encoder(tokenizer, recipe.data.max_prompt_tokens, recipe.data.max_response_tokens)
    held_out, _ = encode_prompts(load_prompts(recipe.data).eval, encoder, recipe.data)
    artifact = open_artifact(reward_model, kinds=("rm",), wanted_as="ppo.reward_model")
    with closing(open_engine(recipe, sft, print)) as engine:
        drawn = sample_responses(
            engine,
            held_out[: recipe.eval.prompts],
            max_new_tokens=recipe.data.max_response_tokens,
            temperature=recipe.rollout.temperature,
            samples_per_prompt=n * recipe.eval.samples_per_prompt,
            seed=recipe.seed,
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_reward_model(reward_model, torch.float32, device)
    flat = drawn.flat
    raw = score_responses(model, [ids for _, ids, _ in flat], [list(answer.token_ids) for _, _, answer in flat])
    scores = read_normalisation(artifact).apply(raw)
    kept = best_of(scores.tolist(), n)
    slots = recipe.eval.samples_per_prompt
    completions = [[flat[place][2] for place in kept[start : start + slots]] for start in range(0, len(kept), slots)]
    samples = SampledResponses(drawn.prompts, drawn.prompt_ids, completions)
    judges = load_judges(recipe.eval)
    return measure(samples, encoder, judges, scores=scores[kept], kl_per_sequence=None, seed=recipe.seed)


def _seed_runs(experiment: Experiment, seed: int) -> Path:
    """SFT, reward model and PPO towards the KL target, with one seed; returns PPO's directory."""
    for stage in ("sft", "rm"):
        experiment.stage(stage, f"seed{seed}", seed)
    return experiment.stage("ppo", f"seed{seed}", seed, *_to_target())


def _to_target() -> tuple[str, ...]:
    target = ("--ppo.kl_target_per_sequence", f"{KL_TARGET:g}", "--ppo.kl_horizon", f"{KL_HORIZON:g}")
    return ("--ppo.kl_coef", f"{KL_START:g}", *target)


def _fixed(kl_coef: float) -> tuple[str, ...]:
    return ("--ppo.kl_coef", f"{kl_coef:g}", "--ppo.kl_target_per_sequence", "null")


def _length_run(experiment: Experiment, seed: int) -> LengthRun:
    """A reward model that learnt to pay for length, and PPO against it with next to no KL penalty."""
    rankings = Path(experiment.out) / "length_rankings.jsonl"
    rows = length_rankings(experiment.resolved("length", seed), LENGTH_RANKINGS)
    write_text(rankings, "".join(json.dumps(row) + "\n" for row in rows))
    sft = str(Path(experiment.out) / f"seed{seed}" / "sft")
    wrong = ("--rm.init_from", sft, "--data.preferences", str(rankings), "--rm.margin", "0")
    experiment.stage("rm", "length", seed, *wrong)
    ppo = experiment.stage("ppo", "length", seed, "--ppo.policy", sft, *_fixed(BROKEN_KL_COEF))
    return LengthRun(load_reports(ppo), read_manifest(ppo)["health"])


def _last(ppo: Path) -> PolicyReport:
    return load_report(ppo, read_manifest(ppo)["metrics"]["updates"])


def _best_of_n(experiment: Experiment, seed: int, ppo: Path) -> PolicyReport:
    """`best_of_n` of a seed, kept beside its runs for as long as PPO's fingerprint stays the same."""
    file = ppo.parent / f"best_of_{experiment.best_of}.json"
    mark = read_manifest(ppo)["fingerprint"]["sha256"]
    if file.exists():
        saved = json.loads(file.read_text(encoding="utf-8"))
        if saved["ppo"] == mark:
            return PolicyReport.from_dict(saved["report"])
    recipe = experiment.resolved(f"seed{seed}", seed, *_to_target())
    report = best_of_n(recipe, ppo.parent / "sft", ppo.parent / "rm", experiment.best_of)
    write_json(file, {"ppo": mark, "report": {**report.as_dict(), "rows": report.rows}})
    return report


def _parse(arguments: Sequence[str] | None) -> Experiment:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", default="recipes/demo.yaml")
    parser.add_argument("--seeds", default="0,1,2", help="training seeds (default: %(default)s)")
    parser.add_argument("--frontier", default="0.4,0.2,0.1,0.05", help="values of kl_coef (default: %(default)s)")
    parser.add_argument("--best-of", type=int, default=16, help="samples to choose from (default: %(default)s)")
    parser.add_argument("--out", default="runs/learn", help="directory of all runs (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed, 2 updates per run")
    ours, overrides = split_words(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(ours)
    seeds = [int(word) for word in options.seeds.split(",")]
    return Experiment(
        recipe=options.recipe,
        out=options.out,
        seeds=seeds[:1] if options.quick else seeds,
        frontier=[float(word) for word in options.frontier.split(",")],
        best_of=options.best_of,
        overrides=[*overrides, *(QUICK if options.quick else ())],
    )


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts the experiment's own words from recipe overrides: `--section.key value`, `--section.key=value`."""
    ours: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, sign, _ = word.partition("=")
        if not (name.startswith("--") and "." in name):
            ours.append(word)
            continue
        overrides += [word] if sign else [word, *rest[:1]]
        rest = rest if sign else rest[1:]
    return ours, overrides


if __name__ == "__main__":
    raise SystemExit(main())
