"""Product24: metadata in the order of its device, moves, compilation, and GPUs where there are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fake_gpu import cache, pose_as_gpu, row
from models_24 import prune_24
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from wanda_ext import ops
from wanda_ext.packed import linear_24 as product
from wanda_ext.packed.linear_24 import SparseLinear24

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_a_gpu(test):
    return pytest.mark.gpu(NO_GPU(test))


def dense(k: int = 48, n: int = 20) -> nn.Linear:
    torch.manual_seed(1)
    module = nn.Linear(k, n)
    prune_24(module)
    return module


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
        patch.setattr(product, "preferred_order", lambda device: order)
        model.cpu()
        assert model[0].order == order
        model.load_state_dict(before)
        assert model[0].order == order
    model.cpu()
    assert model[0].order == 0
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("order", [80, 90])
@pytest.mark.parametrize("shape", [(20, 48), (64, 128), (1, 16)])  # with padding and without
def test_metadata_is_read_as_what_it_is_whoever_puts_it_there(shape, order):
    module = dense(n=shape[0], k=shape[1])
    packed = SparseLinear24.from_dense(module)
    canonical, x = packed.meta, torch.randn(3, shape[1])
    packed.reorder_(order)
    device_order = packed.meta
    packed._buffers["meta"] = canonical  # as accelerate does
    assert packed.order == 0 and torch.equal(packed.dense_weight(), module.weight)
    packed._buffers["meta"] = device_order.clone()
    assert packed.order == order and torch.equal(packed.dense_weight(), module.weight)
    torch.testing.assert_close(packed(x), module(x))


def test_the_first_one_on_a_gpu_installs_its_rules(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake = pose_as_gpu(monkeypatch)
    cache(row(1, n=24, k=48))
    SparseLinear24.from_dense(dense(n=24).bfloat16())
    assert [rule[3:6] for rule in fake.rules] == [(24, 48, 1)]


@pytest.mark.parametrize(("capability", "order"), [((9, 0), 90), ((8, 6), 80), ((7, 5), 0)])
def test_order_by_capability(capability, order, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert product.preferred_order(torch.device("cuda", 0)) == order
    assert product.preferred_order(torch.device("cpu")) == 0


@pytest.mark.parametrize("order", [0, 90])
@pytest.mark.parametrize("gradients", [True, False])
def test_compiles_as_one_graph_for_any_m(gradients, order):
    packed = SparseLinear24.from_dense(dense())
    packed.reorder_(order)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend=counter)
    for m in (3, 8, 65):
        x = torch.randn(m, 48, requires_grad=gradients)
        y = compiled(x)
        assert torch.equal(y, packed(x))
        if gradients:
            expected = torch.autograd.grad(packed(x).sum(), x)
            assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected[0])
    assert counter.frame_count == 1


def test_a_device_whose_kernels_this_build_lacks_is_reordered_through_the_cpu(monkeypatch):
    packed = SparseLinear24.from_dense(dense())
    expected = packed.meta_in(90)
    moved = []
    monkeypatch.setattr(ops, "supports", lambda op, device: moved.append(op))
    assert torch.equal(packed.meta_in(90), expected) and moved == ["order_meta_24"]


# --- On a GPU -------------------------------------------------------------------------------------


def pair(device: str = "cuda") -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A dense module, the same packed, and an x for both."""
    module = dense(n=72, k=144).bfloat16().to(device)
    x = torch.randn(9, 144, device=device, dtype=torch.bfloat16)
    return module, SparseLinear24.from_dense(module), x


@on_a_gpu
def test_to_a_gpu_and_back():
    packed = SparseLinear24.from_dense(dense())
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.cuda()
    assert packed.order == product.preferred_order(packed.weight.device) != 0
    assert torch.equal(packed.state_dict()["meta"].cpu(), before["meta"])
    packed.cpu()
    assert all(torch.equal(t, before[name]) for name, t in packed.state_dict().items())


@on_a_gpu
@torch.no_grad()
def test_a_graph_replays_it_and_nothing_waits():
    module, packed, x = pair()
    packed(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed(x)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, module(x))


@on_a_gpu
def test_placed_on_a_gpu_without_a_move():
    module, packed, x = pair()
    packed.cpu()
    packed._buffers["meta"] = packed.meta.cuda()  # as accelerate does
    for name in ("weight", "bias"):
        packed._parameters[name] = nn.Parameter(getattr(packed, name).cuda(), False)
    torch.testing.assert_close(packed(x), module(x))
    assert packed.order != 0


@on_a_gpu
def test_fp32_on_a_gpu_is_a_clear_error():
    packed = SparseLinear24.from_dense(dense()).cuda()
    with pytest.raises(RuntimeError, match=r"no kernel for .*float32.*bfloat16 or float16"):
        packed(torch.randn(3, 48, device="cuda"))


@on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_device_runs_its_own():
    module, packed, x = pair("cuda:1")
    with torch.cuda.device(0):
        y = packed(x)
    assert y.device == x.device
    torch.testing.assert_close(y, module(x))
    torch.testing.assert_close(packed.to("cuda:0")(x.to("cuda:0")), y.to("cuda:0"))
