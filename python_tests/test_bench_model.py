"""bench_model as far as the CPU goes: with --small, and with a GPU that is not there."""

from __future__ import annotations

import json

import pytest
import torch
from fake_cuda import one_thread, pose_with_graphs, run_small

import bench_model
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
from torch_24 import relative_error


@pytest.fixture(autouse=True, scope="module")
def calm():
    with one_thread():
        yield


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
