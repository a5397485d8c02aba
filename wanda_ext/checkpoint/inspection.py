"""What a checkpoint directory holds, read from its files a matrix at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from wanda_ext.checkpoint.architecture import empty_of
from wanda_ext.checkpoint.conversion import Conversion
from wanda_ext.checkpoint.load import load_config
from wanda_ext.checkpoint.reader import Checkpoint, open_checkpoint
from wanda_ext.packed import PackedLinear

SCREEN = 40  # lines
PATTERNS = ((2, 4), (4, 8), (8, 16), (16, 32))  # keep, group: the narrowest first


@dataclass(frozen=True)
class StoredWeight:
    """One weight matrix: shape as stored in a dense checkpoint, bytes as stored here."""

    name: str
    shape: tuple[int, int]
    dtype: str
    zeros: float  # share of the weights
    # See pattern_of; "2:4 packed"; "2:4 transposed" where [in, out] is stored (GPT-2); "-": an
    pattern: str  # embedding, which has none
    nbytes: int
    dense_nbytes: int


@dataclass(frozen=True)
class CheckpointSummary:
    """Every weight matrix of a checkpoint; str() is a table whose last line is the total."""

    weights: tuple[StoredWeight, ...]
    note: str = ""  # what could not be told

    def __str__(self) -> str:
        return self._table([[weight] for weight in self.weights])

    def short(self) -> str:
        """A table that fits on a screen: a line for all that are alike but for numbers in their
        names; where those are too many, for all of one pattern."""
        for alike in (_kind, _pattern):
            groups: dict[tuple[str, ...], list[StoredWeight]] = {}
            for weight in self.weights:
                groups.setdefault(alike(weight), []).append(weight)
            if len(groups) <= SCREEN - 3:  # beside heads, total and note
                break
        return self._table(groups.values())

    def _table(self, groups: Iterable[list[StoredWeight]]) -> str:
        heads = ("weight", "shape", "dtype", "zeros", "pattern", "bytes", "of dense")
        rows = [heads, *map(_cells, groups)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        nbytes = sum(weight.nbytes for weight in self.weights)
        share = nbytes / sum(weight.dense_nbytes for weight in self.weights)
        total = f"{len(self.weights)} weight matrices, {nbytes} bytes, {share:.1%} of dense"
        return "\n".join([*table, *([self.note] if self.note else []), total])


def inspect_checkpoint(directory: str | Path, trust_remote_code: bool = False) -> CheckpointSummary:
    """Sparsity, pattern and bytes of every weight matrix; one matrix is in memory at a time.

    Embeddings and output heads are weight matrices too, and are listed. Which are embeddings tells
    the model, without weights; trust_remote_code: whether its own code may run for that.
    Raises: ValueError for a directory that `open_checkpoint` refuses, or without such a matrix.
    """
    checkpoint = open_checkpoint(directory)
    packed = checkpoint.packed_linears()
    names = [
        name
        for name, header in checkpoint.headers.items()
        if name.endswith(".weight")
        and (name.removesuffix(".weight") in packed or len(header.shape) == 2)
    ]
    if not names:
        raise ValueError(f"{directory}: no weight matrix; expected the files of a language model")
    note, embeddings = "", set()
    try:
        embeddings = _embeddings(checkpoint, names, trust_remote_code)
    except Exception as error:  # transformers' checks of a config raise errors of many kinds
        note = f"embeddings are not told apart from linears: {' '.join(str(error).split())}"
    weights = tuple(
        _stored(checkpoint, name, packed.get(name.removesuffix(".weight")), name in embeddings)
        for name in names
    )
    return CheckpointSummary(weights, note)


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


def _embeddings(checkpoint: Checkpoint, names: list[str], trust: bool) -> set[str]:
    """Those of the stored tensors that an embedding of the model holds."""
    model = empty_of(load_config(checkpoint.folder, trust_remote_code=trust), None, trust)
    groups = Conversion(model, names).groups
    modules = dict(model.named_modules())
    return {
        name
        for group in groups
        if isinstance(modules[group.first.rpartition(".")[0]], nn.Embedding)
        for name in group.names
    }


def _stored(
    checkpoint: Checkpoint, name: str, packed: type[PackedLinear] | None, embedding: bool
) -> StoredWeight:
    linear = name.removesuffix(".weight")
    if packed is not None:
        tensors = checkpoint.read_packed(linear, packed)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        weight = packed.unpack(tensors)
        pattern = f"{pattern_of(weight)} packed"
    else:
        weight = checkpoint.read(name)
        nbytes, pattern = weight.nbytes, "-" if embedding else pattern_of(weight)
        by_column = pattern_of(weight.T) if pattern == "unstructured" else pattern
        if by_column != pattern:
            pattern = f"{by_column} transposed"
    n, k = weight.shape
    zeros = float((weight == 0).sum()) / weight.numel()
    dtype = str(weight.dtype).removeprefix("torch.")
    return StoredWeight(linear, (n, k), dtype, zeros, pattern, nbytes, weight.nbytes)


def _kind(weight: StoredWeight) -> tuple[str, ...]:
    name = re.sub(r"(?<![^.])\d+(?![^.])", "*", weight.name)  # a part of it that is a number
    return name, str(weight.shape), weight.dtype, weight.pattern


def _pattern(weight: StoredWeight) -> tuple[str, ...]:
    return weight.dtype, weight.pattern


def _cells(alike: list[StoredWeight]) -> tuple[str, ...]:
    """Of weights of one dtype and pattern."""
    first = alike[0]
    zeros = [f"{share:.2%}" for share in sorted(weight.zeros for weight in alike)]
    nbytes = sum(weight.nbytes for weight in alike)
    name, count = _one({_kind(weight)[0] for weight in alike}), len(alike)
    return (
        first.name if count == 1 else f"{name} ({count})",
        _one({"x".join(map(str, weight.shape)) for weight in alike}),
        first.dtype,
        zeros[0] if zeros[0] == zeros[-1] else f"{zeros[0]} to {zeros[-1]}",
        first.pattern,
        str(nbytes),
        f"{nbytes / sum(weight.dense_nbytes for weight in alike):.1%}",
    )


def _one(found: set[str]) -> str:
    return next(iter(found)) if len(found) == 1 else "several"
