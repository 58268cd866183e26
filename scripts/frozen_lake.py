"""The toy world of the IFT paper: how near do SFT, ORPO, IFT and DPO come to the optimal policy of a frozen lake?

    python -m scripts.frozen_lake [--seeds 10 --steps 300 --map 4x4 --sub-optimal RRRLDDDR --out benchmarks]

A two-layer network learns both an optimal and a sub-optimal walk: the base, which is also DPO's reference. From it SFT
and IFT go on with the optimal walk, ORPO and DPO with the pair. Measured is the mean squared distance of their
transition matrix to the one that value iteration finds. Exit code 1 when IFT ends farther from it than SFT; the rest is
reported as it is. Source: Hua et al. 2024 (arXiv:2405.11870), section 5.3 and appendix B.2, which leave open map,
walks, base, steps and which states count. Those here are in `Settings` and `LAKES`, and the order depends on them: with
`--sub-optimal RRLLDDRDRR` on the map `4x4`, a way there and back, IFT ends farther than SFT.
"""

from __future__ import annotations

import argparse
import copy
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from policy.losses.dpo import dpo_loss
from policy.losses.ift import further_tokens, ift_loss, temporal_residual
from policy.losses.orpo import orpo_loss
from policy.losses.pairs import PairLogprobs
from scripts.frozen_lake_report import Outcome, write
from scripts.frozen_lake_world import ACTIONS, LAKES, Walk, World, make_world, optimal_policy, squared_distances, walk
from scripts.learn_ppo_stats import STUDENT_975

MEASURE_EVERY = 10


@dataclass(frozen=True)
class Settings:
    """The experiment. `steps` are those of the base, and of each method after it.

    ORPO's coefficient is the IFT paper's, IFT's two are its repository's defaults; no beta of DPO is given for it.
    """

    map: str = "4x4"
    sub_optimal: str = LAKES["4x4"].sub_optimal
    seeds: int = 10
    steps: int = 300
    hidden: int = 64
    learning_rate: float = 1e-3
    dpo_beta: float = 1.0
    orpo_beta: float = 0.25
    ift_gamma: float = 0.95
    ift_residual: float = 0.2


class Policies(nn.Module):
    """One network per seed, K in all: cells as one-hot vectors [..,N,S] -> log-probabilities of the actions [K,N,A].

    Linear, ReLU, linear. Weights and biases start uniform within +-1 / sqrt(inputs), from one generator per seed, so
    that a seed's network is the same whatever the number of seeds.
    """

    def __init__(self, seeds: int, states: int, hidden: int) -> None:
        super().__init__()
        generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]

        def uniform(inputs: int, rows: int, columns: int) -> nn.Parameter:
            drawn = [torch.rand(rows, columns, generator=generator) for generator in generators]
            return nn.Parameter((2 * torch.stack(drawn) - 1) / math.sqrt(inputs))

        self.inner, self.inner_bias = uniform(states, states, hidden), uniform(states, 1, hidden)
        self.outer, self.outer_bias = uniform(hidden, hidden, len(ACTIONS)), uniform(hidden, 1, len(ACTIONS))

    @property
    def embeddings(self) -> Tensor:
        """The cells as one-hot vectors, [S,S]."""
        return torch.eye(self.inner.shape[1])

    def forward(self, cells: Tensor) -> Tensor:
        inner = torch.relu(cells @ self.inner + self.inner_bias)
        return (inner @ self.outer + self.outer_bias).log_softmax(-1)


@dataclass(frozen=True)
class Lesson:
    """What the methods learn from: the pair of walks, and the base's log-probabilities of both, [K] each."""

    settings: Settings
    world: World
    chosen: Walk
    rejected: Walk
    ref_chosen: Tensor
    ref_rejected: Tensor

    def pair(self, policies: Policies) -> PairLogprobs:
        """One row per seed."""
        chosen, rejected = walk_logprobs(policies, self.chosen), walk_logprobs(policies, self.rejected)
        tokens = [torch.full_like(self.ref_chosen, part.shape[1]) for part in (chosen, rejected)]
        return PairLogprobs(chosen.sum(1), rejected.sum(1), tokens[0], tokens[1], self.ref_chosen, self.ref_rejected)


def walk_logprobs(policies: Policies, taken: Walk) -> Tensor:
    """Log-probability of each action of a walk, [K,T]."""
    return _of_actions(policies(policies.embeddings[taken.states]), taken)


def imitation(policies: Policies, *walks: Walk) -> Tensor:
    """-log-probability, mean over all actions of the walks, summed over the seeds: each of them trains as if alone."""
    return -torch.cat([walk_logprobs(policies, part) for part in walks], 1).mean(1).sum()


def sft(policies: Policies, lesson: Lesson) -> Tensor:
    """The optimal walk. Sums over the seeds, as all losses here."""
    return imitation(policies, lesson.chosen)


def orpo(policies: Policies, lesson: Lesson) -> Tensor:
    """SFT and the odds ratio of the two walks."""
    beta, nll = lesson.settings.orpo_beta, sft(policies, lesson)
    return orpo_loss(lesson.pair(policies), beta=beta, chosen_nll=nll, denominator=1)[0]


def ift(policies: Policies, lesson: Lesson) -> Tensor:
    """The optimal walk, each cell mixed with the one that the policy's best action leads to from the cell before.

    A cell stands for a token, its one-hot vector for the frozen embedding; the actions scored are those of the walk.
    """
    settings, states = lesson.settings, lesson.chosen.states
    embeddings = policies.embeddings
    with torch.no_grad():
        predicted = lesson.world.next_states[states, policies(embeddings[states]).argmax(-1)]
    ids = states.expand_as(predicted)
    mask = torch.ones_like(ids, dtype=torch.bool)
    further = embeddings[further_tokens(predicted, ids, mask)]
    mixed = temporal_residual(embeddings[ids], further, settings.ift_residual)
    logprobs = _of_actions(policies(mixed), lesson.chosen)
    return ift_loss(logprobs, mask, gamma=settings.ift_gamma, denominator=1)[0]


def dpo(policies: Policies, lesson: Lesson) -> Tensor:
    """The pair of walks, with the base as reference."""
    return dpo_loss(lesson.pair(policies), beta=lesson.settings.dpo_beta, denominator=1)[0]


LOSSES: dict[str, Callable[[Policies, Lesson], Tensor]] = {"sft": sft, "orpo": orpo, "ift": ift, "dpo": dpo}


def run(settings: Settings) -> Outcome:
    """The base, then every method from it. Raises ValueError for a sub-optimal walk that does not end at the goal."""
    lake = LAKES[settings.map]
    world = make_world(lake.rows)
    target = optimal_policy(world)
    chosen, rejected = walk(world, lake.optimal), walk(world, settings.sub_optimal)
    base = make_base(settings, world, (chosen, rejected))
    with torch.no_grad():
        references = [walk_logprobs(base, part).sum(1) for part in (chosen, rejected)]
    lesson = Lesson(settings, world, chosen, rejected, *references)
    steps = sorted({*range(0, settings.steps, MEASURE_EVERY), settings.steps})

    def distances(policies: Policies) -> Tensor:
        with torch.no_grad():
            matrices = policies(policies.embeddings).exp()
        return torch.stack([squared_distances(matrices, target, rows) for rows in (~world.terminal, chosen.states)])

    curves = {}
    for name, loss in LOSSES.items():
        policies = copy.deepcopy(base)
        points = [distances(policies)]
        for step in descend(policies, lambda policies, loss=loss: loss(policies, lesson), settings):
            if step in steps:
                points.append(distances(policies))
        curves[name] = torch.stack(points).numpy()
    certain = one_hot(chosen.actions, len(ACTIONS))
    followed = (certain - target[chosen.states]).square().mean()
    return Outcome(asdict(settings), steps, curves, float(followed))


def make_base(settings: Settings, world: World, walks: Sequence[Walk]) -> Policies:
    """Networks that learnt the walks."""
    policies = Policies(settings.seeds, world.states, settings.hidden)
    for _ in descend(policies, lambda policies: imitation(policies, *walks), settings):
        pass
    return policies


def descend(policies: Policies, loss: Callable[[Policies], Tensor], settings: Settings) -> Iterator[int]:
    """Trains in place and yields the number of each step, 1 first. RMSprop works element by element."""
    optimiser = torch.optim.RMSprop(policies.parameters(), lr=settings.learning_rate)
    for step in range(1, settings.steps + 1):
        optimiser.zero_grad()
        loss(policies).backward()
        optimiser.step()
        yield step


def _of_actions(logprobs: Tensor, taken: Walk) -> Tensor:
    """Of [K,T,A] those of the walk's actions, [K,T]."""
    actions = taken.actions.expand(len(logprobs), -1)
    return logprobs.gather(-1, actions[..., None]).squeeze(-1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment and writes its report; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    settings, out = _parse(words)
    out.mkdir(parents=True, exist_ok=True)
    claim = write(out, run(settings), shlex.join(["python", "-m", "scripts.frozen_lake", *words]))
    if not claim.holds:
        sys.stderr.write(f"claim fails: {claim.text}\n")
    return 0 if claim.holds else 1


def _parse(words: Sequence[str]) -> tuple[Settings, Path]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    most = len(STUDENT_975) + 1
    parser.add_argument("--seeds", type=int, default=Settings.seeds, help=f"2 to {most} (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=Settings.steps, help="of the base and of each method (%(default)s)"
    )
    parser.add_argument("--map", choices=LAKES, default=Settings.map, help="(default: %(default)s)")
    parser.add_argument("--sub-optimal", metavar="ACTIONS", help="a longer walk to the goal, letters L, D, R and U")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="where the report goes (%(default)s)")
    options = parser.parse_args(words)
    if not 2 <= options.seeds <= most or options.steps < 1:
        parser.error(f"--seeds must lie between 2 and {most}, --steps above 0")
    lake = LAKES[options.map]
    sub_optimal = options.sub_optimal or lake.sub_optimal
    try:
        walk(make_world(lake.rows), sub_optimal)
    except ValueError as error:
        parser.error(f"--sub-optimal: {error}")
    if len(sub_optimal) <= len(lake.optimal):
        parser.error(f"--sub-optimal: {sub_optimal} is no longer than {lake.optimal}, the optimal walk")
    settings = Settings(options.map, sub_optimal, options.seeds, options.steps)
    return settings, options.out


if __name__ == "__main__":
    raise SystemExit(main())
