"""The whole training state of PPO on disk: saved every few updates by all ranks, and read back by any number of them.

`state/update_000012/` holds

    replicated.pt    what all ranks have the same, written by rank 0
    rank_<r>.pt      rank r's random generators, and the parts marked as `PerRank`
    shards/          sharded weights and optimiser moments, by all ranks: torch.distributed.checkpoint
    checkpoint.json  update, number of ranks, and the sha256 of every file; written last
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import sync_directory
from pipeline.errors import UserError
from pipeline.ranks import ALONE, Ranks
from pipeline.seals import find_damage, hash_files, shown, together
from policy.ppo import state_files as files
from policy.ppo.random_state import random_state, restore_random_state
from policy.ppo.state_shards import Stateful, filled, repeated, split, write_shards

KEPT = 2


@dataclass(frozen=True)
class PerRank:
    """A part whose state differs between the ranks; of a rank that did not exist when it was saved it stays fresh."""

    part: Stateful


Parts = Mapping[str, Stateful | PerRank]


def save_state(directory: Path, update: int, parts: Parts, ranks: Ranks = ALONE, *, keep: int = KEPT) -> None:
    """Writes `update_<n>/` after `update` updates: the state of every part, and the random generators.

    All ranks call it. Data order and sampling seeds are functions of the update number, so it is the data position
    too. An optimiser is a part of its own, so that its moments can be sharded as its weights are; all else may come in
    any part. The newest `keep` states are kept.

    Errors:
        UserError: the ranks do not share `directory`.
        OSError, RuntimeError: a rank could not write; all of them raise, and there is no new state.
    """
    plain, shards = split({name: part.state_dict() for name, part in parts.items() if not isinstance(part, PerRank)})
    same = ranks.broadcast(repeated(shards))
    folder = files.beside(directory, update)
    with together(ranks):
        if ranks.is_main:
            files.begin(directory, update)
    _refuse_separate_disks(folder, ranks)
    with together(ranks):
        if ranks.is_main:
            _write(folder / files.REPLICATED, {"parts": plain, "same": same})
        own = {name: part.part.state_dict() for name, part in parts.items() if isinstance(part, PerRank)}
        _write(folder / files.rank_file(ranks.rank), {"random": random_state(ranks.device), "parts": own})
    if shards:
        write_shards(folder / files.SHARDS, {name: shards[name] for name in shards if name not in same})
    with together(ranks):
        hashes = hash_files(folder, files.written_by(folder, ranks.rank))
    every = {name: sha256 for part in ranks.gather(hashes) for name, sha256 in part.items()}
    with together(ranks):
        if ranks.is_main:
            files.commit(directory, update, ranks.world, every, keep)


def load_newest_state(directory: Path, parts: Parts, ranks: Ranks = ALONE, *, say: Callable[[str], None]) -> int | None:
    """Restores the newest whole state of every part in place; returns its update number, or None when there is none.

    All ranks call it and take the same state. A damaged one is passed over and renamed, and `say` tells of it. The
    number of ranks may be another than when it was saved: what is sharded is sharded anew, and a rank that did not
    exist takes the random generators of rank 0.

    Errors:
        UserError: there are states, and all of them are damaged.
    """
    with together(ranks):
        if ranks.is_main:
            files.sweep(directory)
    seal, damages = _newest_whole(directory, ranks)
    if seal is None:
        if damages:
            raise UserError(
                f"no saved state of this stage is whole: {'; '.join(damages.values())}.",
                mend="Restore the files, or run the stage again with --overwrite: it starts anew.",
            )
        return None
    with together(ranks):
        if ranks.is_main:
            for update in damages:
                files.set_aside(directory, update)
    for damage in damages.values():
        say(f"{damage}: going on from update {seal['update']}")
    if seal["world"] != ranks.world:
        say(
            f"saved by {_processes(seal['world'])}, resumed by {ranks.world}: results agree with an undisturbed run to "
            "about 1e-5, not bit for bit"
        )
    _restore(files.folder_of(directory, seal["update"]), seal["world"], parts, ranks)
    return seal["update"]


def _newest_whole(directory: Path, ranks: Ranks) -> tuple[dict[str, Any] | None, dict[int, str]]:
    """The seal of the newest whole state, and what is damaged of the newer ones, by update; the same on all ranks."""
    damages: dict[int, str] = {}
    for update in reversed(ranks.broadcast(files.updates(directory))):
        folder = files.folder_of(directory, update)
        with together(ranks):
            seal = files.read_state_seal(directory, update) if ranks.is_main else None
        seal = ranks.broadcast(seal)
        if seal is None:
            damage = f"{shown(folder / files.SEAL, folder)} is missing or damaged"
        else:
            damage = find_damage(folder, seal["files"], ranks)
        if damage is None:
            return seal, damages
        damages[update] = damage
    return None, damages


def _restore(folder: Path, world: int, parts: Parts, ranks: Ranks) -> None:
    existed = ranks.rank < world
    with together(ranks):
        replicated = _read(folder / files.REPLICATED)
        own = _read(folder / files.rank_file(ranks.rank if existed else 0))
    shared = {name: part for name, part in parts.items() if not isinstance(part, PerRank)}
    state = filled(replicated["parts"], shared, replicated["same"], folder / files.SHARDS, ranks)
    for name, part in shared.items():
        part.load_state_dict(state[name])
    for name, part in parts.items():
        if isinstance(part, PerRank) and existed:
            part.part.load_state_dict(own["parts"][name])
    restore_random_state(own["random"], ranks.device)


def _write(file: Path, content: dict[str, Any]) -> None:
    torch.save(content, file)
    sync_directory(file)


def _read(file: Path) -> dict[str, Any]:
    return torch.load(file, map_location="cpu", weights_only=True)


def _refuse_separate_disks(folder: Path, ranks: Ranks) -> None:
    blind = [rank for rank, sees in enumerate(ranks.gather(folder.is_dir())) if not sees]
    if blind:
        raise UserError(
            f"{folder.parent}: rank 0 made a folder there, and ranks {blind} do not see it.",
            mend="Set output_dir to a directory that all machines share.",
        )


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"
