"""swap="auto", True and False: what is swapped by the measured times, and what the report says."""

from __future__ import annotations

import copy

import pytest
import torch
from fake_gpu import GPU, pose_as_gpu, row
from models_24 import MIXED, PATTERNS, WIDE, dense_wide, digests, logits, model_24, wide_model
from tiny_models import tiny_model, token_ids

from wanda_ext.checkpoint import save as checkpoint
from wanda_ext.checkpoint.save import PACKED, save_pretrained, swap_linears, unswap_linears
from wanda_ext.packed import dispatch
from wanda_ext.packed.dispatch_table import Row
from wanda_ext.packed.fuse import FusedLinear24
from wanda_ext.prune.prune import prune_model
from wanda_ext.prune.verify import verify
from wanda_ext.report.report import PruneReport

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
    assert parts[0] == "swapped 12 of 21 linears for packed ones"
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
    assert report.swap == "swapped 21 of 21 linears for packed ones"
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


# --- Other patterns than 2:4 ----------------------------------------------------------------------


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_pruned_model_is_swapped_and_unswapped(pattern, family):
    model = wide_model(pattern, family, torch.float32)
    expected, before = logits(model), copy.deepcopy(model.state_dict())
    outcome = swap_linears(model)
    formats = {name: m.FORMAT for name, m in checkpoint.packed_linears(model).items()}
    assert {name for name, what in outcome.items() if what == PACKED} == formats.keys()
    assert outcome.keys() - formats.keys() == {"lm_head"}
    for name, kind in formats.items():
        assert kind == ("2:4" if pattern == "mixed" and "mlp" in name else "bitmap"), name
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert unswap_linears(model) == list(formats)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not checkpoint.attached(model)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_true_swaps_patterns_of_one_half_on_the_cpu(pattern):
    options = {"sparsity": PATTERNS[pattern], "progress": False}
    masked, swapped = dense_wide(), dense_wide()
    calib = token_ids(4, 16) % 96
    prune_model(masked, calib, swap=False, **options)
    report = prune_model(swapped, calib, swap=True, **options)
    assert report.swap == "swapped 7 of 7 linears for packed ones"
    assert len(checkpoint.packed_linears(swapped)) == 7 and not checkpoint.packed_linears(masked)
    expected = logits(masked)
    torch.testing.assert_close(logits(swapped), expected, rtol=1e-4, atol=1e-4)
    verify(swapped, report).raise_if_bad()
    unswap_linears(swapped)
    assert torch.equal(logits(swapped), expected)


def test_auto_leaves_bitmaps_dense_where_they_are_not_measured(gpu):
    model = dense_wide(dtype=torch.bfloat16)
    for n, k in ((512, 256), (256, 512)):
        dispatch.add([measured(n, k, 5.0, 10.0)])
    report = prune_model(model, token_ids() % 96, MIXED, progress=False, tokens=(1,))
    packed = checkpoint.packed_linears(model)
    assert {name.rpartition(".")[2] for name in packed} == {"gate_proj", "up_proj", "down_proj"}
    assert report.swap == (
        "swapped 3 of 7 linears for packed ones; model.layers.0.self_attn.q_proj and 3 more: "
        f"not 2:4; linear_bitmap was not measured on {GPU.name}; swap_linears(model) swaps it in"
    )
    assert set(swap_linears(model, list(packed)).values()) == {PACKED}
    assert swap_linears(model)["model.layers.0.self_attn.q_proj"] == PACKED


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (0.25, "at least 30% is pruned can be packed, and .*q_proj becomes 25%"),
        ("3:4", "q_proj becomes 3:4"),
    ],
)
def test_true_is_refused_before_any_work_where_too_much_is_kept(sparsity, message):
    model = dense_wide()
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(ValueError, match=message):
        prune_model(model, token_ids() % 96, sparsity, swap=True, progress=False)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.parametrize(
    ("sparsity", "merged"),
    [
        ({"*attn*": "2:4", "*mlp*": 0.5}, {"q_proj", "k_proj", "v_proj"}),
        ({"*attn*": "16:32", "*mlp*": "2:4"}, {"gate_proj", "up_proj"}),
        ({"*k_proj": "8:16", "*mlp*": 0.5, "*": "2:4"}, set()),
    ],
)
def test_only_24_is_merged_and_saved_as_without(sparsity, merged, tmp_path):
    model = dense_wide()
    prune_model(model, token_ids(4, 16) % 96, sparsity, swap=False, progress=False)
    expected = logits(model)
    save_pretrained(model, tmp_path / "apart", packed=True)
    swap_linears(model, fuse=True)
    packed = checkpoint.packed_linears(model)
    fused = {n.rpartition(".")[2] for n, m in packed.items() if isinstance(m, FusedLinear24)}
    assert len(packed) == 7 and fused == merged
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    assert digests(tmp_path / "merged") == digests(tmp_path / "apart")
