"""The block runner: its statistics are those of a full forward, at less cost."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    FAMILIES,
    Block,
    Toy,
    padded_batches,
    tiny_model,
    token_ids,
    toy_statistics,
)

from wanda_ext import ops
from wanda_ext.calibration.batches import calibration_batches
from wanda_ext.methods import Magnitude
from wanda_ext.methods.sparsity import NM
from wanda_ext.models.blocks import find_blocks, linears_of
from wanda_ext.models.transfer import Copies
from wanda_ext.runner.walk import Walk


@torch.no_grad()
def brute_force(model, block, batches):
    """Sums of squares of what enters each linear of the block, in float64, by full forwards."""
    sums = {}

    def hook(name, keep):
        def see(module, args):
            x = args[0].double().reshape(-1, args[0].shape[-1])
            x = x if keep is None else x[keep.flatten()]
            sums[name] = sums.get(name, 0) + x.square().sum(0)

        return see

    for batch in batches:
        keep = batch["attention_mask"].bool() if "attention_mask" in batch else None
        handles = [
            linear.register_forward_pre_hook(hook(name, keep))
            for name, linear in linears_of(block).items()
        ]
        model(**batch)
        for handle in handles:
            handle.remove()
    return sums


def check_against_brute_force(model, batches):
    blocks = find_blocks(model)
    walk = Walk(model, blocks, batches)
    tokens = sum(
        int(b.get("attention_mask", torch.ones_like(b["input_ids"])).sum()) for b in batches
    )
    for index, (_, block) in enumerate(blocks):
        linears = linears_of(block)
        found = walk.statistics(index, linears)
        expected = brute_force(model, block, batches)
        assert found.keys() == expected.keys() == linears.keys()
        for name, statistic in found.items():
            torch.testing.assert_close(statistic.sumsq, expected[name], rtol=1e-5, atol=0)
            assert torch.equal(statistic.norm, statistic.sumsq.sqrt().float())
            assert statistic.tokens == tokens
        for linear in linears.values():  # later blocks must see what the pruned one passes on
            bad = torch.zeros(1, dtype=torch.int32)
            Magnitude().prune_(linear.weight.data.view(-1, 8), NM(2, 4), None, bad)
        walk.advance(index)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_a_full_forward(family):
    check_against_brute_force(tiny_model(family), calibration_batches(token_ids(6), batch_size=2))


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_padding_stays_out_of_the_statistics(family):
    model, batches = tiny_model(family), padded_batches()
    check_against_brute_force(model, batches)


def test_bfloat16_and_one_batch_of_another_length():
    model = tiny_model(dtype=torch.bfloat16)
    check_against_brute_force(
        model, [{"input_ids": token_ids(2, 16)}, {"input_ids": token_ids(1, 32)}]
    )


def test_linears_with_one_input_share_one_statistic(monkeypatch):
    shapes = []
    original = ops.input_sumsq_
    monkeypatch.setattr(
        ops,
        "input_sumsq_",
        lambda acc, x, keep=None: (shapes.append(x.shape), original(acc, x, keep)),
    )
    model = tiny_model()
    blocks = find_blocks(model)
    walk = Walk(model, blocks, calibration_batches(token_ids(4), batch_size=2))
    walk.statistics(0, linears_of(blocks[0][1]))
    assert len(shapes) == 2 * 4  # batches x (qkv, o, gate and up, down)


def test_passes_end_at_the_input_of_the_last_linear():
    model, batches = tiny_model(), calibration_batches(token_ids(6), batch_size=2)
    blocks = find_blocks(model)
    walk = Walk(model, blocks, batches)
    runs = []
    for _, block in blocks:
        block.mlp.down_proj.register_forward_hook(lambda *_: runs.append("down"))
        block.register_forward_hook(lambda *_: runs.append("block"))
    walk.statistics(0, linears_of(blocks[0][1]))
    assert runs == []  # the probe of the first block has shown the order
    walk.advance(0)
    assert runs == ["down", "block"] * 3
    runs.clear()
    some = {name: m for name, m in linears_of(blocks[1][1]).items() if "down" not in name}
    walk.statistics(1, some)
    walk.statistics(1, linears_of(blocks[1][1]))  # of which the last order known lacks one
    assert runs == ["down", "block"]


def test_linears_called_twice_are_counted_twice():
    _, tokens = toy_statistics(Toy([Block(calls=("bab",))]))
    assert tokens == {"a": 2 * 192, "b": 2 * 192}


def test_order_that_changes_between_batches_loses_nothing():
    model = Toy([Block(calls=("", "b", "bc", "cb"))])  # the first run is the probe's
    _, tokens = toy_statistics(model)
    assert tokens == {"a": 192, "b": 192, "c": 128}


def test_mask_that_does_not_fit():
    class Pooling(Block):
        def forward(self, hidden, options):
            return hidden + self.linears["a"](hidden[:, :1])

    model = Toy([Pooling()])
    original = model.forward
    model.forward = lambda input_ids, attention_mask=None, use_cache=False: original(input_ids)
    walk = Walk(model, [("blocks.0", model.blocks[0])], padded_batches())
    with pytest.raises(RuntimeError, match=r"linears\.a reads 2 tokens where .* has 64"):
        walk.statistics(0, linears_of(model.blocks[0]))


def test_a_device_changes_nothing_but_the_place():
    model = tiny_model()
    blocks = find_blocks(model)
    batches = calibration_batches(token_ids(4), batch_size=2)
    here = Walk(model, blocks, batches)
    with Copies(torch.device("cpu")) as copies:
        there = Walk(model, blocks, batches, copies)
        for walk in (here, there):
            walk.statistics(0, linears_of(blocks[0][1]))
            walk.advance(0)
    for a, b in zip(here.hidden, there.hidden, strict=True):
        assert torch.equal(a, b)
