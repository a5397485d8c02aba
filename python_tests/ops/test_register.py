"""What torch asks of an op: schema and fakes by opcheck, torch.compile, gradients, meta."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import DTYPES, bitmap_of_32, generator, surplus_of, two_of_four
from torch import Tensor

from wanda_ext import ops, reference
from wanda_ext.ops.register import FAKES


def op_arguments() -> dict[str, list[tuple[Any, ...]]]:
    g = generator("opcheck")
    weight = two_of_four(6, 48, torch.float32, "normal", g)
    packed, meta = reference.pack_24(weight)
    x = torch.randn(2, 3, 48, generator=g)
    acc, norm = torch.zeros(48, dtype=torch.float64), torch.rand(48, generator=g)
    keep, bad = torch.rand(2, 3, generator=g) < 0.5, torch.zeros(1, dtype=torch.int32)
    sm80 = reference.order_meta_24(meta, 6, 48, 0, 80)
    bias = torch.randn(6, generator=g, requires_grad=True)
    record = bitmap_of_32(6, 48, torch.float32, "normal", g)
    bitmap = reference.pack_bitmap(record)
    _, *surplus = surplus_of(record, g)
    count = int(record.count_nonzero())
    stream = reference.pack_stream(record, count)
    return {
        "input_sumsq_": [(acc, x), (acc, x.bfloat16(), keep), (acc, x.transpose(0, 1))],
        "prune_rows_": [
            (weight, norm, 20, bad),
            (weight, None, 20),
            (weight[:, :40], None, 3, bad),
        ],
        "prune_nm_": [(weight, norm, 2, 4, bad), (weight.half(), None, 4, 8)],
        "pack_24": [(weight, bad), (weight.bfloat16(),)],
        "unpack_24": [(packed, meta, 0), (packed, sm80, 80)],
        "order_meta_24": [(meta, 6, 48, 0, 90), (sm80, 6, 48, 80, 0), (meta, 6, 48, 0, 0)],
        "linear_24": [
            (x, packed, meta, 0),
            (x.clone().requires_grad_(), packed, sm80, 80, bias),
            (x.half(), packed.half(), meta, 0, bias.detach().half()),
        ],
        "pack_bitmap": [(record, bad), (record[:, :40].bfloat16(),)],
        "unpack_bitmap": [(*bitmap, 6, 48), (*bitmap, 6, 48, *surplus)],
        "linear_bitmap": [
            (x, *bitmap, 6),
            (x.clone().requires_grad_(), *bitmap, 6, bias, *surplus),
            (x.half(), bitmap[0].half(), bitmap[1], 6, bias.detach().half()),
        ],
        "pack_stream": [(record, count), (record[:, :0], 0)],
        "unpack_stream": [(*stream, 48)],
        "linear_stream": [
            (x, *stream),
            (x.clone().requires_grad_(), *stream, bias),
            (x.half(), stream[0].half(), *stream[1:], bias.detach().half()),
        ],
    }


CASES = [(name, i) for name, cases in op_arguments().items() for i in range(len(cases))]


def test_every_op_is_checked() -> None:
    assert set(op_arguments()) == set(FAKES) == set(ops.OPS)


@pytest.mark.parametrize("name, case", CASES)
def test_opcheck(name: str, case: int) -> None:
    arguments = op_arguments()[name][case]
    torch.library.opcheck(getattr(torch.ops.wanda_ext, name), arguments)


@pytest.mark.parametrize("name, case", CASES)
def test_meta_tensors_get_the_same_shapes(name: str, case: int) -> None:
    def shapes(result: Any) -> Any:
        tensors = result if isinstance(result, tuple) else (result,)
        return [(t.shape, t.dtype, t.stride()) for t in tensors if t is not None]

    arguments = op_arguments()[name][case]
    on_meta = [a.detach().to("meta") if isinstance(a, Tensor) else a for a in arguments]
    assert shapes(getattr(ops, name)(*on_meta)) == shapes(getattr(ops, name)(*arguments))


def prune_pack_and_apply(x: Tensor, weight: Tensor, acc: Tensor, bad: Tensor) -> list[Tensor]:
    ops.input_sumsq_(acc, x)
    norm = acc.sqrt().float()
    ops.prune_rows_(weight, norm, 10, bad)
    ops.prune_nm_(weight, norm, 2, 4, bad)
    packed, meta = ops.pack_24(weight, bad)
    sm80 = ops.order_meta_24(meta, *weight.shape, 0, 80)
    y = ops.linear_24(x, packed, sm80, 80)
    return [y, ops.unpack_24(packed, meta)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    g = generator("compile")
    compiled = torch.compile(
        prune_pack_and_apply, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for m in (5, 9):
        x, weight = torch.randn(m, 64, generator=g), torch.randn(12, 64, generator=g)
        eager = [weight.clone(), torch.zeros(64, dtype=torch.float64), torch.zeros(1).int()]
        traced = [tensor.clone() for tensor in eager]
        results = prune_pack_and_apply(x, *eager), compiled(x, *traced)
        for a, b in zip(results[0] + eager, results[1] + traced, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [0, 90])
def test_linear_has_the_gradients_of_its_dense_twin(dtype: torch.dtype, order: int) -> None:
    g = generator("grad", order)
    weight = two_of_four(20, 48, dtype, "normal", g)
    packed, meta = ops.pack_24(weight)
    moved = ops.order_meta_24(meta, 20, 48, 0, order)
    grad_y = torch.randn(2, 3, 20, generator=g).to(dtype)
    leaves = [torch.randn(2, 3, 48, generator=g).to(dtype), torch.randn(20, generator=g).to(dtype)]
    x, bias = (leaf.clone().requires_grad_() for leaf in leaves)
    ops.linear_24(x, packed, moved, order, bias).backward(grad_y)
    dense_x, dense_bias = (leaf.clone().requires_grad_() for leaf in leaves)
    torch.nn.functional.linear(dense_x, weight, dense_bias).backward(grad_y)
    torch.testing.assert_close(x.grad, dense_x.grad)
    torch.testing.assert_close(bias.grad, dense_bias.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_surplus", [False, True])
def test_linear_bitmap_has_the_gradients_of_its_dense_twin(
    dtype: torch.dtype, with_surplus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = generator("bitmap grad", with_surplus)
    weight = bitmap_of_32(70, 40, dtype, "normal", g)
    packed = ops.pack_bitmap(weight)
    whole, *surplus = surplus_of(weight, g)
    weight, rest = (whole, surplus) if with_surplus else (weight, [])
    grad_y = torch.randn(2, 3, 70, generator=g).to(dtype)
    leaves = [torch.randn(2, 3, 40, generator=g).to(dtype), torch.randn(70, generator=g).to(dtype)]
    dense_x, dense_bias = (leaf.clone().requires_grad_() for leaf in leaves)
    torch.nn.functional.linear(dense_x, weight, dense_bias).backward(grad_y)
    for limit in (1, 3 * 16 * 40 * 4, 64 << 20):  # tiles of 16 rows, of some more, of all
        monkeypatch.setattr("wanda_ext.ops.register.BACKWARD_BYTES", limit)
        x, bias = (leaf.clone().requires_grad_() for leaf in leaves)
        ops.linear_bitmap(x, *packed, 70, bias, *rest).backward(grad_y)
        torch.testing.assert_close(x.grad, dense_x.grad, atol=0.05, rtol=0.02)
        torch.testing.assert_close(bias.grad, dense_bias.grad)
        if dtype == torch.float32:
            torch.testing.assert_close(x.grad, dense_x.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_stream_has_the_gradients_of_its_dense_twin(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = generator("stream grad")
    weight = bitmap_of_32(70, 40, dtype, "normal", g)
    packed = ops.pack_stream(weight, int(weight.count_nonzero()))
    grad_y = torch.randn(2, 3, 70, generator=g).to(dtype)
    leaves = [torch.randn(2, 3, 40, generator=g).to(dtype), torch.randn(70, generator=g).to(dtype)]
    dense_x, dense_bias = (leaf.clone().requires_grad_() for leaf in leaves)
    torch.nn.functional.linear(dense_x, weight, dense_bias).backward(grad_y)
    for limit in (1, 64 << 20):  # 16 rows at a time, all of them
        monkeypatch.setattr("wanda_ext.ops.register.BACKWARD_BYTES", limit)
        x, bias = (leaf.clone().requires_grad_() for leaf in leaves)
        ops.linear_stream(x, *packed, bias).backward(grad_y)
        torch.testing.assert_close(x.grad, dense_x.grad, atol=0.05, rtol=0.02)
        torch.testing.assert_close(bias.grad, dense_bias.grad)


def test_linear_passes_gradcheck() -> None:
    """The op is linear, so wide differences are exact up to rounding."""
    g = generator("gradcheck")
    packed, meta = ops.pack_24(two_of_four(6, 16, torch.float32, "normal", g))
    x = torch.randn(3, 16, generator=g, requires_grad=True)
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(
            lambda x: ops.linear_24(x, packed, meta), x, eps=0.5, atol=1e-4, rtol=1e-4
        )


def test_compiled_gradient() -> None:
    g = generator("compiled grad")
    packed, meta = ops.pack_24(two_of_four(20, 48, torch.float32, "normal", g))
    x, compiled_x = torch.randn(2, 7, 48, generator=g).unbind()
    compiled = torch.compile(ops.linear_24, fullgraph=True, backend="aot_eager")
    for leaf, linear in (
        (x.requires_grad_(), ops.linear_24),
        (compiled_x.requires_grad_(), compiled),
    ):
        linear(leaf, packed, meta).square().sum().backward()
        y = linear(leaf.detach(), packed, meta)
        expected = 2 * y @ ops.unpack_24(packed, meta)
        torch.testing.assert_close(leaf.grad, expected)


def test_ops_in_place_work_on_parameters_and_count_as_writes() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 16))
    version = weight._version
    ops.prune_nm_(weight, None, 2, 4)
    ops.prune_rows_(weight, None, 10)
    assert ((weight == 0).sum(1) == 10).all()
    assert weight.requires_grad and weight.is_leaf and weight._version > version
    acc = torch.zeros(16, dtype=torch.float64)
    ops.input_sumsq_(acc, weight * 2)
    assert not acc.requires_grad
    x, factor = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
    y = (x * factor).sum()
    ops.prune_nm_(factor, None, 2, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_supports_says_what_this_build_can_run() -> None:
    for name in ops.OPS:
        assert ops.supports(name, "cpu")
        assert ops.supports(name, torch.device("meta"))
        assert not ops.supports(name, "xpu")
