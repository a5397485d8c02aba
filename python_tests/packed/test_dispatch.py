"""Rules from the table: which kernel runs for which m, of made-up kernels and of this build's."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from fake_gpu import CPU, GPU, SKINNY, WIDE, cache, device_named, pose_as_gpu, row

from wanda_ext.packed import dispatch
from wanda_ext.packed.dispatch_table import BUCKETS, Gpu, bucket_of

BF16 = torch.bfloat16
SHAPE = ("bfloat16", 4096, 4096)


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def fake(monkeypatch):
    return pose_as_gpu(monkeypatch)


@pytest.fixture(params=["made up", "built"])
def two(request, monkeypatch):
    """Two kernels that can run SHAPE: made-up ones, and this build's."""
    if request.param == "made up":
        pose_as_gpu(monkeypatch)
        return SKINNY, WIDE
    able = [
        kernel for kernel in dispatch.kernels() if not dispatch.admits(GPU, *SHAPE, 1, kernel, 1)
    ]
    if len(able) < 2:
        pytest.skip("built without CUDA")
    monkeypatch.setattr(dispatch, "_tables", {})
    request.addfinalizer(lambda: dispatch._C.set_linear_24_rules([]))
    return able[0], able[-1]


# --- Rules ----------------------------------------------------------------------------------------


def test_a_rule_serves_its_bucket_and_nothing_else(two):
    default = {m: dispatch.choose(GPU, *SHAPE, m) for m in range(1, 600)}
    other = {m: two[0] if default[m][0] == two[1] else two[1] for m in default}  # not the default
    dispatch.add([row(8, other[8]), row(256, other[256])])
    for m in default:
        bucket = bucket_of(m)
        expected = other[bucket] if bucket in (8, 256) else default[m][0]
        assert dispatch.choose(GPU, *SHAPE, m)[0] == expected, m


def test_the_last_bucket_serves_all_beyond(two):
    default = dispatch.choose(GPU, *SHAPE, 10**6)[0]
    other = two[0] if default == two[1] else two[1]
    dispatch.add([row(8192, other)])
    assert dispatch.choose(GPU, *SHAPE, 10**6)[0] == default
    dispatch.add([row(16384, other)])
    assert dispatch.choose(GPU, *SHAPE, 10**6)[0] == other
    assert dispatch.choose(GPU, *SHAPE, 8193)[0] == other


def test_rules_are_of_one_gpu_dtype_and_shape(two):
    before = dispatch.choose(GPU, *SHAPE, 1)[0]
    other = two[0] if before == two[1] else two[1]
    dispatch.add([row(1, other)])
    assert dispatch.choose(GPU, *SHAPE, 1)[0] == other
    for changed in (
        (Gpu(GPU.name, 90, 114), *SHAPE),
        (GPU, "float16", 4096, 4096),
        (GPU, "bfloat16", 8192, 4096),
        (GPU, "bfloat16", 4096, 8192),
    ):
        assert dispatch.choose(*changed, 1)[0] == before


def test_forced_runs_one_kernel_inside_and_restores_the_rules(two):
    dispatch.add([row(64, two[0])])  # with gaps below
    everywhere = {m: dispatch.choose(GPU, *SHAPE, m) for m in BUCKETS}
    for kernel in two:
        with dispatch.forced(GPU, *SHAPE, kernel, 1):
            assert {dispatch.choose(GPU, *SHAPE, m) for m in BUCKETS} == {(kernel, 1)}
    with pytest.raises(KeyError), dispatch.forced(GPU, *SHAPE, two[1], 1):
        raise KeyError
    assert {m: dispatch.choose(GPU, *SHAPE, m) for m in BUCKETS} == everywhere


def test_forced_inside_forced(two):
    with dispatch.forced(GPU, *SHAPE, two[0], 1):
        with dispatch.forced(GPU, *SHAPE, two[1], 1):
            assert dispatch.choose(GPU, *SHAPE, 7) == (two[1], 1)
        dispatch.add([row(64, two[1])])  # what is learnt meanwhile rules afterwards
        assert dispatch.choose(GPU, *SHAPE, 7) == (two[0], 1)
    assert dispatch.choose(GPU, *SHAPE, 64) == (two[1], 1)


def work_on_another_shape(kernel):
    """All that replaces rules, for a shape that is not SHAPE."""
    dispatch.add([row(16, kernel, n=8192)])
    with dispatch.forced(GPU, "bfloat16", 8192, 4096, kernel, 1):
        dispatch.add([row(2, kernel, device="Another GPU")])


def test_no_rule_is_missing_while_others_are_installed(two, monkeypatch):
    dispatch.add([row(8, two[1]), row(256, two[0])])  # not the defaults
    before = {m: dispatch.choose(GPU, *SHAPE, m) for m in BUCKETS}
    met = []
    install = dispatch._C.set_linear_24_rules

    def watched(rules):
        install(rules)  # now another thread calls
        met.append({m: dispatch.choose(GPU, *SHAPE, m) for m in BUCKETS})

    monkeypatch.setattr(dispatch._C, "set_linear_24_rules", watched)
    work_on_another_shape(two[0])
    assert len(met) >= 4 and met == [before] * len(met)


def test_calls_of_another_thread_run_the_same_kernels(two):
    default = dispatch.choose(GPU, *SHAPE, 8)[0]
    other = two[0] if default == two[1] else two[1]
    dispatch.add([row(8, other)])
    thread = threading.Thread(target=lambda: [work_on_another_shape(two[0]) for _ in range(200)])
    thread.start()
    chosen = set()
    while thread.is_alive():
        chosen.add(dispatch.choose(GPU, *SHAPE, 8))
    assert chosen == {(other, 1)}


def test_several_gpus_keep_their_rules(two):
    small = Gpu("Small GPU", 90, 60)
    dispatch.add([row(1, two[0])])
    dispatch.add([row(1, two[1], device=small.name, sms=small.sms)])
    assert dispatch.choose(GPU, *SHAPE, 1)[0] == two[0]
    assert dispatch.choose(small, *SHAPE, 1)[0] == two[1]


def test_splits_are_part_of_a_rule(fake):
    dispatch.add([row(4, splits=8)])
    assert dispatch.choose(GPU, *SHAPE, 3) == (SKINNY, 8)


# --- A GPU in use ---------------------------------------------------------------------------------


def test_the_users_rows_are_installed_at_the_first_use(fake):
    cache(row(1, WIDE))
    dispatch.use(torch.device("meta"))
    assert fake.rules == []
    dispatch.use(CPU)  # which poses as a GPU
    assert [(r[5], r[6]) for r in fake.rules] == [(1, 1)]
    cache(row(1, SKINNY))
    dispatch.use(CPU)  # reads no file again
    assert dispatch.choose(GPU, *SHAPE, 1) == (WIDE, 1)


def test_rows_of_unknown_kernels_neither_rule_nor_time(fake):
    cache(row(1, "of_another_version"), row(2, splits=99), row(4))
    with pytest.warns(RuntimeWarning, match="2 rows of .*there is no kernel of_another_version"):
        dispatch.use(CPU)
    assert dispatch.times_of(CPU, BF16, 4096, 4096, (1,)) is None
    assert dispatch.times_of(CPU, BF16, 4096, 4096, (2,)) is None
    assert dispatch.times_of(CPU, BF16, 4096, 4096, (4,)) == (10.0, 15.0)


def test_without_a_gpu_or_its_kernels_nothing_is_read(fake, monkeypatch):
    cache(row(1, "of_another_version"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(dispatch, "_C", object())  # built without CUDA
        dispatch.use(CPU)
        assert dispatch.kernels() == []
        assert dispatch.times_of(CPU, BF16, 4096, 4096, (1,)) is None
        monkeypatch.undo()
        dispatch.use(CPU)
        assert dispatch.gpu_of(CPU) is None


def test_the_model_of_a_gpu(monkeypatch):
    found = device_named("NVIDIA A100", 80, 108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert dispatch.gpu_of(torch.device("cuda", 1)) == Gpu("NVIDIA A100", 80, 108)
    assert dispatch.gpu_of(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("arch", "order"), [(75, 0), (80, 80), (86, 80), (89, 80), (90, 90), (100, 80), (120, 80)]
)
def test_order_of_an_architecture(arch, order):
    assert dispatch.order_of(arch) == order


# --- What can run, and what is faster -------------------------------------------------------------


def test_what_cannot_run_says_why(fake, monkeypatch):
    assert dispatch.cannot_run(CPU, BF16, 4096, 4096) == ""
    assert dispatch.cannot_run(CPU, torch.float32, 4096, 4096) == (
        "float32 has no CUDA kernel; cast the model to bfloat16 or float16"
    )
    assert "no kernel for sm_90" in dispatch.cannot_run(CPU, BF16, 4090, 4096)
    pose_as_gpu(monkeypatch, Gpu("Old GPU", 75, 40))
    assert "no kernel for sm_75" in dispatch.cannot_run(CPU, BF16, 4096, 4096)
    monkeypatch.setattr(dispatch, "_C", object())
    assert dispatch.cannot_run(CPU, BF16, 4096, 4096) == dispatch.NO_CUDA


def test_everything_can_run_on_the_cpu():
    assert dispatch.cannot_run(CPU, torch.float32, 3, 16) == ""


@pytest.mark.parametrize(
    ("packed", "dense", "faster"), [(9.8, 10.0, True), (9.81, 10.0, False), (20.0, 10.0, False)]
)
def test_faster_is_at_most_098_of_dense(packed, dense, faster, fake):
    dispatch.add([row(1, packed_us=packed, dense_us=dense)])
    why = dispatch.not_faster(CPU, BF16, 4096, 4096, (1,))
    assert why == ("" if faster else f"packed {packed:.1f} us, dense 10.0 us at tokens=(1,)")


def test_it_is_the_sum_over_the_tokens_that_counts(fake):
    dispatch.add([row(1, packed_us=5.0, dense_us=9.0), row(2048, packed_us=110.0, dense_us=100.0)])
    assert dispatch.not_faster(CPU, BF16, 4096, 4096, (1,)) == ""
    assert dispatch.not_faster(CPU, BF16, 4096, 4096, (1, 2048)) != ""
    assert dispatch.not_faster(CPU, BF16, 4096, 4096, (1,) * 5 + (2048,)) == ""


def test_what_is_not_measured_names_the_remedy(fake):
    dispatch.add([row(1)])
    why = dispatch.not_faster(CPU, BF16, 4096, 4096, (1, 8))
    assert why.startswith("not measured on Test GPU in bfloat16: run wanda_ext.bench.tune(model)")
    assert why.endswith("swap_linears(model, tokens=(1, 8))")
    assert "float32 has no CUDA" in dispatch.not_faster(CPU, torch.float32, 4096, 4096, (1,))


def test_the_cpu_is_never_faster():
    why = dispatch.not_faster(CPU, BF16, 4096, 4096, (1,))
    assert why == "packed linears save memory on the CPU, not time"


@pytest.mark.parametrize("tokens", [(), (0,), 8, "8", (1.5,), None])
def test_tokens_are_row_counts(tokens):
    with pytest.raises(ValueError, match="tokens must be row counts such as"):
        dispatch.check_tokens(tokens)
