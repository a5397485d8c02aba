"""Merged linears: the same numbers from one product, and one copy of the weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fused_24 import Attention, assert_equal_states, fused, merged, product_of
from models_24 import CONFIGS, logits, model_24
from torch._dynamo.testing import CompileCounterWithBackend

from wanda_ext.checkpoint.quantizer import packed_linears
from wanda_ext.checkpoint.save import swap_linears
from wanda_ext.packed import linear_24 as product
from wanda_ext.packed.fuse import FusedProduct

FAMILIES = list(CONFIGS)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# --- What it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_numbers_as_apart(family):
    model = model_24(family)
    twin = copy.deepcopy(model)
    outcome = swap_linears(model, fuse=True)
    assert outcome == swap_linears(twin)
    expected = {"llama": 2 * 5, "opt": 2 * 3, "gpt2": 0}
    assert len(merged(model)) == expected[family]
    assert torch.equal(logits(model), logits(twin))
    assert list(packed_linears(model)) == list(packed_linears(twin))


def test_one_product_for_all_and_nothing_left(monkeypatch):
    module, calls = fused(), []
    forward = FusedProduct.forward
    monkeypatch.setattr(FusedProduct, "forward", lambda s, x: (calls.append(x), forward(s, x))[1])
    x = torch.randn(2, 5, 64)
    module(x)
    assert len(calls) == 1 and calls[0] is x
    assert product_of(module)._held is None
    module(x)
    assert len(calls) == 2


def test_members_called_out_of_step_are_right():
    module, plain = fused(), Attention()
    x, other = torch.randn(3, 64), torch.randn(3, 64)

    def check(name: str, given: torch.Tensor) -> None:
        expected = getattr(plain, name)(given)
        torch.testing.assert_close(getattr(module, name)(given), expected)

    check("v_proj", x)
    check("v_proj", x)  # twice the same
    check("q_proj", other)  # before k_proj was called with x
    check("k_proj", x)
    x.mul_(2.0)  # changed since
    check("q_proj", x)
    check("v_proj", x.clone())  # equal, but another tensor


def test_gradients_asked_for_after_the_product_without():
    module = fused()
    x = torch.randn(3, 64, requires_grad=True)
    with torch.no_grad():
        module.q_proj(x)
    assert module.k_proj(x).requires_grad


def test_gradients_reach_input_and_bias():
    module, plain = fused(), Attention()
    x = torch.randn(5, 64, requires_grad=True)
    names = ("q_proj", "k_proj", "v_proj")
    biases = [getattr(plain, name).bias for name in names]
    expected = torch.autograd.grad(plain(x).square().sum(), [x, *biases])
    found = torch.autograd.grad(module(x).square().sum(), [x, product_of(module).bias])
    torch.testing.assert_close(found, (expected[0], torch.cat(expected[1:])))


def test_columns_may_be_changed_in_place():
    module, plain = fused(), Attention()
    x = torch.randn(3, 64, requires_grad=True)
    module.q_proj(x).clamp_(min=-0.1)  # as models that clip do
    torch.testing.assert_close(module.k_proj(x), plain.k_proj(x))


def test_inference_mode():
    module, plain = fused(), Attention()
    with torch.inference_mode():
        x = torch.randn(3, 64)
        torch.testing.assert_close(module(x), plain(x))


@pytest.mark.parametrize("gradients", [True, False])
def test_compiles_as_one_graph_for_any_m(gradients):
    module, counter = fused(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for m in (3, 7, 40):
        x = torch.randn(2, m, 64, requires_grad=gradients)
        y = compiled(x)
        assert torch.equal(y, module(x))
        if gradients:
            expected = torch.autograd.grad(module(x).sum(), x)
            torch.testing.assert_close(torch.autograd.grad(y.sum(), x), expected)
        assert product_of(module)._held is None
    assert counter.frame_count == 1
    calls = [node for node in counter.graphs[0].graph.nodes if "linear_24" in str(node.target)]
    assert len(calls) == 1


# --- One copy, that moves as one ------------------------------------------------------------------


def test_one_copy_of_the_weights():
    dense, apart, together = Attention(bias=False), Attention(bias=False), fused(bias=False)
    swap_linears(apart)
    count = sum(p.numel() for p in dense.parameters())
    for module in (apart, together):
        assert sum(p.numel() for p in module.parameters()) == count // 2
        assert sum(b.numel() for b in module.buffers()) == count // 16
    storage = product_of(together).weight.untyped_storage().data_ptr()
    members = together.q_proj, together.k_proj, together.v_proj
    assert {m.weight.untyped_storage().data_ptr() for m in members} == {storage}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_among_themselves_alone(copied):
    module = fused()
    x = torch.randn(3, 64, requires_grad=True) * 2
    module.q_proj(x)  # its columns are waiting, and cannot be copied
    twin = copied(module)
    assert product_of(twin)._held is None
    assert twin.k_proj.product is product_of(twin) is not product_of(module)
    assert torch.equal(twin(x), module(x))


def test_casts_and_moves():
    module, plain = fused(), Attention().bfloat16()
    module.to(torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(module.q_proj.weight, fused().q_proj.weight.bfloat16())
    torch.testing.assert_close(module(x), plain(x))


@pytest.mark.parametrize("order", [80, 90])
def test_a_device_order_never_leaves_the_product(order, monkeypatch):
    module = fused()
    before = copy.deepcopy(module.state_dict())
    with monkeypatch.context() as patch:  # as if "cpu" were a GPU
        patch.setattr(product, "preferred_order", lambda device: order)
        module.cpu()
        assert product_of(module).order == order
        assert_equal_states(module.state_dict(), before)
        module.load_state_dict(before)
        assert product_of(module).order == order
        alone = module.k_proj.alone()
        assert alone.order == order
    assert torch.equal(alone.dense_weight(), Attention().k_proj.weight)
    assert torch.equal(module.v_proj.dense_weight(), Attention().v_proj.weight)
    torch.testing.assert_close(module(torch.eye(64)), Attention()(torch.eye(64)))


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
def test_a_graph_replays_one_product():
    module, plain = fused(dtype=torch.bfloat16).cuda(), Attention(dtype=torch.bfloat16).cuda()
    x = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, plain(x))
    assert product_of(module)._held is None


@pytest.mark.gpu
@needs_gpu
def test_to_a_gpu_and_back():
    module = fused(dtype=torch.bfloat16)
    before = copy.deepcopy(module.state_dict())
    module.cuda()
    with torch.no_grad():
        y = module(torch.eye(64, device="cuda", dtype=torch.bfloat16))
    torch.testing.assert_close(y.cpu(), module.cpu()(torch.eye(64, dtype=torch.bfloat16)))
    assert_equal_states(module.state_dict(), before)
