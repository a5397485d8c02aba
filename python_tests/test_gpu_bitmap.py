"""The bitmap ops on a CUDA device: the CPU's bits, products against fp64. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from op_cases import bits, generator
from torch import Tensor

from wanda_ext import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOKENS = (0, 1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 130)
SHAPES = (
    (1, 32),
    (16, 128),
    (40, 100),
    (70, 1057),
    (511, 4096),
    (4096, 592),
    (64, 20000),
    (3, 65536),
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)


def at_most_16(n: int, k: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """A weight [n, k] with 0 to 16 non-zeros in every 32 columns, zeros of both signs."""
    padded = -k % 32 + k
    weight = torch.randn(n, padded // 32, 32, generator=g).to(dtype)
    rank = torch.rand(weight.shape, generator=g).argsort(-1).argsort(-1)
    room = torch.randint(0, 17, (*weight.shape[:2], 1), generator=g)
    return (weight * (rank < room)).view(n, padded)[:, :k].contiguous()


class Problem:
    """A packed weight [n, k] with a surplus, x [m, k] and a bias."""

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype) -> None:
        g = generator("gpu bitmap", m, n, k)
        self.n, self.k, self.dtype = n, k, dtype
        self.body = at_most_16(n, k, dtype, g).cuda()
        extra = (torch.rand(n, k, generator=g) < 0.02).cuda() & (self.body == 0)
        row, column = extra.nonzero(as_tuple=True)
        values = torch.randn(len(row), generator=g).to(dtype).cuda()
        self.weight = self.body.clone()
        self.weight[row, column] = values
        rows = torch.zeros(n + 1, dtype=torch.int32, device="cuda")
        rows[1:] = extra.sum(1).cumsum(0)
        self.surplus = (rows, column.short(), values)
        self.values, self.mask = ops.pack_bitmap(self.body)
        self.x = torch.randn(m, k, generator=g).to(dtype).cuda()
        self.bias = torch.randn(n, generator=g).to(dtype).cuda()

    def run(self, bias: Tensor | None = None, surplus: bool = False, x: Tensor | None = None):
        x = self.x if x is None else x
        lists = self.surplus if surplus else (None, None, None)
        return ops.linear_bitmap(x, self.values, self.mask, self.n, bias, *lists)

    def check(self, y: Tensor, bias: Tensor | None = None, surplus: bool = False) -> None:
        """One rounding to the dtype, and the rounding of k additions in fp32, are allowed."""
        wide, weight = self.x.double(), (self.weight if surplus else self.body).double()
        exact, size = wide @ weight.T, wide.abs() @ weight.abs().T
        if bias is not None:
            exact, size = exact + bias.double(), size + bias.double().abs()
        added = size * self.k * 2.0**-24
        unit = torch.finfo(self.dtype)
        allowed = (exact.abs() + added) * unit.eps / 2 + added + unit.tiny
        if self.x.shape[0] > 16 and bias is not None:  # the dense product may round before it adds
            allowed = allowed + exact.abs() * unit.eps + bias.double().abs() * unit.eps
        assert y.shape == exact.shape and y.dtype == self.dtype and y.is_contiguous()
        wrong = (~((y.double() - exact).abs() <= allowed)).nonzero()
        assert not len(wrong), f"{len(wrong)} of {y.numel()} are wrong, first {wrong[0].tolist()}"


@every_dtype
@pytest.mark.parametrize("shape", [*SHAPES, (0, 64), (4096, 4097)], ids=str)
def test_packs_and_unpacks_the_bits_of_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = at_most_16(*shape, dtype, generator("pack", *shape))
    if weight.numel():
        weight[-1] = 1  # a row with too much
    bad, expected_bad = (torch.zeros(1, dtype=torch.int32, device=d) for d in ("cuda", "cpu"))
    expected = ops.pack_bitmap(weight, expected_bad)
    packed = ops.pack_bitmap(weight.cuda(), bad)
    for ours, theirs in zip(packed, expected, strict=True):
        assert torch.equal(bits(ours.cpu()), bits(theirs))
    assert bad.item() == expected_bad.item()
    unpacked = ops.unpack_bitmap(*packed, *shape)
    assert torch.equal(bits(unpacked.cpu()), bits(ops.unpack_bitmap(*expected, *shape)))


@every_dtype
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("k", [32, 4096, 16416, 131072])
def test_prunes_the_bits_of_the_cpu(k: int, group: int, dtype: torch.dtype) -> None:
    g = generator("prune", k, group)
    weight = torch.randn(9, k, generator=g).to(dtype)
    weight[3], weight[4] = torch.randint(-2, 3, (k,), generator=g).to(dtype), 1  # ties
    norm = torch.rand(k, generator=g)
    for keep in (group // 2, 1, group - 1, group):
        ours, expected = weight.cuda(), weight.clone()
        ops.prune_nm_(ours, norm.cuda(), keep, group)
        ops.prune_nm_(expected, norm, keep, group)
        assert torch.equal(bits(ours.cpu()), bits(expected))


@both_dtypes
@pytest.mark.parametrize("m", TOKENS)
def test_any_number_of_tokens(m: int, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        problem = Problem(m, n, k, dtype)
        problem.check(problem.run())
        problem.check(problem.run(problem.bias, True), problem.bias, True)


@both_dtypes
@pytest.mark.parametrize("seed", range(10))
def test_random_shapes(seed: int, dtype: torch.dtype) -> None:
    g = generator("gpu bitmap shapes", seed)
    m, n, k = (int(torch.randint(1, most, (1,), generator=g)) for most in (17, 6000, 9000))
    problem = Problem(m, n, k, dtype)
    y = problem.run(problem.bias, True)
    problem.check(y, problem.bias, True)
    assert torch.equal(bits(y), bits(problem.run(problem.bias, True)))


@both_dtypes
def test_a_graph_replays(dtype: torch.dtype) -> None:
    for m in (1, 8, 16):
        problem = Problem(m, 520, 2064, dtype)
        problem.run(problem.bias, True)  # warm-up before a capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = problem.run(problem.bias, True)
        problem.x.normal_()
        y.fill_(float("nan"))
        for _ in range(2):
            graph.replay()
        problem.check(y, problem.bias, True)


@both_dtypes
@pytest.mark.parametrize("m", [1, 5, 16])
def test_rows_of_x_may_lie_anywhere(m: int, dtype: torch.dtype) -> None:
    problem = Problem(m, 200, 321, dtype)
    wide = torch.full((2 * m + 1, 411), float("nan"), dtype=dtype, device="cuda")
    for x in (wide[1 : m + 1, 3:324], wide[: 2 * m : 2, 8:329]):
        x.copy_(problem.x)
        problem.check(problem.run(x=x))


def test_no_call_waits_for_the_device() -> None:
    problem = Problem(8, 520, 2064, torch.float16)
    problem.run(problem.bias, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = problem.run(problem.bias, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    problem.check(y, problem.bias, True)
