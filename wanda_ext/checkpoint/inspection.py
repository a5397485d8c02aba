"""What a checkpoint directory holds, read from its files without building the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from wanda_ext.checkpoint.reader import Checkpoint, open_checkpoint
from wanda_ext.packed import PackedLinear

PATTERNS = ((2, 4), (4, 8), (8, 16), (16, 32))  # keep, group: the narrowest first


@dataclass(frozen=True)
class StoredWeight:
    """One weight matrix: shape as stored in a dense checkpoint, bytes as stored here."""

    name: str
    shape: tuple[int, int]
    dtype: str
    zeros: float  # share of the weights
    pattern: str  # see pattern_of; "2:4 packed"; "2:4 transposed" where [in, out] is stored (GPT-2)
    nbytes: int
    dense_nbytes: int


@dataclass(frozen=True)
class CheckpointSummary:
    """Every weight matrix of a checkpoint; str() is a table whose last line is the total."""

    weights: tuple[StoredWeight, ...]

    def __str__(self) -> str:
        heads = ("weight", "shape", "dtype", "zeros", "pattern", "bytes", "of dense")
        rows = [heads, *map(_cells, self.weights)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        nbytes = sum(weight.nbytes for weight in self.weights)
        share = nbytes / sum(weight.dense_nbytes for weight in self.weights)
        total = f"{len(self.weights)} weight matrices, {nbytes} bytes, {share:.1%} of dense"
        return "\n".join([*table, total])


def inspect_checkpoint(directory: str | Path) -> CheckpointSummary:
    """Sparsity, pattern and bytes of every weight matrix; one matrix is in memory at a time.

    Embeddings and output heads are weight matrices too, and are listed.
    Raises: ValueError for a directory that `open_checkpoint` refuses, or without such a matrix.
    """
    checkpoint = open_checkpoint(directory)
    packed = checkpoint.packed_linears()
    names = (name for name in checkpoint.headers if name.endswith(".weight"))
    weights = tuple(
        _stored(checkpoint, name, packed.get(name.removesuffix(".weight")))
        for name in names
        if name.removesuffix(".weight") in packed or len(checkpoint.headers[name].shape) == 2
    )
    if not weights:
        raise ValueError(f"{directory}: no weight matrix; expected the files of a language model")
    return CheckpointSummary(weights)


def pattern_of(weight: Tensor) -> str:
    """What the zeros of a weight [n, k] keep to, by its rows: the first of PATTERNS, "unstructured"
    (any zeros) or "dense" (none)."""
    if bool((weight != 0).all()):
        return "dense"
    found = (f"{keep}:{group}" for keep, group in PATTERNS if follows(weight, keep, group))
    return next(found, "unstructured")


def follows(weight: Tensor, keep: int, group: int) -> bool:
    """Whether each `group` columns of a weight [n, k] hold at most `keep` non-zeros."""
    n, k = weight.shape
    if k % group:
        return False
    counts = (weight != 0).reshape(n, k // group, group).sum(dim=2)
    return not bool((counts > keep).any())


def _stored(checkpoint: Checkpoint, name: str, packed: type[PackedLinear] | None) -> StoredWeight:
    linear = name.removesuffix(".weight")
    if packed is not None:
        tensors = checkpoint.read_packed(linear, packed)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        weight = packed.unpack(tensors)
        pattern = f"{pattern_of(weight)} packed"
    else:
        weight = checkpoint.read(name)
        nbytes, pattern = weight.nbytes, pattern_of(weight)
        by_column = pattern_of(weight.T) if pattern == "unstructured" else pattern
        if by_column != pattern:
            pattern = f"{by_column} transposed"
    n, k = weight.shape
    zeros = float((weight == 0).sum()) / weight.numel()
    dtype = str(weight.dtype).removeprefix("torch.")
    return StoredWeight(linear, (n, k), dtype, zeros, pattern, nbytes, weight.nbytes)


def _cells(weight: StoredWeight) -> tuple[str, ...]:
    return (
        weight.name,
        "x".join(map(str, weight.shape)),
        weight.dtype,
        f"{weight.zeros:.2%}",
        weight.pattern,
        str(weight.nbytes),
        f"{weight.nbytes / weight.dense_nbytes:.1%}",
    )
