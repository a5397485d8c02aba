"""What a linear runs for a number of rows, and why: a kernel, its splits, both measured times."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from wanda_ext.packed import dispatch
from wanda_ext.packed.bitmap import SparseLinearBitmap
from wanda_ext.packed.dispatch import name_of
from wanda_ext.packed.formats import pack
from wanda_ext.packed.fuse import FusedLinear24
from wanda_ext.packed.linear import is_conv1d, row_major
from wanda_ext.packed.linear_24 import SparseLinear24

BITMAP_TOKENS = 16  # kMaxBitmapTokens in csrc/include/wanda_ext/ops.h


@dataclass(frozen=True)
class Explanation:
    """path: "cpu", a kernel's name, "dense", or "none" where it would be an error; why: in words.

    splits: parts of k that are computed apart. packed_us, dense_us: of one call, as the dispatch
    table has them for the bucket of m; None: not measured.
    """

    m: int
    shape: tuple[int, int]  # n, k of what runs
    path: str
    splits: int
    why: str
    packed_us: float | None = None
    dense_us: float | None = None

    def __str__(self) -> str:
        n, k = self.shape
        splits = f" in {self.splits} splits of k" if self.splits > 1 else ""
        line = f"{self.path}{splits} for m={self.m} of {n}x{k}: {self.why}"
        if self.packed_us is not None and self.dense_us is not None:
            ratio = self.dense_us / self.packed_us
            line += f"; packed {self.packed_us:.1f} us, dense {self.dense_us:.1f} us ({ratio:.2f}x)"
        return line


def explain(linear: nn.Module, m: int) -> Explanation:
    """What `linear` runs for an x of m rows. A dense linear's weight is looked at, so it waits.

    linear: a packed one, nn.Linear or Conv1D. Raises TypeError for another module, ValueError
    unless m > 0.
    """
    if not isinstance(m, int) or m <= 0:
        raise ValueError(f"explain: m must be a number of rows above 0, not {m!r}")
    if isinstance(linear, SparseLinear24):
        return _packed(linear, m)
    if isinstance(linear, SparseLinearBitmap):
        return _bitmap(linear, m)
    if isinstance(linear, nn.Linear) or is_conv1d(type(linear)):
        return _dense(linear, m)
    raise TypeError(
        f"explain: expected a packed linear, nn.Linear or Conv1D, not {type(linear).__name__}"
    )


def _packed(linear: SparseLinear24, m: int) -> Explanation:
    merged = linear.product if isinstance(linear, FusedLinear24) else None
    product = linear if merged is None else merged
    n, k, weight = product.out_features, product.in_features, product.weight
    among = "" if merged is None else f", one product for {' + '.join(merged.names)}"
    gpu = dispatch.gpu_of(weight.device)
    if gpu is None:
        known = weight.device.type == "cpu"
        why = "packed, on the CPU" if known else f"its weight is on the {weight.device} device"
        return Explanation(m, (n, k), "cpu" if known else "none", 1, why + among)
    why = dispatch.cannot_run(weight.device, weight.dtype, n, k)
    if why:
        return Explanation(m, (n, k), "none", 1, why + among)
    dtype = name_of(weight.dtype)
    row = dispatch.table_of(gpu).row(dtype, n, k, m)
    kernel, splits = dispatch.choose(gpu, dtype, n, k, m)
    if row is None:
        why = f"packed, by default, for m={m} was not measured on {gpu.name}"
    elif (row.kernel, row.splits) != (kernel, splits):
        row, why = None, "packed, by a rule that is not the table's"
    else:
        why = f"packed, by the table's rule for m={row.m} on {gpu.name}"
    times = (row.packed_us, row.dense_us) if row else (None, None)
    return Explanation(m, (n, k), kernel, splits, why + among, *times)


def _bitmap(linear: SparseLinearBitmap, m: int) -> Explanation:
    n, k, weight = linear.out_features, linear.in_features, linear.weight
    why = dispatch.cannot_run(weight.device, weight.dtype, n, k, linear.FORMAT)
    if why:
        return Explanation(m, (n, k), "none", 1, why)
    if dispatch.gpu_of(weight.device) is None:
        known = weight.device.type == "cpu"
        why = "a bitmap, on the CPU" if known else f"its weight is on the {weight.device} device"
        return Explanation(m, (n, k), "cpu" if known else "none", 1, why)
    if m <= BITMAP_TOKENS:
        why = f"a bitmap, read by tensor cores for up to {BITMAP_TOKENS} rows; not measured"
        return Explanation(m, (n, k), "bitmap_mma", 1, why)
    why = f"a bitmap, unpacked in tiles for dense products above {BITMAP_TOKENS} rows; not measured"
    return Explanation(m, (n, k), "bitmap_unpack", 1, why)


def _dense(linear: nn.Module, m: int) -> Explanation:
    weight = row_major(linear)
    n, k = weight.shape
    times = None
    try:
        kind, _ = pack(weight)
    except ValueError as error:
        why = f"cannot be packed: {error}"
    else:
        faster = dispatch.not_faster(weight.device, weight.dtype, n, k, (m,), kind.FORMAT)
        why = faster or f"{kind.FORMAT}, but not packed: wanda_ext.swap_linears(model) packs it"
        if kind is SparseLinear24:
            times = dispatch.times_of(weight.device, weight.dtype, n, k, (m,))
    return Explanation(m, (n, k), "dense", 1, why, *(times or (None, None)))
