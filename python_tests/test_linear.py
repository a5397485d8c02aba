"""SparseLinear24: packs, computes, moves, saves, and gives the dense module back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models_24 import prune_24
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from wanda_ext import linear
from wanda_ext.linear import SparseLinear24

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dense(kind: type[nn.Module] = nn.Linear, k: int = 48, n: int = 20, **options) -> nn.Module:
    torch.manual_seed(1)
    module = kind(n, k) if kind is Conv1D else kind(k, n, **options)
    prune_24(module)
    return module


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, FalconLinear])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (0, 48)])
def test_computes_what_the_dense_module_computes(kind, shape):
    module = dense(kind)
    x = torch.randn(shape)
    torch.testing.assert_close(SparseLinear24.from_dense(module)(x), module(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, FalconLinear])
def test_gives_the_same_dense_module_back(kind, dtype):
    module = dense(kind).to(dtype)
    restored = SparseLinear24.from_dense(module).to_dense()
    assert type(restored) is kind
    assert torch.equal(restored.weight, module.weight)
    assert restored.bias is module.bias
    assert restored.weight.requires_grad and restored.weight.is_contiguous()


def test_without_bias_and_in_eval_mode():
    module = dense(bias=False).eval()
    packed = SparseLinear24.from_dense(module)
    assert packed.bias is None and not packed.training
    assert packed.to_dense().bias is None and not packed.to_dense().training
    assert sorted(packed.state_dict()) == ["meta", "weight"]


def test_shapes_and_bytes():
    packed = SparseLinear24.from_dense(dense(bias=False).bfloat16())
    assert packed.weight.shape == (20, 24) and not packed.weight.requires_grad
    assert packed.meta.shape == (20, 3) and packed.meta.dtype == torch.int16
    assert packed.weight.nbytes + packed.meta.nbytes == 9 / 16 * 2 * 20 * 48


def test_a_new_module_is_zero_and_names_itself():
    packed = SparseLinear24(32, 8)
    assert not packed(torch.randn(3, 32)).any()
    assert repr(packed) == "SparseLinear24(in_features=32, out_features=8, bias=True, order=0)"


def test_refuses_a_weight_that_is_not_24_and_says_where():
    module = dense()
    module.weight.data[7, 24:28] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    with pytest.raises(ValueError, match="row 7, columns 24 to 27 hold 3 non-zeros"):
        SparseLinear24.from_dense(module)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(40, 8), "40 columns are not a multiple of 16"),
        (nn.Linear(32, 8, dtype=torch.float64), "float64, not float32"),
        (nn.Linear(32, 8, device="meta"), "not in memory"),
    ],
)
def test_refuses_what_cannot_be_packed(module, message):
    with pytest.raises(ValueError, match=message):
        SparseLinear24.from_dense(module)


def test_refuses_what_is_no_linear():
    with pytest.raises(TypeError, match=r"expected an nn\.Linear or a Conv1D, got Embedding"):
        SparseLinear24.from_dense(nn.Embedding(16, 16))


@pytest.mark.parametrize("order", [80, 90])
def test_a_device_order_never_leaves_the_module(order):
    packed = SparseLinear24.from_dense(dense())
    saved = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.reorder_(order)
    assert packed.order == order and packed.meta.shape != saved["meta"].shape
    for name, tensor in packed.state_dict().items():
        assert torch.equal(tensor, saved[name])
    assert torch.equal(packed.dense_weight(), dense().weight)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert copied.order == 0 and torch.equal(copied.meta, saved["meta"])
    packed.load_state_dict(saved)
    assert packed.order == 0 and torch.equal(packed.meta, saved["meta"])


@pytest.mark.parametrize("order", [80, 90])
def test_a_move_takes_the_order_of_the_device_and_back(order, monkeypatch):
    model = nn.Sequential(SparseLinear24.from_dense(dense()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with monkeypatch.context() as patch:  # as if "cpu" were a GPU
        patch.setattr(linear, "preferred_order", lambda device: order)
        model.cpu()
        assert model[0].order == order
        model.load_state_dict(before)
        assert model[0].order == order
    model.cpu()
    assert model[0].order == 0
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("capability", "order"), [((9, 0), 90), ((8, 6), 80), ((7, 5), 0)])
def test_order_by_capability(capability, order, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert linear.preferred_order(torch.device("cuda", 0)) == order
    assert linear.preferred_order(torch.device("cpu")) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_to_a_gpu_and_back():
    packed = SparseLinear24.from_dense(dense())
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.cuda()
    assert packed.order == linear.preferred_order(packed.weight.device)
    assert torch.equal(packed.state_dict()["meta"].cpu(), before["meta"])
    packed.cpu()
    assert all(torch.equal(t, before[name]) for name, t in packed.state_dict().items())


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.type("torch.HalfTensor")]
)
def test_casts_leave_the_metadata_alone(cast):
    packed = SparseLinear24.from_dense(dense())
    meta = packed.meta.clone()
    cast(packed)
    assert torch.equal(packed.meta, meta) and packed.meta.dtype == torch.int16
    assert packed(torch.randn(2, 48, dtype=packed.weight.dtype)).dtype == packed.weight.dtype


def test_gradients_reach_input_and_bias():
    module = dense()
    packed = SparseLinear24.from_dense(copy.deepcopy(module))
    x = torch.randn(5, 48, requires_grad=True)
    expected = torch.autograd.grad(module(x).square().sum(), [x, module.bias])
    gradients = torch.autograd.grad(packed(x).square().sum(), [x, packed.bias])
    torch.testing.assert_close(gradients, expected)


def test_compiles_without_a_graph_break():
    packed = SparseLinear24.from_dense(dense())
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 48)
    assert torch.equal(compiled(x), packed(x))


def test_loads_by_assignment_from_the_meta_device():
    packed = SparseLinear24.from_dense(dense())
    empty = SparseLinear24.shaped_like(dense())
    assert empty.weight.is_meta and empty.meta.is_meta
    empty.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(empty.dense_weight(), packed.dense_weight())
