"""bench_model and torch_24 on the CPU: with --small, and with a GPU that is not there."""

from __future__ import annotations

import json

import pytest
import torch
from fake_cuda import pose_with_graphs, run_small

import bench_model
import torch_24
from llama_24 import (
    STEPS,
    Decode,
    Linears,
    Prefill,
    bytes_of,
    linears_of,
    packed_twin,
    random_llama,
)
from torch_24 import Algorithm, CuSparseLt, UnsupportedError, padded, relative_error

pytestmark = pytest.mark.usefixtures("calm")


@pytest.fixture(scope="module")
def models(calm):
    dense = random_llama("small", torch.device("cpu"))
    return dense, packed_twin(dense, fuse=False), packed_twin(dense, fuse=True)


def test_model_runs_small_and_resumes(tmp_path, monkeypatch):
    out = tmp_path / "model.json"
    run_small(bench_model, monkeypatch, "--out", out, "--compile", "none", "--work", "decode")
    results = json.loads(out.read_text())["models"]["small"]
    assert sorted(results["work"]) == ["decode, batch 1", "decode, batch 2"]
    run_small(bench_model, monkeypatch, "--out", out, "--compile", "none")
    found = json.loads(out.read_text())["models"]["small"]
    assert sorted(found["work"]) == [*sorted(results["work"]), "prefill 1x16", "prefill 2x16"]
    assert found["work"]["decode, batch 1"] == results["work"]["decode, batch 1"]
    for work in found["work"].values():
        for ms in work["ms"].values():
            assert ms["all"] == pytest.approx(ms["linears"] + ms["rest"], abs=1e-5)
    assert found["memory"]["packed / dense, linears"] == 9 / 16
    assert found["memory"]["fused"] == found["memory"]["packed"]


def test_model_with_graphs(tmp_path, monkeypatch):
    pose_with_graphs(monkeypatch)
    out = tmp_path / "model.json"
    arguments = ("--compile", "none", "--seconds", 0, "--work", "decode")
    run_small(bench_model, monkeypatch, "--out", out, *arguments)
    works = json.loads(out.read_text())["models"]["small"]["work"]
    assert works["decode, batch 2"]["timings"]["fused"]["repeats"] == bench_model.ROUNDS
    shapes = ("32x64", "64x64", "128x64", "256x64", "64x128")  # q, k, v merged are 128 too
    assert works["decode, batch 2"]["kernels"] == dict.fromkeys(shapes, "skinny/1")


def test_all_linears_are_counted_once(models):
    assert [len(linears_of(model)) for model in models] == [2 * 7, 2 * 7, 2 * 4]
    weights = [
        sum(linear.in_features * linear.out_features for linear in linears_of(model))
        for model in models
    ]
    assert weights[0] == weights[1] == weights[2]
    assert bytes_of(linears_of(models[0])) == 2 * weights[0]
    for model in models:
        assert Linears(model, 3, 1).run().shape == (3, 64)  # down_proj comes last


@torch.no_grad()
def test_packed_models_compute_what_dense_does(models):
    for work in (lambda m: Prefill(m, 2, 8), lambda m: Decode(m, 2, 32)):
        dense, *others = (work(model) for model in models)
        dense.restore()
        expected = dense.run()
        for other in others:
            other.restore()
            assert relative_error(other.run()[:, 0], expected[:, 0]) < 0.02


@torch.no_grad()
def test_a_restored_decode_does_the_same_steps_again(models):
    decode = Decode(models[0], 2, 32)
    decode.restore()
    first = decode.run()
    assert first.shape == (2, STEPS, 96)
    assert int(decode.cache.layers[0].cumulative_length) == 16 + STEPS
    decode.restore()
    assert torch.equal(decode.run(), first)
    assert not torch.equal(first[:, 0], first[:, 1])


# --- torch's own 2:4 ------------------------------------------------------------------------------


class FakeCuSparseLt(CuSparseLt):
    """Algorithm 0 refuses, 1 is wrong, the higher the id of another the faster it is."""

    captures = True

    def __init__(self, weight):
        self.packed = [weight]

    def _algorithms(self, x, own_choice):
        yield from (Algorithm(i, 1, -1, True) for i in ((2,) if own_choice else (2, 0, 1, 3, 2)))

    def multiply(self, x, by, i):
        if by.alg_id == 0:
            raise RuntimeError("not supported")
        return padded(x)[: x.shape[0]] @ self.packed[i].t() * (2 if by.alg_id == 1 else 1)

    def _quick(self, x, algorithm, captured):
        if captured and not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return 1 / algorithm.alg_id


@pytest.mark.parametrize("captures", [True, False])
def test_the_fastest_right_algorithm_is_found(captures, monkeypatch):
    monkeypatch.setattr(FakeCuSparseLt, "captures", captures)
    x, weight = torch.randn(3, 16), torch.randn(8, 16)
    found = FakeCuSparseLt(weight).screen(x, x @ weight.t(), 1e-3).record()
    fastest = {"alg_id": 3, "split_k": 1, "split_k_mode": -1, "transposed": True}
    assert found == {
        "fastest": fastest,
        "captured": captures,
        "timed": 2,
        "refused": 1,
        "wrong": 1,
    }
    with pytest.raises(UnsupportedError, match="1 refuse and 3 are wrong"):
        FakeCuSparseLt(weight).screen(x, torch.ones(3, 8), 1e-3)


def test_what_torch_lacks_is_recorded_as_unsupported():
    weights = torch.zeros(2, 32, 64, dtype=torch.bfloat16)
    for kind in (CuSparseLt, torch_24.Cutlass):
        with pytest.raises(UnsupportedError, match=r"cuSPARSELt|CUDA"):
            kind(weights)


def test_tokens_are_padded_and_errors_are_relative():
    assert padded(torch.ones(1, 16)).shape == (8, 16)
    assert padded(torch.ones(16, 16)).shape == (16, 16)
    y = torch.full((2000, 4), 3.0)
    assert relative_error(y * 1.5, y) == pytest.approx(0.5)
    assert not relative_error(y * torch.nan, y) <= 1
