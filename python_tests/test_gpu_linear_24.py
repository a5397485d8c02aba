"""linear_24 on a CUDA device against the fp64 product of the same weight. Skipped without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from op_cases import bits, generator, two_of_four
from torch import Tensor, nn

from wanda_ext import SparseLinear24, ops
from wanda_ext.packed import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOKENS = (0, 1, 2, 3, 5, 8, 16, 17, 33, 64, 65, 127, 1000)
SHAPES = ((1, 16), (8, 128), (72, 48), (200, 320), (264, 1040), (511, 4096), (4096, 592))
SPLITS = (1, 2, 3, 8, 16)
both_dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=("bfloat16", "float16")
)


class Problem:
    """A packed weight [n, k] in each order that the device reads, x [m, k] and a bias."""

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype) -> None:
        g = generator("gpu linear", m, n, k)
        self.n, self.k, self.dtype = n, k, dtype
        self.weight = two_of_four(n, k, dtype, "normal", g).cuda()
        self.values, meta = ops.pack_24(self.weight)
        self.metas = {order: ops.order_meta_24(meta, n, k, 0, order) for order in orders()}
        self.x = torch.randn(m, k, generator=g).to(dtype).cuda()
        self.bias = torch.randn(n, generator=g).to(dtype).cuda()

    def run(self, order: int, bias: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        return ops.linear_24(x, self.values, self.metas[order], order, bias)

    def check(self, y: Tensor, bias: Tensor | None = None, x: Tensor | None = None) -> None:
        """One rounding to the dtype, and the rounding of k additions in fp32, are allowed."""
        x = self.x if x is None else x
        wide, weight = x.double(), self.weight.double()
        exact, size = wide @ weight.T, wide.abs() @ weight.abs().T
        if bias is not None:
            exact, size = exact + bias.double(), size + bias.double().abs()
        added = size * self.k * 2.0**-25
        tiny = torch.finfo(self.dtype).tiny
        allowed = (exact.abs() + added) * torch.finfo(self.dtype).eps / 2 + added + tiny
        assert y.shape == exact.shape and y.dtype == self.dtype and y.is_contiguous()
        wrong = (~((y.double() - exact).abs() <= allowed)).nonzero()
        assert not len(wrong), f"{len(wrong)} of {y.numel()} are wrong, first {wrong[0].tolist()}"


def gpu() -> dispatch.Gpu:
    found = dispatch.gpu_of(torch.device("cuda"))
    assert found is not None
    return found


def orders() -> tuple[int, ...]:
    return (80, 90) if gpu().arch // 10 == 9 else (80,)


def default_order() -> int:
    return dispatch.order_of(gpu().arch)


def choices(m: int, n: int, k: int, dtype: torch.dtype) -> Iterator[tuple[str, int]]:
    """Every kernel with every number of splits that it can run the problem with."""
    for kernel in dispatch.kernels():
        for splits in SPLITS:
            if not dispatch.admits(gpu(), dispatch.name_of(dtype), n, k, m, kernel, splits):
                yield kernel, splits


@both_dtypes
@pytest.mark.parametrize("m", TOKENS)
def test_any_number_of_tokens(m: int, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        problem = Problem(m, n, k, dtype)
        for order in orders():
            problem.check(problem.run(order))
            problem.check(problem.run(order, problem.bias), problem.bias)


@both_dtypes
@pytest.mark.parametrize("seed", range(10))
def test_random_shapes(seed: int, dtype: torch.dtype) -> None:
    g = generator("gpu shapes", seed)
    m, n, words = (int(torch.randint(1, most, (1,), generator=g)) for most in (600, 3000, 300))
    problem = Problem(m, n, 16 * words, dtype)
    problem.check(problem.run(default_order(), problem.bias), problem.bias)


@both_dtypes
@pytest.mark.parametrize("m", [1, 5, 33, 64, 127, 300], ids=lambda m: f"m{m}")
@pytest.mark.parametrize(
    "shape", [(136, 272), (511, 592), (520, 2064), (1024, 4096)], ids="{0[0]}x{0[1]}".format
)
def test_every_kernel(shape: tuple[int, int], m: int, dtype: torch.dtype) -> None:
    problem, name = Problem(m, *shape, dtype), dispatch.name_of(dtype)
    tried = list(choices(m, *shape, dtype))
    assert tried, "no kernel runs on this device"
    for kernel, splits in tried:
        with dispatch.forced(gpu(), name, *shape, kernel, splits):
            assert dispatch.choose(gpu(), name, *shape, m) == (kernel, splits)
            y = problem.run(default_order(), problem.bias)
            problem.check(y, problem.bias)
            assert torch.equal(bits(y), bits(problem.run(default_order(), problem.bias)))


@both_dtypes
@pytest.mark.parametrize("m", [1, 3, 17, 130])
def test_rows_of_x_may_lie_anywhere(m: int, dtype: torch.dtype) -> None:
    problem = Problem(m, 200, 320, dtype)
    wide = torch.full((2 * m + 1, 411), float("nan"), dtype=dtype, device="cuda")
    columns = torch.full((320, m + 3), float("nan"), dtype=dtype, device="cuda")
    for x in (
        wide[1 : m + 1, 3:323],  # neither a row nor the first starts on 16 bytes
        wide[: 2 * m : 2, 8:328],
        columns[:, :m].t(),
        wide.flatten()[1 : 1 + m * 320].view(m, 320),
    ):
        x.copy_(problem.x)
        problem.check(problem.run(default_order(), x=x))
        x.fill_(float("nan"))
    batched = problem.x.view(1, m, 320).expand(2, m, 320)
    y = problem.run(default_order(), x=batched)
    assert y.shape == (2, m, 200)
    problem.check(y[0]), problem.check(y[1])


@both_dtypes
def test_a_graph_replays_every_kernel(dtype: torch.dtype) -> None:
    for m in (1, 33, 300):
        problem = Problem(m, 520, 2064, dtype)
        for kernel, splits in choices(m, 520, 2064, dtype):
            with dispatch.forced(gpu(), dispatch.name_of(dtype), 520, 2064, kernel, splits):
                problem.run(default_order(), problem.bias)  # warm-up before a capture
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    y = problem.run(default_order(), problem.bias)
            problem.x.normal_()
            y.fill_(float("nan"))
            for _ in range(2):
                graph.replay()
            problem.check(y, problem.bias)


def test_compiles_once_for_any_number_of_tokens() -> None:
    problem = Problem(130, 264, 1040, torch.bfloat16)
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def run(x: Tensor) -> Tensor:
        return problem.run(default_order(), problem.bias, x) * 2

    for m in (130, 7, 64):
        x = problem.x[:m].clone()
        assert torch.equal(run(x), problem.run(default_order(), problem.bias, x) * 2)
    assert len(compiles) == 1


@both_dtypes
def test_gradients_reach_input_and_bias(dtype: torch.dtype) -> None:
    problem = Problem(17, 72, 320, dtype)
    x, bias = problem.x.requires_grad_(), problem.bias.requires_grad_()
    ours = torch.autograd.grad(problem.run(default_order(), bias).sum(), [x, bias])
    dense = torch.autograd.grad(nn.functional.linear(x, problem.weight, bias).sum(), [x, bias])
    torch.testing.assert_close(ours, dense, rtol=2e-2, atol=2e-2)


def test_a_module_moves_and_computes() -> None:
    problem = Problem(5, 72, 320, torch.bfloat16)
    linear = nn.Linear(320, 72, dtype=torch.bfloat16)
    linear.weight.data, linear.bias.data = problem.weight.cpu(), problem.bias.cpu()
    packed = SparseLinear24.from_dense(linear).cuda()
    assert packed.order == default_order()
    problem.check(packed(problem.x).detach(), problem.bias)
    assert torch.equal(packed.cpu().dense_weight(), problem.weight.cpu())


def test_no_call_waits_for_the_device() -> None:
    problem = Problem(33, 520, 2064, torch.float16)
    problem.run(default_order())
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = problem.run(default_order(), problem.bias)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    problem.check(y, problem.bias)


def test_runs_on_the_current_stream() -> None:
    problem, stream = Problem(33, 520, 2064, torch.bfloat16), torch.cuda.Stream()
    expected = problem.run(default_order())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = problem.x.clone()
        y = problem.run(default_order(), x=late)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_what_a_device_cannot_read_is_refused() -> None:
    problem = Problem(3, 72, 320, torch.bfloat16)
    values, meta = ops.pack_24(problem.weight)
    with pytest.raises(RuntimeError, match="metadata order 0"):
        ops.linear_24(problem.x, values, meta, 0)
    values, meta = ops.pack_24(problem.weight.float())
    with pytest.raises(RuntimeError, match="float32"):
        ops.linear_24(problem.x.float(), values, ops.order_meta_24(meta, 72, 320, 0, 80), 80)
