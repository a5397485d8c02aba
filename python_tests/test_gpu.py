"""Every op on a CUDA device against the same op on the CPU, bit for bit. Skipped without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_cases import DTYPES, KINDS, bits, generator, norms, rows_apart, two_of_four, uneven, values
from torch import Tensor

from wanda_ext import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16", "float16"))
ORDERS = (0, 80, 90)


def on_both(run: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """run(*inputs) has the same bits on the CPU and on the device; it may write its inputs."""
    results = []
    for device in ("cpu", "cuda"):
        moved = [_on(x, device) for x in inputs]
        made = run(*moved)
        results.append([*moved, *(made if isinstance(made, tuple) else (made,))])
    for expected, actual in zip(*results, strict=True):
        if expected.dtype in (torch.float64, torch.bool):  # a NaN's payload is the device's own
            torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)
        else:
            assert torch.equal(bits(actual.cpu()), bits(expected))


def _on(x: Tensor, device: str) -> Tensor:
    """A copy on the device with the same strides, gaps between rows included."""
    storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return storage.clone().to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def new_bad(like: Tensor) -> Tensor:
    return torch.full((1,), 99, dtype=torch.int32, device=like.device)


def prune_rows(weight: Tensor, norm: Tensor | None, n_prune: int) -> Tensor:
    bad = new_bad(weight)
    ops.prune_rows_(weight, norm, n_prune, bad)
    return bad


def prune_nm(weight: Tensor, norm: Tensor | None, keep: int, group: int) -> Tensor:
    bad = new_bad(weight)
    ops.prune_nm_(weight, norm, keep, group, bad)
    return bad


def pack(weight: Tensor) -> tuple[Tensor, ...]:
    bad = new_bad(weight)
    return (*ops.pack_24(weight, bad), bad)


@every_dtype
@pytest.mark.parametrize("m", [0, 1, 33, 256, 900])
@pytest.mark.parametrize("k", [1, 9, 130, 1024, 4096])
def test_input_sumsq(m: int, k: int, dtype: torch.dtype) -> None:
    g = generator("gpu sumsq", m, k)
    acc = torch.linspace(0, 1, k, dtype=torch.float64)
    keep = torch.rand(m, generator=g) < 0.6
    for x in (uneven(values((m, k), dtype, "normal", g), g), values((m, k), dtype, "large", g)):
        on_both(lambda a, b: ops.input_sumsq_(a, b) or a, acc, x)
        on_both(lambda a, b: ops.input_sumsq_(a, b) or a, acc, rows_apart(x))
        on_both(lambda a, b, c: ops.input_sumsq_(a, b, c) or a, acc, x, keep)


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 7, 64, 1000, 4096, 11008, 28672, 40000, 131071, 131072])
def test_prune_rows(k: int, kind: str, dtype: torch.dtype) -> None:
    g = generator("gpu rows", k, kind)
    weight, norm = values((6, k), dtype, kind, g), norms(k, kind, g)
    for n_prune in sorted({0, 1, k // 2, k - 1, k}):
        on_both(lambda w, s, p=n_prune: prune_rows(w, s, p), weight, norm)
        on_both(lambda w, p=n_prune: prune_rows(w, None, p), weight)
    on_both(lambda w, s: prune_rows(w, s, k // 2), rows_apart(weight), norm)


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (4, 4), (3, 5), (16, 32), (1, 1)])
def test_prune_nm(pattern: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    keep, group = pattern
    for groups in (1, 3, 128, 2752, 9000):
        g = generator("gpu nm", groups, group, kind)
        k = groups * group
        weight, norm = values((5, k), dtype, kind, g), norms(k, kind, g)
        on_both(lambda w, s: prune_nm(w, s, keep, group), weight, norm)
        on_both(lambda w: prune_nm(w, None, keep, group), rows_apart(weight))


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [16, 48, 4096, 11008, 40000])
def test_pack_order_unpack(k: int, kind: str, dtype: torch.dtype) -> None:
    g = generator("gpu pack", k, kind)
    weight = two_of_four(70, k, dtype, kind, g)
    on_both(pack, weight)
    on_both(pack, rows_apart(weight))
    packed, meta = ops.pack_24(weight)
    for src in ORDERS:
        ordered = ops.order_meta_24(meta, 70, k, 0, src)
        on_both(lambda v, m, o=src: ops.unpack_24(v, m, o), packed, ordered)
        for dst in ORDERS:
            on_both(lambda m, s=src, d=dst: ops.order_meta_24(m, 70, k, s, d), ordered)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_rows_are_left_alone_and_reported(value: float) -> None:
    weight = values((400, 256), torch.float16, "normal", generator("gpu bad"))
    weight[[317, 58], [200, 3]] = value
    on_both(lambda w: prune_rows(w, None, 128), weight)
    on_both(lambda w: prune_nm(w, None, 2, 4), weight)
    on_both(lambda w: prune_nm(w, None, 16, 32), weight)
    on_both(pack, weight)
    assert prune_rows(weight.cuda(), None, 128).item() == 58


def test_a_graph_replays_the_ops() -> None:
    g = generator("gpu graph")
    first, second = values((2, 300, 512), torch.bfloat16, "normal", g)
    norm = norms(512, "normal", g).cuda()
    weight, bad = first.cuda(), new_bad(norm)
    acc = torch.zeros(512, dtype=torch.float64, device="cuda")

    def work() -> Tensor:
        ops.input_sumsq_(acc, weight)
        ops.prune_rows_(weight, norm, 100, bad)
        ops.prune_nm_(weight, norm, 2, 4, bad)
        meta = ops.order_meta_24(ops.pack_24(weight, bad)[1], 300, 512, 0, 90)
        return ops.unpack_24(ops.pack_24(weight)[0], meta, 90)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()  # torch's warm-up before a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        unpacked = work()
    weight.copy_(second)
    graph.replay()
    expected = second.clone()
    ops.prune_rows_(expected, norm.cpu(), 100)
    ops.prune_nm_(expected, norm.cpu(), 2, 4)
    assert torch.equal(bits(unpacked.cpu()), bits(expected))
    assert torch.equal(bits(weight.cpu()), bits(expected))
    assert bad.item() == -1


def test_no_op_waits_for_the_device() -> None:
    weight = torch.randn(512, 1024, device="cuda", dtype=torch.float16)
    acc = torch.zeros(1024, dtype=torch.float64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.input_sumsq_(acc, weight)
        ops.prune_rows_(weight, None, 100)
        ops.prune_nm_(weight, None, 2, 4)
        values_, meta = ops.pack_24(weight)
        ops.unpack_24(values_, ops.order_meta_24(meta, 512, 1024, 0, 80), 80)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_ops_run_on_the_current_stream() -> None:
    weight = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16)
    expected = weight.clone()
    ops.prune_nm_(expected, None, 2, 4)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = weight.clone()
        ops.prune_nm_(late, None, 2, 4)
    stream.synchronize()
    assert torch.equal(late, expected)
