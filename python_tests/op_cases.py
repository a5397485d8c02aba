"""Random tensors for the op tests: every dtype, awkward values, rows that lie apart."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

from wanda_ext import _C, ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("normal", "ties", "zeros", "denormal", "large", "powers")


def cpu_kernel_sets() -> list[str]:
    """The sets of kernels for CPU products that this processor has."""
    found, before = [], _C.cpu_kernels()
    for name in ("amx", "avx512_bf16", "avx512", "avx2", "plain"):
        try:
            _C.use_cpu_kernels(name)
        except RuntimeError:
            continue
        found.append(name)
    _C.use_cpu_kernels(before)
    return found


def generator(*seed: object) -> torch.Generator:
    """The same stream for the same case, in every run."""
    return torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))


def values(shape: tuple[int, ...], dtype: torch.dtype, kind: str, g: torch.Generator) -> Tensor:
    """One tensor of a kind of KINDS; finite, and so are its products with `norms`."""
    normal = torch.randn(shape, generator=g)
    if kind == "ties":  # few distinct magnitudes, so the k-th lowest score is shared
        return (normal * 2).round().to(dtype)
    if kind == "zeros":  # mostly +0.0 and -0.0
        return (normal * (torch.rand(shape, generator=g) < 0.3)).to(dtype)
    if kind == "denormal":
        return (normal * torch.finfo(dtype).smallest_normal).to(dtype)
    if kind == "large":
        return (normal.clamp(-4, 4) * (torch.finfo(dtype).max / 1024)).to(dtype)
    if kind == "powers":  # of two, in some rows 2.0 alone: few bits, the highest of an exponent
        exponents = torch.randint(1, 15, shape, generator=g)
        if len(shape) > 1:
            exponents[::2] = 1
        return (2.0**exponents * normal.sign()).to(dtype)
    return normal.to(dtype)


def uneven(x: Tensor, g: torch.Generator) -> Tensor:
    """x with every 32 rows scaled by another power of two, so that even sums in fp64 round."""
    chunks = torch.randint(-12, 12, (x.shape[0] // 32 + 1, 1), generator=g)
    return x * (2.0 ** chunks.repeat_interleave(32, dim=0)[: x.shape[0]]).to(x.dtype)


def norms(k: int, kind: str, g: torch.Generator) -> Tensor:
    """input_norm [k] float32: zeros among them, equal ones where scores are to tie."""
    norm = torch.randn(k, generator=g).exp().clamp(max=64)
    if kind == "ties":
        norm = norm.round()
    return norm.where(torch.rand(k, generator=g) > 0.05, 0.0)


def rows_apart(matrix: Tensor, gap: int = 5) -> Tensor:
    """The same matrix with `gap` elements of NaN between its rows."""
    n, k = matrix.shape
    wide = torch.full((n, k + gap), float("nan"), dtype=matrix.dtype)
    wide[:, :k] = matrix
    return wide[:, :k]


def two_of_four(n: int, k: int, dtype: torch.dtype, kind: str, g: torch.Generator) -> Tensor:
    """A weight [n, k] with at most two non-zeros in every four columns."""
    weight = values((n, k), dtype, kind, g).reshape(n, k // 4, 4)
    kept = torch.rand(weight.shape, generator=g).argsort(dim=2) < 2
    return weight.where(kept, -0.0).reshape(n, k)


def bitmap_of_32(n: int, k: int, dtype: torch.dtype, kind: str, g: torch.Generator) -> Tensor:
    """A weight [n, k] with at most 16 non-zeros in every 32 columns; the last few may be fewer."""
    records = values((n, -(-k // 32), 32), dtype, kind, g)
    kept = torch.rand(records.shape, generator=g).argsort(dim=2) < 16
    return records.where(kept, -0.0).flatten(1)[:, :k].contiguous()


def surplus_of(weight: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weight with a few of its zeros filled, and those as rows, columns and values of a CSR.

    Columns are int16 with unsigned bits: 40000 is -25536.
    """
    whole = weight + 0.0
    filled = (whole == 0) & (torch.rand(whole.shape, generator=g) < 0.05)
    whole[filled] = values((int(filled.sum()),), weight.dtype, "normal", g)
    rows = torch.nn.functional.pad(filled.sum(dim=1).cumsum(0), (1, 0)).int()
    return whole, rows, filled.nonzero()[:, 1].short(), whole[filled]


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers: tells -0.0 from +0.0 and one NaN from another."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return tensor.contiguous().view(integer)


def assert_refused(
    name: str, arguments: tuple[object, ...], error: type[Exception], message: str
) -> None:
    """By the checks of `wanda_ext.ops` with this message, and by the op itself."""
    with pytest.raises(error, match=rf"wanda_ext\.{name}: {message}"):
        getattr(ops, name)(*arguments)
    if "no gradient" not in message:  # torch.ops has no say in that
        with pytest.raises(RuntimeError, match=rf"wanda_ext\.{name}: "):
            getattr(torch.ops.wanda_ext, name)(*arguments)
