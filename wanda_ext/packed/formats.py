"""The formats of packed linears, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from typing import TypeVar

import torch
from torch import Tensor

from wanda_ext.files import DTYPES, Stored, TensorHeader
from wanda_ext.methods import NM, Sparsity
from wanda_ext.packed.bitmap import LOOKED_AT, RECORD, ROOM, SparseLinearBitmap
from wanda_ext.packed.linear import PackedLinear, check_in_memory
from wanda_ext.packed.linear_24 import SparseLinear24

Header = TypeVar("Header", TensorHeader, Stored)
FORMATS: tuple[type[PackedLinear], ...] = (SparseLinear24, SparseLinearBitmap)


def pack(
    weight: Tensor, refused: Mapping[type[PackedLinear], str] | None = None
) -> tuple[type[PackedLinear], dict[str, Tensor]]:
    """The first format that a weight [n, k] fits, and its tensors in it.

    refused: why not to use a format, "" where it may be used. Raises ValueError with a clause about
    the weight, for the caller to put after a module's name; a format that it fits, by its
    first rows, but which is refused has the last word.
    """
    check_in_memory(weight)
    weight = weight.detach()
    reasons, told = [], ""
    for kind in FORMATS:
        why = refused.get(kind, "") if refused else ""
        try:
            tensors = kind.pack(weight[:LOOKED_AT] if why else weight)
        except ValueError as reason:
            reasons.append(str(reason))
        else:
            if not why:
                return kind, tensors
            told = told or "; ".join([*reasons, why])
    raise ValueError(told or "; ".join(reasons))


def fits_records(sparsity: Sparsity | None) -> bool:
    """Whether what is pruned so needs no surplus, wherever the non-zeros are in their groups."""
    if not isinstance(sparsity, NM) or RECORD % sparsity.group:
        return False
    return RECORD // sparsity.group * sparsity.keep <= ROOM


def expected_bytes(sparsity: Sparsity | None, n: int, k: int, itemsize: int) -> int:
    """Of a weight [n, k] that will be pruned so, in the format that it will fit.

    Exact where all records hold as many, else for non-zeros that lie as if drawn by lot.
    """
    if sparsity == NM(2, 4) and k % 16 == 0:
        return SparseLinear24.nbytes_of(n, k, itemsize)
    over = 0.0  # of a record
    if isinstance(sparsity, NM) and RECORD % sparsity.group == 0:
        over = max(0, RECORD // sparsity.group * sparsity.keep - ROOM)
    elif sparsity is not None:
        kept = sparsity.keep_fraction
        over = sum(
            (count - ROOM) * comb(RECORD, count) * kept**count * (1 - kept) ** (RECORD - count)
            for count in range(ROOM + 1, RECORD + 1)
        )
    surplus = round(over * n * k / RECORD)
    return SparseLinearBitmap.nbytes_of(n, k, itemsize, surplus=surplus)


def named_format(name: str) -> type[PackedLinear]:
    return next(kind for kind in FORMATS if name == kind.FORMAT)


def stored_linears(
    headers: Mapping[str, Header], kind: type[PackedLinear]
) -> dict[str, dict[str, Header]]:
    """The packed linears of one format among stored tensors: name -> its tensors, by short name."""
    sign, dtype, dims = kind.SIGN
    names = [
        name.removesuffix(f".{sign}")
        for name, header in headers.items()
        if name.endswith(f".{sign}") and _dtype(header) == dtype and len(header.shape) == dims
    ]
    return {
        name: {
            short: headers[f"{name}.{short}"]
            for short in kind.TENSORS
            if f"{name}.{short}" in headers
        }
        for name in names
    }


def sound_linears(headers: Mapping[str, TensorHeader], kind: type[PackedLinear]) -> list[str]:
    """Those of them that can be nothing else: a model may have a mask of its own."""
    stored = stored_linears(headers, kind)
    return [name for name, tensors in stored.items() if not kind.damage(tensors)]


def _dtype(header: TensorHeader | Stored) -> torch.dtype | None:
    return DTYPES.get(header.dtype) if isinstance(header, TensorHeader) else header.stored
