"""formats.pack: which format a weight fits, what else a bitmap needs, and the reason of a no."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models_24 import prune_to
from op_cases import bits
from torch import nn

from wanda_ext.files.directory import TensorHeader
from wanda_ext.methods.sparsity import NM, parse_sparsity
from wanda_ext.packed.bitmap import SparseLinearBitmap, looks_dense, surplus_of
from wanda_ext.packed.formats import (
    FORMATS,
    expected_bytes,
    fits_records,
    named_format,
    pack,
    stored_linears,
)
from wanda_ext.packed.linear_24 import SparseLinear24

NOT_24 = r"not 2:4: row 0, columns \d+ to \d+ hold [34] non-zeros"
SLOW = {SparseLinear24: "24 is slow", SparseLinearBitmap: "bitmap is slow"}


def weight(sparsity: str | float, n: int = 80, k: int = 256) -> torch.Tensor:
    torch.manual_seed(2)
    module = nn.Linear(k, n, dtype=torch.bfloat16)
    if sparsity:
        prune_to(module, sparsity)
    return module.weight.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sparsity", "k", "name", "options"),
    [
        ("2:4", 256, "2:4", set()),
        ("1:4", 256, "2:4", set()),
        ("2:4", 248, "bitmap", set()),  # 2:4, but k % 16 != 0
        ("4:8", 256, "bitmap", set()),
        ("8:16", 256, "bitmap", set()),
        ("16:32", 256, "bitmap", set()),
        (0.5, 256, "bitmap", {"surplus"}),
        (0.5, 250, "bitmap", {"surplus"}),
        (1.0, 256, "2:4", set()),  # all zero
        (1.0, 250, "bitmap", set()),
    ],
)
def test_the_first_format_that_fits(sparsity, k, name, options, dtype):
    given = weight(sparsity, k=k).to(dtype)
    kind, tensors = pack(given)
    assert kind is named_format(name) and set(kind.options(tensors)) == options
    assert tuple(tensors) == kind.TENSORS[: len(tensors)]
    assert torch.equal(bits(kind.unpack(tensors)), bits(given + 0.0))
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert nbytes == kind.nbytes_of(*given.shape, dtype.itemsize, **kind.options(tensors))
    assert nbytes < given.nbytes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (weight(0), rf"{NOT_24}; not pruned: 0\.0% of its first 64 rows is zero"),
        (weight(0, k=250), "its 250 columns are not a multiple of 16; not pruned: 0.0% of .* zero"),
        (weight(0.1), rf"{NOT_24}; not pruned: 9\.8% of its first 64 rows is zero"),
        (weight(0.2), rf"{NOT_24}; a bitmap would take 117% of its bytes"),
        (weight(0.5).double(), r"its weight is torch\.float64, not float32, bfloat16 or float16"),
        (weight(0.5).to("meta"), r"its weight is not in memory \(meta device\)"),
    ],
)
@pytest.mark.parametrize("refused", [None, SLOW])  # it would not fit, so that is what is said
def test_what_fits_none_says_why(given, message, refused):
    with pytest.raises(ValueError) as error:
        pack(given, refused)
    assert re.fullmatch(message, str(error.value))


@pytest.mark.parametrize(
    ("sparsity", "k", "message"),
    [
        ("2:4", 256, "24 is slow"),
        ("16:32", 256, f"{NOT_24}; bitmap is slow"),
        (0.5, 256, f"{NOT_24}; bitmap is slow"),
        ("2:4", 248, "its 248 columns are not a multiple of 16; bitmap is slow"),
    ],
)
def test_a_refused_format_that_it_fits_has_the_last_word(sparsity, k, message):
    with pytest.raises(ValueError) as error:
        pack(weight(sparsity, k=k), SLOW)
    assert re.fullmatch(message, str(error.value))


def test_one_refused_format_leaves_the_other():
    given = weight("2:4")
    assert pack(given, {SparseLinear24: "24 is slow"})[0] is SparseLinearBitmap
    assert pack(given, {SparseLinear24: "", SparseLinearBitmap: "bitmap is slow"})[0] is FORMATS[0]
    with pytest.raises(ValueError, match=f"{NOT_24}; bitmap is slow"):
        pack(weight(0.5), {SparseLinearBitmap: "bitmap is slow"})


def test_gradients_and_strides_of_the_weight_are_its_own():
    given = weight("16:32", k=256).float().requires_grad_()
    _, tensors = pack(given)
    assert not any(tensor.requires_grad for tensor in tensors.values())
    turned = weight("16:32").T.contiguous().T  # as a Conv1D has it
    assert torch.equal(pack(turned)[1]["weight"], pack(turned.contiguous())[1]["weight"])


# --- Stored tensors -------------------------------------------------------------------------------


def headers_of(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, TensorHeader]:
    short = {torch.bfloat16: "BF16", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}
    return {
        f"{name}.{part}": TensorHeader(Path("x"), short[tensor.dtype], tuple(tensor.shape))
        for part, tensor in tensors.items()
    }


def test_linears_are_found_by_their_format():
    half, balanced = weight("2:4"), weight(0.5)
    headers = headers_of("a.b", SparseLinear24.pack(half))
    headers |= headers_of("a.c", SparseLinearBitmap.pack(balanced))
    headers |= headers_of("dense", {"weight": half, "mask": half[None]})  # of no format
    found = {kind: stored_linears(headers, kind) for kind in FORMATS}
    assert {kind: list(names) for kind, names in found.items()} == {
        SparseLinear24: ["a.b"],
        SparseLinearBitmap: ["a.c"],
    }
    for kind, names in found.items():
        for tensors in names.values():
            assert tuple(tensors) == kind.TENSORS and kind.damage(tensors) == ""
    bitmap = found[SparseLinearBitmap]["a.c"]
    assert bitmap["surplus_rows"].shape == (81,) and bitmap["weight"].dtype == "BF16"


@pytest.mark.parametrize(
    ("changes", "damage"),
    [
        ({"weight": None}, "weight is missing"),
        ({"weight": (5, 3, 1024)}, r"weight is of shape \[5, 3, 1024\]"),
        ({"mask": (5, 3, 64)}, r"weight is of shape \[5, 2, 1024\], .* \[5, 3, 64\]"),
        ({"mask": (5, 2, 32)}, r"mask is of shape \[5, 2, 32\]"),
        ({"shape": None}, "shape is missing"),
        ({"shape": (3,)}, r"shape is of shape \[3\]"),
        ({"surplus_rows": None}, "surplus_rows is missing"),
        ({"surplus_columns": None}, "surplus_columns is missing"),
        ({"surplus_values": None}, "surplus_values is missing"),
        ({"surplus_columns": (1,)}, r"surplus_columns is of shape \[1\]"),
        ({"surplus_values": (1,)}, r"surplus_columns is of shape"),
    ],
)
def test_damage_of_a_bitmap_is_named(changes, damage):
    tensors = stored_linears(headers_of("a", SparseLinearBitmap.pack(weight(0.5))), FORMATS[1])["a"]
    assert SparseLinearBitmap.damage(tensors) == ""
    for name, shape in changes.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = replace(tensors[name], shape=shape)
    assert re.match(damage, SparseLinearBitmap.damage(tensors))


# --- The surplus of a bitmap ----------------------------------------------------------------------


def slowly(weight: torch.Tensor) -> tuple[list[int], list[int], list[float]]:
    rows, columns, entries = [0], [], []
    for row in weight.tolist():
        for first in range(0, len(row), 32):
            filled = [i for i in range(first, min(first + 32, len(row))) if row[i]]
            columns += filled[16:]
            entries += [row[i] for i in filled[16:]]
        rows.append(len(columns))
    return rows, columns, entries


@pytest.mark.parametrize("density", [0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(("n", "k"), [(1, 33), (5, 31), (130, 95), (65, 64), (2, 40000)])
def test_the_surplus_is_what_a_slow_loop_finds(n, k, density):
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator)
    weight[torch.rand(n, k, generator=generator) >= density] = -0.0
    rows, columns, entries = surplus_of(weight)
    assert (rows.dtype, columns.dtype, entries.dtype) == (torch.int32, torch.int16, torch.float32)
    found = rows.tolist(), (columns.int() & 0xFFFF).tolist(), entries.tolist()
    assert found == slowly(weight)
    assert k < 40000 or density < 0.5 or columns.min() < 0  # over 32767


def test_a_surplus_numbers_65536_columns_and_no_more():
    for k in (1 << 16, (1 << 16) + 32):
        weight = torch.zeros(16, k, dtype=torch.bfloat16)
        weight[:, : k // 2] = 1
        weight[3, -17:] = 2  # one too many for a record
        weight[:, : k // 2 : 32] = 0
        weight[:, 1 : k // 2 : 2] = 0
        if k > 1 << 16:
            with pytest.raises(ValueError, match="65568 columns are over 65536"):
                SparseLinearBitmap.pack(weight)
            weight[3, -1] = 0  # there is room without it
        tensors = SparseLinearBitmap.pack(weight)
        assert SparseLinearBitmap.options(tensors) == ({} if k > 1 << 16 else {"surplus": 1})
        assert torch.equal(SparseLinearBitmap.unpack(tensors), weight)


def test_the_first_rows_tell_what_was_not_pruned():
    weight = torch.ones(100, 40)
    weight[:64, :4] = 0
    assert not looks_dense(weight)
    weight[0, 0] = 1
    assert looks_dense(weight)
    assert not looks_dense(torch.ones(0, 40))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("sparsity", ["2:4", "4:8", "16:32", "5:8", "9:16", 0.5, 0.4, 0.31, 0.7])
def test_bytes_are_expected_before_the_prune(sparsity, itemsize):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    linear = nn.Linear(1024, 512, bias=False, dtype=dtype)
    prune_to(linear, sparsity)
    asked = parse_sparsity(sparsity)
    _, tensors = pack(linear.weight)
    told = expected_bytes(asked, 512, 1024, itemsize)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    exact = isinstance(asked, NM)
    assert told == pytest.approx(nbytes, rel=0 if exact else 0.02)


@pytest.mark.parametrize(
    ("sparsity", "fits"),
    [("2:4", True), ("3:8", True), ("16:32", True), ("17:32", False), ("3:6", False), (0.9, False)],
)
def test_what_needs_no_surplus(sparsity, fits):
    assert fits_records(parse_sparsity(sparsity)) == fits
