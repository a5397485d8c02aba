"""Several processes that share one prune, through torch.distributed (torchrun starts them).

Each rank owns whole batches of the partition that one process would use, and runs every block on
them. The batches' sums are gathered and added in the order of the batches, so that every rank has
the statistics, and prunes the same weights, bit for bit as one process does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from wanda_ext.runner import BatchSums

T = TypeVar("T")
BACKEND = "gloo"  # sums are small, and lie in the host's memory


class Ranks:
    """This process among the others, or alone."""

    def __init__(self, group: Any = None) -> None:
        """group: a gloo process group, or None."""
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def own(self, batches: Sequence[T]) -> list[T]:
        """This rank's batches: every count-th one. Raises ValueError where one gets none."""
        if len(batches) < self.count:
            raise ValueError(
                f"{self.count} ranks share {len(batches)} batches: start at most {len(batches)}, "
                "or pass a smaller batch_size"
            )
        return list(batches[self.rank :: self.count])

    def share(self, own: BatchSums | None) -> list[BatchSums]:
        """All ranks' next batches in their order, from what this one found in its own.

        None: it has run all its batches. The list is empty when that is so for all ranks.
        """
        if own is not None:
            at_home = {id(one): one.to("cpu") for one in own.values()}  # what is shared stays so
            own = {name: at_home[id(one)] for name, one in own.items()}
        by_rank: list[BatchSums | None] = [None] * self.count
        dist.all_gather_object(by_rank, own, group=self._group)
        return [sums for sums in by_rank if sums is not None]

    def at_first(self, call: Callable[[], T]) -> T:
        """What `call` gives on the first rank, which alone runs it; what it raises, all raise."""
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = call()
            except Exception as error:
                if self._group is None:
                    raise
                outcome[1] = error
        if self._group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        value: T = outcome[0]
        return value

    def wait(self) -> None:
        """Until all are here."""
        if self._group is not None:
            dist.barrier(self._group)


def launched() -> bool:
    """Whether torchrun has started this process beside others."""
    return dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of the caller's process group, those that torchrun started, or this one alone."""
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.new_group(backend=BACKEND))
    elif launched():
        dist.init_process_group(BACKEND)
        try:
            yield Ranks(dist.group.WORLD)
        finally:
            dist.destroy_process_group()
    else:
        yield Ranks()


def device_of_rank(device: torch.device | str | None) -> torch.device | str | None:
    """For "cuda", a GPU of its own for each process that torchrun started on a node."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local and str(device) == "cuda" and launched() else device
