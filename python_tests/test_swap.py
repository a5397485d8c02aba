"""swap="auto", True and False: what is swapped by the measured times, and what the report says."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import GPU, pose_as_gpu, row
from models import tiny_model, token_ids
from models_24 import model_24

from wanda_ext import checkpoint, dispatch
from wanda_ext.checkpoint import PACKED, save_pretrained, swap_linears
from wanda_ext.dispatch_table import Row
from wanda_ext.prune import prune_model
from wanda_ext.report import PruneReport

SHAPES = {(64, 64): 2, (32, 64): 2, (96, 64): 2, (64, 96): 1}  # of tiny_model's 7 linears a block


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def gpu(monkeypatch):
    """The CPU poses as a GPU on which nothing is measured; half precision runs there."""
    return pose_as_gpu(monkeypatch)


def measured(n: int, k: int, packed: float, dense: float, m: int = 1) -> Row:
    return row(m, n=n, k=k, packed_us=packed, dense_us=dense)


def pruned(model=None, *, dtype=torch.bfloat16, **options) -> tuple[torch.nn.Module, PruneReport]:
    model = tiny_model(dtype=dtype) if model is None else model
    report = prune_model(model, token_ids(), "2:4", progress=False, tokens=(1,), **options)
    return model, report


# --- auto -----------------------------------------------------------------------------------------


def test_auto_leaves_all_dense_where_nothing_is_measured(gpu):
    model, report = pruned()
    assert report.swap == (
        f"swapped nothing: not measured on {GPU.name} in bfloat16: run "
        "wanda_ext.bench.tune(model), then wanda_ext.swap_linears(model, tokens=(1,))"
    )
    assert not checkpoint.packed_linears(model)
    assert {line.packed_us for line in report.linears} == {None}


def test_auto_decides_for_each_linear(gpu):
    dispatch.add(
        [
            measured(64, 64, 9.0, 10.0),  # q, o
            measured(32, 64, 9.9, 10.0),  # k, v
            measured(96, 64, 5.0, 10.0),  # gate, up
        ]
    )
    model, report = pruned()
    names = {name.rpartition(".")[2] for name in checkpoint.packed_linears(model)}
    assert names == {"q_proj", "o_proj", "gate_proj", "up_proj"}
    assert report.swap.splitlines() == str(report).splitlines()[:1]
    parts = report.swap.split("; ")
    assert parts[0] == "swapped 12 of 21 2:4 linears for packed ones"
    assert parts[1] == (
        "model.layers.0.self_attn.k_proj and 5 more: packed 9.9 us, dense 10.0 us at tokens=(1,)"
    )
    assert parts[2].startswith("model.layers.0.mlp.down_proj and 2 more: not measured on Test GPU")
    times = {
        line.name.rpartition(".")[2]: (line.packed_us, line.dense_us) for line in report.linears
    }
    assert times["q_proj"] == (9.0, 10.0)
    assert times["v_proj"] == (9.9, 10.0)  # measured, though it stays dense
    assert times["down_proj"] == (None, None)


def test_auto_counts_all_tokens(gpu):
    rows = [measured(n, k, 5.0, 10.0) for n, k in SHAPES]
    dispatch.add([*rows, *(measured(n, k, 1000.0, 900.0, m=2048) for n, k in SHAPES)])
    model = tiny_model(dtype=torch.bfloat16)
    report = prune_model(model, token_ids(), "2:4", progress=False, tokens=(1, 2048))
    assert report.swap.endswith("packed 1005.0 us, dense 910.0 us at tokens=(1, 2048)")
    assert (report.linears[0].packed_us, report.linears[0].dense_us) == (1005.0, 910.0)


def test_times_are_of_24_linears_and_survive_the_file(gpu, tmp_path):
    dispatch.add([measured(64, 64, 9.0, 10.0)])
    model = tiny_model(dtype=torch.bfloat16)
    sparsity = {"*.q_proj": "2:4", "*.o_proj": 0.5}
    report = prune_model(model, token_ids(), sparsity, progress=False, tokens=(1,), swap=False)
    known = {line.name.rpartition(".")[2] for line in report.linears if line.packed_us}
    assert known == {"q_proj"} and report.swap == "swapped nothing: swap=False"
    report.save(tmp_path / "r.json")
    assert PruneReport.load(tmp_path / "r.json") == report


def test_auto_never_swaps_on_the_cpu():
    model, report = pruned()
    assert report.swap == "swapped nothing: packed linears save memory on the CPU, not time"
    assert not checkpoint.packed_linears(model)


# --- True, and without a prune --------------------------------------------------------------------


def test_true_swaps_whatever_the_times_say(gpu):
    dispatch.add([measured(64, 64, 99.0, 10.0)])
    model, report = pruned(swap=True)
    assert report.swap == "swapped 21 of 21 2:4 linears for packed ones"
    assert len(checkpoint.packed_linears(model)) == 21


def test_true_is_refused_before_any_work_where_no_kernel_runs(gpu):
    model = tiny_model()
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(ValueError, match=r"q_proj: float32 has no CUDA kernel.*pass swap=False"):
        pruned(model, swap=True)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_what_no_kernel_runs_stays_dense_and_says_so(monkeypatch, tmp_path):
    pose_as_gpu(monkeypatch)
    model = model_24("llama")
    with pytest.raises(ValueError, match="float32 has no CUDA kernel; cast the model to bfloat16"):
        swap_linears(model)
    assert not checkpoint.packed_linears(model)
    save_pretrained(model, tmp_path / "saved", packed=True)  # files can be packed all the same
    assert not checkpoint.packed_linears(model)
    assert set(swap_linears(model.bfloat16(), "model.layers.0.mlp.up_proj").values()) == {PACKED}


def test_with_tokens_only_what_is_faster_is_swapped(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pose_as_gpu(monkeypatch)
    model = model_24("llama", torch.bfloat16)
    unmeasured = swap_linears(model, tokens=(1,))
    assert all("not measured" in why for name, why in unmeasured.items() if name != "lm_head")
    dispatch.add([row(1, n=128, k=64), row(1, n=64, k=64, packed_us=15.0)])
    outcome = swap_linears(model, tokens=[1])
    packed = [name for name, what in outcome.items() if what == PACKED]
    layers = ("model.layers.0", "model.layers.1")
    assert packed == [f"{layer}.mlp.{name}_proj" for layer in layers for name in ("gate", "up")]
    slower = "packed 15.0 us, dense 15.0 us at tokens=(1,)"
    assert outcome["model.layers.1.self_attn.q_proj"] == slower
    assert "not measured" in outcome["model.layers.1.mlp.down_proj"]
    with pytest.raises(ValueError, match="tokens must be row counts"):
        swap_linears(model, tokens=[])
