"""Safetensors files read and written tensor by tensor, so that no more memory is taken than asked.

A mapped file's pages count as memory of the process, and the library's own writer wants all tensors
of a file at once: here files are opened, read or written, and closed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LENGTH_BYTES = 8  # little-endian, of the JSON header that follows
ALIGNMENT = 8
COPIED_AT_ONCE = 1 << 24  # bytes
DTYPES = {  # by alignment, in the order in which the library sorts them, the last ones first
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, of `stored` type there; `start` is the offset of its first byte.

    `dtype` is what it is read as.
    """

    file: Path
    start: int
    stored: torch.dtype
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self, rows: int | None = None) -> Tensor:
        """The tensor, or its first `rows` rows. Raises ValueError where the file is cut short."""
        shape = self.shape if rows is None else (min(rows, self.shape[0]), *self.shape[1:])
        raw = torch.empty(math.prod(shape) * self.stored.itemsize, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as source:
            source.seek(self.start)
            self._fill(source, _memory(raw))
        return raw.view(self.stored).reshape(shape).to(self.dtype)

    def pieces(self) -> Iterator[Tensor]:
        """Its values one after the other, a part at a time: valid until the next is asked for."""
        raw = torch.empty(COPIED_AT_ONCE, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as source:
            source.seek(self.start)
            left = self.numel * self.stored.itemsize
            while left:
                part = raw[: min(left, COPIED_AT_ONCE)]
                self._fill(source, _memory(part))
                left -= len(part)
                yield part.view(self.stored).to(self.dtype)

    def _fill(self, source: Any, into: memoryview) -> None:
        filled = 0
        while filled < len(into):
            count = source.readinto(into[filled:])
            if not count:
                raise ValueError(f"{self.file} is cut short; copy or download it again")
            filled += count


def stored_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """Name -> where it lies, of every tensor in files that `read_headers` found whole.

    Raises ValueError for a dtype that torch has no name for here.
    """
    found: dict[str, Stored] = {}
    for file in files:
        with file.open("rb") as source:
            length = int.from_bytes(source.read(LENGTH_BYTES), "little")
            header = json.loads(source.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(
                    f"{file} holds {name} as {entry['dtype']}; expected one of {', '.join(DTYPES)}"
                )
            start = LENGTH_BYTES + length + entry["data_offsets"][0]
            dtype = DTYPES[entry["dtype"]]
            found[name] = Stored(file, start, dtype, tuple(entry["shape"]), dtype)
    return found


class Written(NamedTuple):
    """A file that was written."""

    nbytes: int  # of its tensors
    sha256: str  # of all of it


def write_shard(
    path: Path,
    tensors: Mapping[str, Tensor | Stored],
    sync: bool = True,
    seen: Callable[[int], object] = lambda count: None,
) -> Written:
    """Writes one file, and syncs it to the disk. A link at its place is replaced, not followed.

    Tensors of other devices are fetched, and stored ones copied, one after the other. seen(count)
    is told of the bytes as they are written.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-RANKS[item[1].dtype], item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    digest = hashlib.sha256()
    if path.is_symlink():
        path.unlink()
    with path.open("wb", buffering=0) as target:
        for data in _contents(text, ordered):
            digest.update(data)
            _write(target, data)
            seen(len(data))
        if sync:
            os.fsync(target.fileno())
    return Written(end, digest.hexdigest())


def sha256_of(path: Path, seen: Callable[[int], object] = lambda count: None) -> str:
    """Of a file's content; seen(count) is told of the bytes as they are read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as source:
        while data := source.read(COPIED_AT_ONCE):
            digest.update(data)
            seen(len(data))
    return digest.hexdigest()


def _contents(
    header: bytes, ordered: Iterable[tuple[str, Tensor | Stored]]
) -> Iterator[memoryview]:
    yield memoryview(len(header).to_bytes(LENGTH_BYTES, "little") + header)
    for _, tensor in ordered:
        for piece in tensor.pieces() if isinstance(tensor, Stored) else [tensor]:
            yield _bytes_of(piece)


def sync_path(path: Path) -> None:
    """Makes a file's content, or the names in a directory, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return _memory(flat.view(torch.uint8))


def _memory(raw: Tensor) -> memoryview:
    """The bytes of a uint8 tensor [n], to read and write."""
    return raw.numpy().data


def _write(target: Any, data: memoryview) -> None:
    written = 0
    while written < len(data):
        written += target.write(data[written:])
