"""SparseLinearBitmap: a packed linear of about half zeros, wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wanda_ext import ops
from wanda_ext.files import TensorHeader
from wanda_ext.ops import MAX_SURPLUS_COLS, bitmap_tiles
from wanda_ext.packed.linear import PackedLinear

if TYPE_CHECKING:
    from typing_extensions import Self


RECORD, ROOM = 32, 16  # columns, and the non-zeros of them that fit
SURPLUS = ("surplus_rows", "surplus_columns", "surplus_values")
FLOATS = ("F32", "BF16", "F16")
EMPTY_MASK = -(1 << 16)  # 0xffff0000: of 32 zeros
LOOKED_AT = 64  # first rows that tell a weight which was not pruned
FEWEST_ZEROS = 0.1  # of them


class SparseLinearBitmap(PackedLinear):
    """A PackedLinear of records: 32 columns as a 32-bit mask and 16 values.

    9/16 of the bytes of a dense 16-bit weight for 16:32, and for 8:16 and 4:8, which it holds too.
    Non-zeros that a record has no room for, the surplus, take 4 bytes each: of a row-wise 50 % mask
    about 7 % of them, 0.63 of the bytes in all.

    Shapes: weight [n/16, k/128, 1024], mask [n/16, k/128, 64] int32, both rounded up; shape [2]
    int64 (n, k); surplus_rows [n + 1] int32, surplus_columns [s] int16 (unsigned), surplus_values
    [s], or None; bias [n] or None. A new one is all zeros.
    """

    FORMAT = "bitmap"
    TENSORS = ("weight", "mask", "shape", *SURPLUS)
    PARAMETERS = ("weight", "surplus_values")
    SIGN = ("mask", torch.int32, 3)

    mask: Tensor
    shape: Tensor  # that a file tells it: padding hides it
    surplus_rows: Tensor | None
    surplus_columns: Tensor | None
    surplus_values: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        surplus: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        dense_class: type[nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dense_class = dense_class
        tiles = bitmap_tiles(out_features, in_features)

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype), requires_grad=False)

        def bits(shape: tuple[int, ...], fill: int, kind: torch.dtype) -> Tensor:
            return torch.full(shape, fill, device=device, dtype=kind)

        self.weight = zeros(*tiles, 1024)
        self.register_buffer("mask", bits((*tiles, 64), EMPTY_MASK, torch.int32))
        self.register_buffer("shape", torch.tensor([out_features, in_features], device=device))
        rows = bits((out_features + 1,), 0, torch.int32) if surplus else None
        columns = bits((surplus,), 0, torch.int16) if surplus else None
        self.register_buffer("surplus_rows", rows)
        self.register_buffer("surplus_columns", columns)
        self.register_parameter("surplus_values", zeros(surplus) if surplus else None)
        self.register_parameter("bias", zeros(out_features) if bias else None)
        if self.bias is not None:
            self.bias.requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_bitmap(
            x, self.weight, self.mask, self.out_features, self.bias, *self.surplus
        )

    @property
    def surplus(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.surplus_rows, self.surplus_columns, self.surplus_values

    @classmethod
    def pack(cls, weight: Tensor) -> dict[str, Tensor]:
        if looks_dense(weight):
            zeros = float((weight[:LOOKED_AT] == 0).float().mean())
            rows = min(LOOKED_AT, len(weight))
            raise ValueError(f"not pruned: {zeros:.1%} of its first {rows} rows is zero")
        bad = torch.full((1,), -1, dtype=torch.int32, device=weight.device)
        values, mask = ops.pack_bitmap(weight.contiguous(), bad)
        shape = torch.tensor(weight.shape, device=weight.device)
        tensors = {"weight": values, "mask": mask, "shape": shape}
        if int(bad) >= 0:
            tensors |= dict(zip(SURPLUS, surplus_of(weight), strict=True))
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        if nbytes >= weight.nbytes:
            share = nbytes / max(weight.nbytes, 1)  # holds for its first rows alone, too
            raise ValueError(f"a bitmap would take {share:.0%} of its bytes")
        return tensors

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> Tensor:
        n, k = tensors["shape"].tolist()
        surplus = (tensors.get(name) for name in SURPLUS)
        return ops.unpack_bitmap(tensors["weight"], tensors["mask"], n, k, *surplus)

    @classmethod
    def options(cls, tensors: Mapping[str, TensorHeader | Tensor]) -> dict[str, int]:
        values = tensors.get("surplus_values")
        return {} if values is None else {"surplus": values.shape[0]}

    @classmethod
    def nbytes_of(cls, n: int, k: int, itemsize: int, **options: int) -> int:
        row_tiles, column_tiles = bitmap_tiles(n, k)
        surplus = options.get("surplus", 0)
        lists = 4 * (n + 1) + surplus * (2 + itemsize) if surplus else 0
        return row_tiles * column_tiles * (1024 * itemsize + 64 * 4) + 2 * 8 + lists

    @classmethod
    def damage(cls, headers: Mapping[str, TensorHeader]) -> str:
        return headers_problem(headers)

    @classmethod
    def problem_in(cls, tensors: Mapping[str, Tensor]) -> str:
        return tensors_problem(tensors)

    def dense_weight(self) -> Tensor:
        n, k = self.out_features, self.in_features
        return ops.unpack_bitmap(self.weight, self.mask, n, k, *self.surplus)

    def problem(self, tensors: Mapping[str, Tensor] | None = None) -> str:
        tensors = tensors or self.tensors()
        stored, own = tensors["shape"].tolist(), [self.out_features, self.in_features]
        if stored != own:
            return f"holds a weight of shape {stored}, its module one of {own}"
        return self.problem_in(tensors)

    def extra_repr(self) -> str:
        surplus = 0 if self.surplus_values is None else len(self.surplus_values)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, surplus={surplus}"
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        stored = state_dict.get(f"{prefix}shape")
        own = [self.out_features, self.in_features]
        if stored is not None and not stored.is_meta and stored.tolist() != own:  # padding hides it
            rest[-1].append(f"size mismatch for {prefix}weight: {stored.tolist()}, here {own}")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        bits = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in bits.items():  # nn.Module.type() casts everything; these are bits
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


def looks_dense(weight: Tensor) -> bool:
    """Whether the first LOOKED_AT rows of [n, k], or of fewer, tell that it was not pruned."""
    first = weight[:LOOKED_AT]
    return first.numel() > 0 and float((first == 0).float().mean()) < FEWEST_ZEROS


def surplus_of(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of the non-zeros after the first 16 of each record of [n, k]."""
    n, k = weight.shape
    if k > MAX_SURPLUS_COLS:
        raise ValueError(
            f"its {k} columns are over {MAX_SURPLUS_COLS}, which a surplus cannot number"
        )
    counts = torch.zeros(n + 1, dtype=torch.int32, device=weight.device)
    columns, values = [], []
    for first in range(0, n, LOOKED_AT):  # a few rows at a time: int8 counts take memory
        rows = weight[first : first + LOOKED_AT]
        padded = nn.functional.pad(rows != 0, (0, -k % RECORD))
        records = padded.view(len(rows), -1, RECORD)
        ranks = records.cumsum(2, dtype=torch.int8).flatten(1)
        over = padded & (ranks > ROOM)
        counts[first + 1 : first + 1 + len(rows)] = over.sum(dim=1)
        where = over.nonzero(as_tuple=True)
        columns.append(where[1].to(torch.int16))  # the low 16 bits
        values.append(rows[where])
    return counts.cumsum(0, dtype=torch.int32), torch.cat(columns), torch.cat(values)


# --- What may be wrong with a stored bitmap -------------------------------------------------------
#
# In clauses: first by its headers, then by its bits. The kernels read nothing outside of what they
# are given, whatever it holds; but only a bitmap without a problem means the same weight to all.


def headers_problem(headers: Mapping[str, TensorHeader]) -> str:
    """Shapes and dtypes that cannot be one bitmap's; "" where they can. There is a mask."""
    mask = headers["mask"].shape
    tiles = mask[:2]
    floats = headers["weight"].dtype if "weight" in headers else ""
    if floats not in FLOATS:
        return f"weight is {floats or 'missing'}; expected {' or '.join(FLOATS)}"
    expected = {
        "weight": (floats, (*tiles, 1024)),
        "mask": ("I32", (*tiles, 64)),
        "shape": ("I64", (2,)),
    }
    found = [headers[name] for name in SURPLUS if name in headers]
    if found:
        count = found[-1].shape[:1]
        rows = found[0].shape[:1]
        n = rows[0] - 1 if rows else -1
        rows = (n + 1,) if n >= 0 and -(-n // 16) == tiles[0] else (16 * tiles[0] + 1,)
        kinds = ("I32", rows), ("I16", count), (floats, count)
        expected |= dict(zip(SURPLUS, kinds, strict=True))
    for name, (dtype, shape) in expected.items():
        header = headers.get(name)
        if header is None or header.shape != shape:
            what = "missing" if header is None else f"of shape {list(header.shape)}"
            return f"{name} is {what}, its mask of shape {list(mask)}"
        if header.dtype != dtype:
            return f"{name} is {header.dtype}; expected {dtype}"
    return ""


def tensors_problem(tensors: Mapping[str, Tensor]) -> str:
    """Bits that mean no weight [n, k], or several; "" where they mean one."""
    (n, k), mask = tensors["shape"].tolist(), tensors["mask"]
    if min(n, k) < 0 or bitmap_tiles(n, k) != tuple(mask.shape[:2]):
        return f"tells of a weight of shape {[n, k]}, its mask of shape {list(mask.shape)}"
    rows = (_count_bits(mask) != ROOM).flatten(1).any(dim=1).nonzero()
    if len(rows):
        row = 16 * int(rows[0])
        return f"has invalid masks in rows {row} to {row + 15}"
    if _padding_is_used(tensors["weight"], mask, n, k):
        return f"has weights outside of its shape {[n, k]}"
    lists = [tensors[name] for name in SURPLUS if name in tensors]
    return _surplus_problem(mask, n, k, *lists) if lists else ""


def _count_bits(words: Tensor) -> Tensor:
    """Of int32."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return (words + (words >> 16)) & 0x3F


def _padding_is_used(values: Tensor, mask: Tensor, n: int, k: int) -> bool:
    """Whether the rows and columns that pad the last tiles hold anything but zeros."""
    rows, columns = 16 * mask.shape[0], 128 * mask.shape[1]
    used = False
    if n < rows:
        last = ops.unpack_bitmap(values[-1:], mask[-1:], 16, columns)
        used |= bool((last[n % 16 :] != 0).any())
    if k < columns:
        last = ops.unpack_bitmap(values[:, -1:].contiguous(), mask[:, -1:].contiguous(), rows, 128)
        used |= bool((last[:, k % 128 :] != 0).any())
    return used


def _surplus_problem(
    mask: Tensor, n: int, k: int, offsets: Tensor, columns: Tensor, values: Tensor
) -> str:
    counts, column = offsets.diff(), columns.long() & 0xFFFF
    ends = [int(offsets[0]), int(offsets[-1])] if len(offsets) == n + 1 else []
    if ends != [0, len(values)] or bool((counts < 0).any()) or bool((column >= k).any()):
        return "has a surplus that points outside of the weight"
    row = torch.arange(n, device=mask.device).repeat_interleave(counts.long())
    if bool(((row << 16) + column).diff().le(0).any()):
        return "has a surplus whose columns do not ascend in each row"
    lane = row % 8 * 4 + column % 128 // RECORD  # bitmap.h: bitmap_mask_index
    word = mask[row // 16, column // 128, lane * 2 + row % 16 // 8]
    if bool((word >> (column % RECORD) & 1).any()):
        return "has a surplus at columns that its masks keep"
    return ""
