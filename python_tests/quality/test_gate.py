"""The gate: it holds or fails by held-out perplexity, and restores no more than it must."""

from __future__ import annotations

import contextlib
import copy
import math
import sys

import pytest
import torch
from tiny_models import changed, tiny_model, tiny_tokenizer, token_ids, weights_of

import wanda_ext
from wanda_ext.calibration.held_out import held_out_batches, perplexity_of
from wanda_ext.quality.gate import _fewest, gate

TEXTS = [f"document {i}: " + " ".join(f"word{40 * i + j}" for j in range(40)) for i in range(30)]
DATA = {"tokenizer": tiny_tokenizer(), "nsamples": 8, "seqlen": 32}
FRAGILE = "model.layers.1.mlp.down_proj"


def pruned(dense, sparsity="50%"):
    model = copy.deepcopy(dense)
    report = wanda_ext.prune_model(model, TEXTS, sparsity, progress=False, **DATA)
    return model, report


def run(model, dense, **options):
    return gate(model, dense, TEXTS, windows=8, progress=False, **DATA, **options)


@pytest.fixture
def fragile():
    """A model that knows its text, and one that lost it: only the fragile linear's pruning counts.

    That linear is pruned to nothing, and has large weights; the others lose one weight a row.
    """
    dense = tiny_model()
    ids = torch.cat([b["input_ids"] for b in held_out_batches(TEXTS, 8, **DATA)])
    optimizer = torch.optim.Adam(dense.parameters(), lr=3e-3)
    for _ in range(30):
        loss = dense(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model, report = pruned(dense, {"*": "2%"})
    with torch.no_grad():
        model.get_submodule(FRAGILE).weight.mul_(-20)
    return model, dense, report


def test_a_fragile_model_misses_the_gate_and_meets_it_with_fallback(fragile):
    model, dense, report = fragile
    before = weights_of(model)
    alone = run(model, dense, max_ratio=1.5, report=report)
    assert not alone.passed and not alone.restored and alone.final == alone.pruned
    assert changed(model, before) == [] and report.gate["passed"] is False
    with pytest.raises(ValueError, match=r"the gate does not hold: .* 1\.5 allowed .*fallback"):
        alone.raise_if_failed()
    assert str(alone).splitlines()[-1].startswith("gate fails: perplexity ")

    found = run(model, dense, max_ratio=1.5, fallback=True, report=report)
    found.raise_if_failed()
    assert found.passed and found.restored == [FRAGILE]
    assert found.pruned == alone.final > 1.5 * found.dense >= found.final
    assert changed(model, before) == [f"{FRAGILE}.weight"]
    weight = dense.get_submodule(FRAGILE).weight
    assert torch.equal(model.get_submodule(FRAGILE).weight, weight)
    batches = held_out_batches(TEXTS, 8, **DATA)
    with torch.no_grad():
        assert perplexity_of(model, batches, None) == found.final
    (line,) = (line for line in report.linears if line.status != "pruned")
    assert (line.name, line.status, line.reached) == (FRAGILE, "restored by the gate", 0.0)
    assert line.lost == 0.0 and report.gate["restored"] == [FRAGILE]
    wanda_ext.verify(model, report).raise_if_bad()
    assert f"restored {FRAGILE}" in str(found) and "with 1 linear left dense" in str(found)


def test_a_good_model_holds_and_nothing_is_changed():
    dense = tiny_model()
    model, _ = pruned(dense, "10%")
    before, dense_before = weights_of(model), weights_of(dense)
    state = torch.get_rng_state()
    model.train()
    found = run(model, dense, max_ratio=2, fallback=True)
    assert found.passed and found.restored == [] and model.training
    assert found.tokens == 8 * 32 and [b.name for b in found.blocks] == [
        f"model.layers.{i}" for i in range(3)
    ]
    assert changed(model, before) == changed(dense, dense_before) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_where_not_even_all_linears_do_the_model_stays(monkeypatch):
    dense = tiny_model()
    model, _ = pruned(dense)
    before = weights_of(model)
    values = iter([10.0, *[20.0] * 100])
    monkeypatch.setattr(
        sys.modules["wanda_ext.quality.gate"], "perplexity_of", lambda *_: next(values)
    )
    found = run(model, dense, fallback=True)
    assert not found.passed and found.restored == [] and found.ratio == 2
    assert changed(model, before) == []


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 8, 13])
def test_the_fewest_are_found(needed):
    class Fake:
        dense = 0

        def exchanged(self):
            Fake.dense += 1
            return contextlib.closing(self)

        def close(self):
            Fake.dense -= 1

    units, measured = [Fake() for _ in range(13)], []

    def measure():
        measured.append(Fake.dense)
        return 20.0 - Fake.dense

    found, value = _fewest(units, measure, 20.0 - needed)
    assert found == units[:needed] and value == 20.0 - needed
    assert len(measured) == len(set(measured)) <= 8 and Fake.dense == 0
    assert _fewest(units, measure, 1.0) is None


def test_a_model_that_gives_nan_fails():
    dense = tiny_model()
    model, _ = pruned(dense)
    with torch.no_grad():
        model.get_submodule(FRAGILE).weight.fill_(math.nan)
    found = run(model, dense)
    assert found.pruned == math.inf and not found.passed
    assert found.blocks[0].grown < 1 and found.blocks[1].own == math.inf
    assert run(model, dense, max_ratio=1.5, fallback=True).restored[0] == FRAGILE
    with torch.no_grad():
        dense.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="dense: its perplexity on the held-out text is not"):
        run(model, dense)


def test_refuses():
    dense = tiny_model()
    model, _ = pruned(dense, "2:4")
    for ratio in (0.9, math.inf, math.nan):
        with pytest.raises(ValueError, match="max_ratio is a perplexity over"):
            run(model, dense, max_ratio=ratio)
    with pytest.raises(ValueError, match=r"not of one architecture: model\.embed_tokens\.weight"):
        run(model, tiny_model("opt"))
    with pytest.raises(ValueError, match=r"q_proj is \[64, 64\] torch.bfloat16 on cpu there"):
        run(model, tiny_model(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="windows cannot be held out"):
        gate(model, dense, TEXTS, windows=10**4, progress=False, **DATA)
    spread = copy.deepcopy(model)
    spread.model.layers[2].input_layernorm.to("meta")
    with pytest.raises(ValueError, match="on the meta device"):
        run(spread, dense, device="cpu")
    wanda_ext.swap_linears(model)
    with pytest.raises(ValueError, match="packed already: call unswap_linears"):
        run(model, dense)


def test_tokens_are_measured_as_they_are():
    dense = tiny_model()
    model, _ = pruned(dense)
    ids = token_ids(4)
    found = gate(model, dense, ids, progress=False)
    expected = wanda_ext.perplexity(model, ids.flatten(), 32)
    assert found.final == pytest.approx(expected, rel=1e-5)
