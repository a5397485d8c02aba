"""Packed weights: their formats, the linears that hold them, and which kernel runs.

A format is one class and one row of FORMATS. From this room down nothing imports transformers:
its Conv1D is met by name. What serves packed weights without a model of transformers needs this
room alone.
"""

from __future__ import annotations

from wanda_ext.packed.bitmap import SparseLinearBitmap, looks_dense
from wanda_ext.packed.dispatch import cannot_run, check_tokens, not_faster, times_of
from wanda_ext.packed.explain import Explanation, explain
from wanda_ext.packed.formats import (
    FORMATS,
    expected_bytes,
    fits_records,
    named_format,
    pack,
    sound_linears,
    stored_linears,
)
from wanda_ext.packed.fuse import FusedLinear24, find_groups, merged
from wanda_ext.packed.linear import PackedLinear, computes_weight, is_conv1d, row_major
from wanda_ext.packed.linear_24 import Product24, SparseLinear24

__all__ = [
    "FORMATS",
    "Explanation",
    "FusedLinear24",
    "PackedLinear",
    "Product24",
    "SparseLinear24",
    "SparseLinearBitmap",
    "cannot_run",
    "check_tokens",
    "computes_weight",
    "expected_bytes",
    "explain",
    "find_groups",
    "fits_records",
    "is_conv1d",
    "looks_dense",
    "merged",
    "named_format",
    "not_faster",
    "pack",
    "row_major",
    "sound_linears",
    "stored_linears",
    "times_of",
]
