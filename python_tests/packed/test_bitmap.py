"""SparseLinearBitmap: packs, computes, casts, saves, and gives the dense module back."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from models_24 import logits, prune_to, wide_model
from op_cases import bits
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from wanda_ext.checkpoint.save import swap_linears
from wanda_ext.packed.bitmap import SURPLUS, SparseLinearBitmap

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [nn.Linear, Conv1D, FalconLinear]
BOTH = [0, 0.5]  # without a surplus, and with one


def dense(
    sparsity: str | float = 0.5,
    kind: type[nn.Module] = nn.Linear,
    n: int = 47,
    k: int = 250,
    **more,
) -> nn.Module:
    """47 x 250 fills neither its tiles nor its records; sparsity 0: 16:32, the last columns cut."""
    torch.manual_seed(1)
    module = kind(n, k) if kind is Conv1D else kind(k, n, **more)
    if module.bias is not None:
        nn.init.normal_(module.bias)
    if sparsity:
        prune_to(module, sparsity)
        return module
    wide = nn.Linear(k + -k % 32, n)
    prune_to(wide, "16:32")
    weight = wide.weight.data[:, :k]
    module.weight.data = weight.T.contiguous() if kind is Conv1D else weight.contiguous()
    return module


def packed(*args, **more) -> SparseLinearBitmap:
    return SparseLinearBitmap.from_dense(dense(*args, **more))


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


# --- The dense module, and back -------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", BOTH)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(250,), (1, 250), (2, 3, 250), (0, 250)])
def test_computes_what_the_dense_module_computes(kind, sparsity, shape):
    module = dense(sparsity, kind)
    x = torch.randn(shape)
    torch.testing.assert_close(SparseLinearBitmap.from_dense(module)(x), module(x))


@pytest.mark.parametrize("sparsity", BOTH)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_computes_in_every_dtype(dtype, bias, sparsity):
    module = dense(sparsity, bias=bias).to(dtype)
    x = torch.randn(5, 250, dtype=dtype)
    y = SparseLinearBitmap.from_dense(module)(x)
    assert y.dtype == dtype
    expected = module.double()(x.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y, expected.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sparsity", BOTH)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gives_the_same_dense_module_back(kind, dtype, sparsity):
    module = dense(sparsity, kind).to(dtype)
    restored = SparseLinearBitmap.from_dense(module).to_dense()
    assert type(restored) is kind
    assert torch.equal(bits(restored.weight), bits(module.weight + 0.0))
    assert restored.bias is module.bias
    assert restored.weight.requires_grad and restored.weight.is_contiguous()


@pytest.mark.parametrize(("n", "k"), [(37, 200), (16, 128), (30, 250), (100, 1000), (1000, 120)])
def test_odd_shapes(n, k):
    module = dense(n=n, k=k)
    holds = SparseLinearBitmap.from_dense(module)
    assert torch.equal(holds.dense_weight(), module.weight)
    x = torch.randn(3, k)
    torch.testing.assert_close(holds(x), module(x))


def test_without_bias_in_eval_mode_and_frozen():
    module = dense(bias=False).eval().requires_grad_(False)
    holds = SparseLinearBitmap.from_dense(module)
    assert holds.bias is None and not holds.training
    assert not holds.to_dense().training and not holds.to_dense().weight.requires_grad
    assert sorted(holds.state_dict()) == ["mask", "shape", *sorted(SURPLUS), "weight"]
    assert sorted(packed(0, bias=False).state_dict()) == ["mask", "shape", "weight"]


@pytest.mark.parametrize(("sparsity", "share"), [("16:32", 0.57), ("4:8", 0.57), (0.5, 0.64)])
def test_shapes_and_bytes(sparsity, share):
    holds = packed(sparsity, n=512, k=1024, bias=False, dtype=torch.bfloat16)
    assert holds.weight.shape == (32, 8, 1024) and not holds.weight.requires_grad
    assert holds.mask.shape == (32, 8, 64) and holds.mask.dtype == torch.int32
    assert holds.shape.tolist() == [512, 1024] and holds.shape.dtype == torch.int64
    options = holds.options(holds.tensors())
    assert bool(options) == (sparsity == 0.5)
    assert bytes_of(holds) == SparseLinearBitmap.nbytes_of(512, 1024, 2, **options)
    assert bytes_of(holds) <= share * 2 * 512 * 1024
    zeros = int((holds.dense_weight() == 0).sum())
    assert zeros == 512 * 1024 // 2


def test_a_new_module_is_zero_and_names_itself():
    for surplus in (0, 5):
        new = SparseLinearBitmap(40, 20, surplus=surplus)
        assert not new(torch.randn(3, 40)).any() and not new.dense_weight().any()
        told = f"in_features=40, out_features=20, bias=True, surplus={surplus}"
        assert repr(new) == f"SparseLinearBitmap({told})"
    assert SparseLinearBitmap(40, 20).problem() == ""


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.Linear(256, 256), r"not pruned: 0\.0% of its first 64 rows is zero"),
        (lambda: dense(0.09, n=40), r"not pruned: 8\.8% of its first 40 rows is zero"),
        (
            lambda: dense(0.2, n=96, k=256, dtype=torch.half),
            r"a bitmap would take 11\d% of its bytes",
        ),
        (lambda: dense(n=8, k=64), r"a bitmap would take 2\d\d% of its bytes"),
        (lambda: nn.Linear(32, 8, dtype=torch.float64), "float64, not float32"),
        (lambda: nn.Linear(32, 8, device="meta"), "not in memory"),
        (lambda: nn.Embedding(16, 16), r"expected an nn\.Linear or a Conv1D, got Embedding"),
    ],
)
def test_refuses_what_cannot_be_packed(module, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SparseLinearBitmap.from_dense(module())


def test_columns_over_32767_compute():
    module = dense(n=16, k=40000, bias=False)
    holds = SparseLinearBitmap.from_dense(module)
    assert (holds.surplus_columns < 0).any()
    assert torch.equal(holds.dense_weight(), module.weight)
    x = torch.randn(2, 40000)
    torch.testing.assert_close(holds(x), module(x), rtol=1e-4, atol=1e-4)


# --- As a module ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.type("torch.HalfTensor")],
)
def test_casts_leave_mask_and_lists_alone(cast):
    holds = packed()
    before = copy.deepcopy(dict(holds.named_buffers()))
    expected = holds.dense_weight()
    cast(holds)
    assert list(before) == ["mask", "shape", "surplus_rows", "surplus_columns"]
    for name, buffer in holds.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name]), name
    dtype = holds.weight.dtype
    assert dtype != torch.float32 and holds.surplus_values.dtype == holds.bias.dtype == dtype
    assert torch.equal(holds.dense_weight(), expected.to(dtype))
    assert holds(torch.randn(2, 250, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("sparsity", BOTH)
def test_gradients_reach_input_and_bias(sparsity):
    module = dense(sparsity)
    holds = SparseLinearBitmap.from_dense(copy.deepcopy(module))
    x = torch.randn(5, 250, requires_grad=True)
    expected = torch.autograd.grad(module(x).square().sum(), [x, module.bias])
    gradients = torch.autograd.grad(holds(x).square().sum(), [x, holds.bias])
    torch.testing.assert_close(gradients, expected)
    assert [name for name, p in holds.named_parameters() if p.requires_grad] == ["bias"]


@pytest.mark.parametrize("sparsity", BOTH)
def test_loads_by_assignment_from_the_meta_device(sparsity):
    holds = packed(sparsity)
    empty = SparseLinearBitmap.shaped_like(dense(sparsity), **holds.options(holds.tensors()))
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(holds.state_dict(), assign=True)
    assert torch.equal(empty.dense_weight(), holds.dense_weight())
    assert not any(tensor.is_meta for tensor in empty.state_dict().values())


def test_another_surplus_does_not_load():
    holds = packed()
    count = len(holds.surplus_values)
    for options, message in (
        ({}, 'Unexpected key(s) in state_dict: "surplus_values"'),
        ({"surplus": count + 1}, f"torch.Size([{count}]) from checkpoint"),
    ):
        empty = SparseLinearBitmap.shaped_like(dense(), **options)
        with pytest.raises(RuntimeError, match=re.escape(message)):
            empty.load_state_dict(holds.state_dict(), assign=True)


@pytest.mark.parametrize("sparsity", BOTH)
def test_compiles_without_a_graph_break(sparsity):
    holds = packed(sparsity)
    compiled = torch.compile(holds, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 250, requires_grad=True)
    y = compiled(x)
    assert torch.equal(y, holds(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, holds.dense_weight().sum(0).expand(3, -1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("sparsity", BOTH)
def test_copies_are_whole_and_apart(sparsity, copied):
    holds = packed(sparsity, Conv1D)
    twin = copied(holds)
    x = torch.randn(3, 250)
    expected = holds(x)
    assert torch.equal(twin(x), expected) and type(twin.to_dense()) is Conv1D
    twin.weight.data.zero_()
    assert torch.equal(holds(x), expected)


def test_offloaded_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = wide_model("50%", dtype=torch.float32)
    swap_linears(model)
    expected = logits(model)
    accelerate.cpu_offload(model, "cpu")
    up = model.model.layers[0].mlp.up_proj
    assert up.weight.is_meta and up.surplus_values.is_meta
    assert torch.equal(logits(model), expected)
