"""The frozen lake: a deterministic grid of 4 moves, its optimal policy by value iteration, and walks over it.

Shapes: S states, the cells row by row; A = 4 actions, left, down, right and up, as in Gymnasium's FrozenLake.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ACTIONS = "LDRU"
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))
DISCOUNT = 0.9
"""Below 1, so that a shorter way is worth more; which ways are the shortest does not depend on it."""
SAME = 1e-9
"""Action values closer than this are equal."""


@dataclass(frozen=True)
class Lake:
    """A map, one text per row (S start, F frozen, H hole, G goal), and two walks over it, a letter per action."""

    rows: tuple[str, ...]
    optimal: str
    sub_optimal: str


LAKES = {
    "4x4": Lake(("SFFF", "FHFH", "FFFH", "HFFG"), optimal="DDRDRR", sub_optimal="RRRLDDDR"),
    "unique": Lake(("SFFF", "FHFH", "FFHH", "HFFG"), optimal="DDRDRR", sub_optimal="RRRLLLDDRDRR"),
}
"""`4x4` is Gymnasium's, where two cells have two best actions; `unique` has a hole more, and one best action in every
cell. The sub-optimal walk is the shortest by way of the corner at the top right: on `4x4` it goes on along the other
shore, on `unique` it must come back."""


@dataclass(frozen=True)
class World:
    """A lake. The reward is 1 for the move onto the goal and 0 otherwise; holes and the goal end a walk.

    Attributes:
        next_states: the cell that each action leads to, [S,A]; a move off the grid stays, as does any from a terminal.
        terminal: whether a cell is a hole or the goal, bool [S].
        start, goal: their numbers.
    """

    next_states: Tensor
    terminal: Tensor
    start: int
    goal: int

    @property
    def states(self) -> int:
        """Number of cells, terminal ones included."""
        return len(self.terminal)


@dataclass(frozen=True)
class Walk:
    """States [T] and the action taken in each [T], from the start until the goal, which is not among the states."""

    states: Tensor
    actions: Tensor


def make_world(rows: tuple[str, ...]) -> World:
    """The lake of a map, one text per row of cells. Raises ValueError without exactly one start and one goal."""
    cells = "".join(rows)
    if cells.count("S") != 1 or cells.count("G") != 1:
        raise ValueError(f"a map has one S and one G, not {cells.count('S')} and {cells.count('G')}")
    height, width = len(rows), len(rows[0])
    next_states = torch.empty(len(cells), len(ACTIONS), dtype=torch.long)
    for state, kind in enumerate(cells):
        for action, (down, right) in enumerate(MOVES):
            row, column = state // width + down, state % width + right
            moves = kind in "SF" and 0 <= row < height and 0 <= column < width
            next_states[state, action] = row * width + column if moves else state
    terminal = torch.tensor([kind in "HG" for kind in cells])
    return World(next_states, terminal, start=cells.index("S"), goal=cells.index("G"))


def action_values(world: World, discount: float = DISCOUNT) -> Tensor:
    """Q(s, a) = r(s') + discount * max_a' Q(s', a') by value iteration, float64 [S,A]; 0 in terminal states.

    Exact after S sweeps: no shortest way is longer. Source: Sutton and Barto (2018), section 4.4.
    """
    reward = (world.next_states == world.goal).double().masked_fill(world.terminal[:, None], 0.0)
    values = torch.zeros_like(reward)
    for _ in range(world.states):
        values = reward + discount * values.max(1).values[world.next_states]
    return values


def optimal_policy(world: World) -> Tensor:
    """Probabilities of the actions, float64 [S,A]: the best ones share 1, the others have 0."""
    values = action_values(world)
    best = (values >= values.max(1, keepdim=True).values - SAME).double()
    return best / best.sum(1, keepdim=True)


def walk(world: World, actions: str) -> Walk:
    """The walk from the start by the given actions (letters of `ACTIONS`).

    Raises ValueError for another letter, and when the walk goes on after its end or does not end at the goal.
    """
    if set(actions) - set(ACTIONS):
        raise ValueError(f"the walk {actions} has other letters than {ACTIONS}")
    states, taken = [], []
    state = world.start
    for action in map(ACTIONS.index, actions):
        if world.terminal[state]:
            raise ValueError(f"the walk {actions} is over after {len(taken)} actions")
        states.append(state)
        taken.append(action)
        state = int(world.next_states[state, action])
    if state != world.goal:
        raise ValueError(f"the walk {actions} does not end at the goal")
    return Walk(torch.tensor(states), torch.tensor(taken))


def squared_distances(policies: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """Mean of (policy - target)^2 over the states `rows` (numbers or bool [S]) and all actions, [..,S,A] -> [..].

    In a deterministic world the action is the transition, so these are distances of transition matrices.
    """
    return (policies.double() - target.double())[..., rows, :].square().mean((-2, -1))
