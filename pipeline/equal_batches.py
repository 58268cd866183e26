"""Batches of which every rank gets equally many, whatever the number of rows, and every row counts once.

Libraries repeat rows at an epoch's end to the same purpose, and then those count twice. Here places without a row are
filled with marks instead, which the collator takes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.ranks import Ranks

if TYPE_CHECKING:
    from transformers import Trainer

NO_ROW = -1
"""In place of a row's index."""
UNCOUNTED = "uncounted"
"""Key of a batch that has no row of its own and holds a copy of one: it runs in step with the other ranks' batches."""
Batch = dict[str, Tensor]


class Rows(Protocol):
    """What a data set of this project can do; `datasets.Dataset` does so too."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class DealtSampler(Sampler[int]):
    """The rows of `order`, global batch by global batch; each is dealt out to the ranks in turn, as cards are.

    Batches of `batch_size` cut from it belong to rank 0, 1 ... `world` - 1, 0 and so on, as accelerate gives them out,
    and n of them make the global batch of world * batch_size rows that one process would have. A last one with too
    few rows is filled with `NO_ROW`, or left out with `drop_last`.
    """

    def __init__(self, order: Sampler[int], batch_size: int, world: int, *, drop_last: bool = False) -> None:
        self.order = order
        self.batch_size = batch_size
        self.world = world
        self.drop_last = drop_last

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of this epoch, where it is not always the same."""
        order: Any = self.order
        if hasattr(order, "set_epoch"):
            order.set_epoch(epoch)

    def __len__(self) -> int:
        rows: Any = self.order
        size = self.batch_size * self.world
        whole = len(rows) // size
        return size * (whole if self.drop_last or len(rows) % size == 0 else whole + 1)

    def __iter__(self) -> Iterator[int]:
        rows, size = list(self.order), self.batch_size * self.world
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            if len(batch) < size and self.drop_last:
                return
            for rank in range(self.world):
                part = batch[rank :: self.world]
                yield from part + [NO_ROW] * (self.batch_size - len(part))


class MarkedRows(Dataset[Any]):
    """`rows`, and None for `NO_ROW`.

    Attributes:
        total_dataset_length: rows and marks of an epoch, by which accelerate sees that no batch is cut short.
    """

    def __init__(self, rows: Rows, sampler: DealtSampler) -> None:
        self.rows = rows
        self.sampler = sampler
        self.total_dataset_length = len(sampler)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's order; accelerate asks the data set where it does not find the sampler (a resumed epoch).

        Source: accelerate 1.15, `DataLoaderShard.set_epoch`.
        """
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return None if index == NO_ROW else self.rows[index]


def mark(batch: Batch) -> Batch:
    """The batch under the key `UNCOUNTED` too."""
    return {**batch, UNCOUNTED: torch.ones(())}


def counts(batch: Mapping[str, Any]) -> bool:
    """Whether the rows of a batch are to be counted."""
    return UNCOUNTED not in batch


@dataclass(frozen=True)
class _Collator:
    collate: Callable[[Sequence[Any]], Batch]
    rows: Rows
    uncounted: Callable[[Batch], Batch]

    def __call__(self, items: Sequence[Any]) -> Batch:
        present = [item for item in items if item is not None]
        return self.collate(present) if present else self.uncounted(self.collate([self.rows[0]]))


def equal_batches(
    trainer: Trainer,
    rows: Any,
    order: Sampler[int],
    batch_size: int,
    *,
    held_out: bool = False,
    uncounted: Callable[[Batch], Batch] = mark,
) -> DataLoader[Any]:
    """The trainer's loader of `rows` in this order, `batch_size` to a rank.

    Batches without a row are what `uncounted` makes of the batch of the first one. A loader of held-out rows draws
    nothing from torch's global generator: training goes on alike whether or not an evaluation came between.
    """
    args = trainer.args
    collate: Any = trainer.data_collator
    drop_last = args.dataloader_drop_last and not held_out
    sampler = DealtSampler(order, batch_size, args.world_size, drop_last=drop_last)
    loader: DataLoader[Any] = DataLoader(
        MarkedRows(rows, sampler),
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=_Collator(collate, rows, uncounted),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        generator=torch.Generator() if held_out else None,
    )
    return trainer.accelerator.prepare(loader)


def turns(count: int, ranks: Ranks, *, in_step: bool) -> Iterator[tuple[int, bool]]:
    """This rank's of `count` forwards, by number; `in_step` adds some that do not count, for equally many on all ranks.

    Sharded models need that: every forward gathers their weights from all ranks.
    """
    own = ranks.share(range(count))
    yield from ((number, True) for number in own)
    if in_step and count:
        yield from ((0, False) for _ in range(-(-count // ranks.world) - len(own)))
