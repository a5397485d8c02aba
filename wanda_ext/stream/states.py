"""Hidden states kept in files instead of memory: two generations, so that a stop loses neither."""

from __future__ import annotations

from collections.abc import Iterator, MutableSequence
from pathlib import Path
from typing import Any

from torch import Tensor

from wanda_ext.files import stored_tensors, sync_path, write_shard

NAME = "hidden"


class FileStates(MutableSequence[Tensor]):
    """What enters a block, batch by batch; what is put in becomes what enters the next one.

    `numbers` are the batches' numbers among those of all ranks. After `turn`, what was put in is on
    the disk, and is what is read. With begun=n > 0 the states that enter block n are there already,
    and appending changes nothing.
    """

    def __init__(self, folder: Path, numbers: list[int], begun: int = 0) -> None:
        self._folder = folder
        self._numbers = numbers
        self._generation = begun
        self._kept = begun > 0
        self._count = 0
        self._put: set[int] = set()

    def turn(self) -> None:
        """All of the next block's states are in: they are what is read from now on."""
        for index in set(range(self._count)) - self._put:  # the model skips the block for these
            self[index] = self[index]
        self._put.clear()
        self._generation += 1
        for index in range(self._count):
            sync_path(self._file(index, self._generation))
            sync_path(sum_of(self._file(index, self._generation)))
        sync_path(self._folder)

    def append(self, value: Tensor) -> None:
        if not self._kept:
            self._write(self._file(self._count, self._generation), value)
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(self._count))

    def __getitem__(self, index: Any) -> Any:
        return stored_tensors([self._file(index, self._generation)])[NAME].read()

    def __setitem__(self, index: Any, value: Any) -> None:
        self._write(self._file(index, self._generation + 1), value)
        self._put.add(index)

    def __delitem__(self, index: Any) -> None:
        raise TypeError("hidden states are replaced, never removed")

    def insert(self, index: int, value: Tensor) -> None:
        raise TypeError("hidden states are appended, never inserted")

    def _write(self, path: Path, value: Tensor) -> None:
        sum_of(path).write_text(write_shard(path, {NAME: value}, sync=False).sha256)

    def _file(self, index: int, generation: int) -> Path:
        return state_file(self._folder, self._numbers[index], generation)


def state_file(folder: Path, number: int, generation: int) -> Path:
    """Of batch `number`, as it enters block `generation`."""
    return folder / f"{number}-{generation % 2}.safetensors"


def sum_of(path: Path) -> Path:
    """Where the sha256 of a file of hidden states lies."""
    return path.with_suffix(".sha256")
