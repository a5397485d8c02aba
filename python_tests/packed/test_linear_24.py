"""SparseLinear24: packs, computes, moves, saves, and gives the dense module back."""

from __future__ import annotations

import copy

import pytest
import torch
from models_24 import logits, model_24, prune_24
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from wanda_ext.checkpoint.save import swap_linears, unswap_linears
from wanda_ext.packed.linear_24 import SparseLinear24

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


def test_loads_by_assignment_from_the_meta_device():
    packed = SparseLinear24.from_dense(dense())
    empty = SparseLinear24.shaped_like(dense())
    assert empty.weight.is_meta and empty.meta.is_meta
    empty.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(empty.dense_weight(), packed.dense_weight())


# --- accelerate -----------------------------------------------------------------------------------


def test_under_the_hooks_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = model_24("llama")
    expected = logits(model)
    devices = {"model": "cpu", "lm_head": "cpu", "model.layers.0.mlp.up_proj": "cpu"}
    swap_linears(model)
    accelerate.dispatch_model(model, devices, force_hooks=True)  # packed ones get hooks
    packed = model.model.layers[0].mlp.up_proj
    assert hasattr(packed, "_hf_hook")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    unswap_linears(model)  # and hand them on
    assert model.model.layers[0].mlp.up_proj._hf_hook is packed._hf_hook
    assert torch.equal(logits(model), expected)
    swap_linears(model, fuse=True)
    assert model.model.layers[0].mlp.up_proj._hf_hook is packed._hf_hook
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_offloaded_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = model_24("llama")
    expected = logits(model)
    swap_linears(model)
    accelerate.cpu_offload(model, "cpu")
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
