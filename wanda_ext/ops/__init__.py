"""The ops: one typed Python function per op, its checks and its fake.

What an op takes is checked here; what it does is C++ (csrc/include/wanda_ext/ops.h has the
contract). The same in plain PyTorch, the oracle of the tests, is `wanda_ext.reference`. An op
enters here, and nothing else.
"""

from __future__ import annotations

from wanda_ext.ops.checks import FLOATS, MAX_SURPLUS_COLS
from wanda_ext.ops.functions import (
    MAX_COLS,
    MAX_GROUP,
    OPS,
    input_sumsq_,
    linear_24,
    linear_bitmap,
    linear_stream,
    order_meta_24,
    pack_24,
    pack_bitmap,
    pack_stream,
    prune_nm_,
    prune_rows_,
    supports,
    unpack_24,
    unpack_bitmap,
    unpack_stream,
)
from wanda_ext.ops.register import bitmap_tiles

__all__ = [
    "FLOATS",
    "MAX_COLS",
    "MAX_GROUP",
    "MAX_SURPLUS_COLS",
    "OPS",
    "bitmap_tiles",
    "input_sumsq_",
    "linear_24",
    "linear_bitmap",
    "linear_stream",
    "order_meta_24",
    "pack_24",
    "pack_bitmap",
    "pack_stream",
    "prune_nm_",
    "prune_rows_",
    "supports",
    "unpack_24",
    "unpack_bitmap",
    "unpack_stream",
]
