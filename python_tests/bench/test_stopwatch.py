"""The race between kernels with a made-up clock; the stopwatch itself where there is a GPU."""

from __future__ import annotations

import random

import pytest
import torch

from wanda_ext import ops
from wanda_ext.bench.stopwatch import (
    CALLS,
    FINALISTS,
    HEATS,
    MAX_COPIES,
    ROTATED_BYTES,
    ROUNDS,
    Stopwatch,
    Weights,
    calls_of,
    copies_of,
    race,
    relative_error,
    tolerance,
)
from wanda_ext.packed import dispatch

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Timer:
    """Times by choice, with noise that only adds, as on a real device; counts the calls."""

    def __init__(self, times, noise: float = 0.0) -> None:
        self.times, self.noise = times, noise
        self.order: list = []
        self.random = random.Random(0)

    def __call__(self, choice):
        self.order.append(choice)
        return self.times[choice] * (1 + self.noise * self.random.random())


def choices(*times: float) -> dict:
    return {None: 10.0, **{(f"k{i}", 1): time for i, time in enumerate(times)}}


def run(times, seconds: float = 0.0, noise: float = 0.0):
    """The race, by a clock on which a round takes a second."""
    timer = Timer(times, noise)
    entrants = [choice for choice in times if choice is not None]
    return race(entrants, timer, seconds, lambda: timer.order.count(None)), timer


def test_the_fastest_wins_with_its_time_and_denses():
    found, _ = run(choices(7.0, 5.0, 6.0))
    assert found == (("k1", 1), 5.0, 10.0)


def test_noise_does_not_decide():
    for fastest in range(8):
        times = [5.0] * 8
        times[fastest] = 4.5
        (winner, packed, dense), _ = run(choices(*times), noise=0.1)
        assert winner == (f"k{fastest}", 1)
        assert 4.5 < packed < 1.1 * 4.5 and 10.0 < dense < 11.0


def test_a_few_wild_times_do_not_decide():
    times = choices(6.0, 5.0)
    timer = Timer(times)
    wild = lambda choice: 0.1 if len(timer.order) % 7 == 0 else 1.0  # noqa: E731
    winner, packed, dense = race(
        [("k0", 1), ("k1", 1)], lambda choice: timer(choice) * wild(choice), 0.0
    )
    assert (winner, packed, dense) == (("k1", 1), 5.0, 10.0)


def test_of_equals_the_first_wins():
    assert run(choices(6.0, 5.0, 5.0))[0][0] == ("k1", 1)


def test_one_candidate_wins_even_over_a_faster_dense():
    assert run(choices(50.0))[0] == (("k0", 1), 50.0, 10.0)


def test_only_finalists_run_the_final_in_turns():
    times = choices(*range(1, 10))
    _, timer = run(times)
    heats, final = timer.order[: 9 * HEATS], timer.order[9 * HEATS :]
    assert None not in heats
    entrants = [(f"k{i}", 1) for i in range(FINALISTS)] + [None]
    assert final == entrants * ROUNDS


def test_it_goes_on_for_the_seconds_asked():
    for seconds, rounds in ((100.0, 100), (3.0, ROUNDS)):
        _, timer = run(choices(5.0), seconds)
        assert timer.order.count(None) == rounds


def test_copies_are_more_than_a_cache_holds():
    nbytes = 4096 * 4096 * 9 // 8
    assert copies_of(nbytes) * nbytes >= ROTATED_BYTES > (copies_of(nbytes) - 1) * nbytes
    assert copies_of(1 << 30) == 2
    assert copies_of(64) == MAX_COPIES


@pytest.mark.parametrize("copies", [2, 3, 15, 20, 21, 64])
def test_a_graph_calls_every_copy_as_often(copies):
    assert calls_of(copies) >= CALLS and calls_of(copies) % copies == 0
    assert calls_of(copies) < CALLS + copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_counts_as_the_same_result(dtype):
    torch.manual_seed(0)
    expected = torch.randn(64, 64)
    rounded = expected.to(dtype)
    assert relative_error(rounded.clone(), rounded) == 0.0
    other = (expected * (1 + torch.finfo(dtype).eps)).to(dtype)
    assert 0 < relative_error(other, rounded) < tolerance(dtype)
    x, w = torch.randn(64, 4096), torch.randn(64, 4096) / 64
    y = (x @ w.T).to(dtype)
    cut = (x[:, 16:] @ w[:, 16:].T).to(dtype)  # one step of k forgotten
    assert relative_error(cut, y) > tolerance(dtype)
    broken = y.clone()
    broken[3, 3] = float("nan")
    assert not relative_error(broken, y) <= tolerance(dtype)


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def weights() -> Weights:
    return Weights(torch.bfloat16, 512, 1024, torch.device("cuda"))


@pytest.mark.gpu
@on_a_gpu
def test_the_copies_are_one_24_weight(weights):
    (values, meta), dense = weights.packed[-1], weights.dense[-1]
    assert torch.equal(ops.unpack_24(values, meta, weights.order), dense)
    assert len({copy.data_ptr() for copy in weights.dense}) == len(weights.dense) == MAX_COPIES


@pytest.mark.gpu
@on_a_gpu
def test_it_times_dense_and_every_kernel_that_can_run(weights):
    watch = Stopwatch(weights, 16)
    problem = (weights.gpu, "bfloat16", 512, 1024, 16)
    able = [name for name in dispatch.kernels() if not dispatch.admits(*problem, name, 1)]
    assert able
    for choice in (None, *((name, 1) for name in able)):
        assert watch.ready(choice) == ""
        assert 0.1 < watch.time_us(choice) < 1e4


@pytest.mark.gpu
@on_a_gpu
def test_a_wrong_result_is_not_timed(weights):
    watch = Stopwatch(weights, 16)
    weights.packed[0][0].mul_(2.0)
    choice = dispatch.choose(weights.gpu, "bfloat16", 512, 1024, 16)
    assert watch.ready(choice).startswith("its result is off by 1.")
    with pytest.raises(KeyError):
        watch.time_us(choice)
