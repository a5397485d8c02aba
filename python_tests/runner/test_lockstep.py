"""Models that do more between their blocks than pass on: same result, batch by batch in threads."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import torch
from tiny_models import Block, Toy, batches_of_two, tiny_model, token_ids, weights_of
from torch import nn

from wanda_ext.models.blocks import find_blocks, linears_of
from wanda_ext.models.transfer import Copies
from wanda_ext.prune.prune import PruneError, prune_model
from wanda_ext.runner.capture import GlueError, OrderError
from wanda_ext.runner.lockstep import Lockstep, start_walk
from wanda_ext.runner.walk import Walk

QUIET = {"swap": False, "progress": False}


def blocks_of(model):
    return [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]


def toy(between=lambda hidden: hidden * 0.5 + 1, count=3, **options):
    torch.manual_seed(0)
    return Toy([Block() for _ in range(count)], between=between, **options)


def waiting():
    return [t for t in threading.enumerate() if t.name == "wanda_ext batch"]


def test_glue_is_walked_in_lock_step():
    model = toy()
    with closing(start_walk(model, blocks_of(model), batches_of_two())) as walk:
        assert "in lock-step: the model changes the hidden states" in walk.runner
        assert len(waiting()) == 3
        for i, block in enumerate(model.blocks):
            seen = []
            hook = block.linears["b"].register_forward_pre_hook(lambda _, a, s=seen: s.append(a[0]))
            for batch in batches_of_two():
                model(**batch)
            hook.remove()
            expected = torch.cat(seen).double().square().sum((0, 1))
            found = walk.statistics(i, linears_of(block))
            torch.testing.assert_close(found["linears.b"].sumsq, expected, rtol=1e-6, atol=0)
            with torch.no_grad():
                block.linears["b"].weight[:, ::2] = 0  # the rest must see what this passes on
            walk.advance(i)
        for hidden, batch in zip(walk.hidden, batches_of_two(), strict=True):
            assert torch.equal(model.between(hidden), model(**batch))
    assert waiting() == []
    assert not any("forward" in block.__dict__ for block in model.blocks)


def test_both_walks_give_the_same_bits():
    model = tiny_model()
    blocks = find_blocks(model)
    alone = Walk(model, blocks, batches_of_two())
    with closing(Lockstep(model, blocks, batches_of_two())) as together:
        for i, (_, block) in enumerate(blocks):
            ours, theirs = (w.statistics(i, linears_of(block)) for w in (alone, together))
            assert list(ours) == list(theirs)
            assert all(torch.equal(ours[name].sumsq, theirs[name].sumsq) for name in ours)
            alone.advance(i)
            together.advance(i)
            for a, b in zip(alone.hidden, together.hidden, strict=True):
                assert torch.equal(a, b)


def test_blocks_that_read_what_others_return_beside_the_hidden_states():
    class Adding(Block):
        def forward(self, hidden, options, carried=None):
            hidden = super().forward(hidden, options)
            return hidden, hidden.mean() if carried is None else carried + 1

    class Carrying(Toy):
        def forward(self, input_ids, use_cache=False):
            hidden, carried = self.embedding(input_ids), None
            for block in self.blocks:
                hidden, carried = block(hidden, {"scale": 1.0}, carried)
            return hidden * carried

    model = Carrying([Adding(), Adding()])
    with closing(start_walk(model, blocks_of(model), batches_of_two())) as walk:
        assert "blocks.1 reads more of another block than" in walk.runner
        walk.advance(0)
        walk.advance(1)
        out = model.blocks[0](model.embedding(batches_of_two()[0]["input_ids"]), {"scale": 1.0})
        expected = model.blocks[1](out[0], {"scale": 1.0}, out[1])[0]
        assert torch.equal(walk.hidden[0], expected)


def test_hidden_states_that_are_not_the_first_argument():
    class Named(Block):
        def forward(self, options, x):
            return super().forward(x, options)

    class Naming(Toy):
        def forward(self, input_ids, use_cache=False):
            x = self.embedding(input_ids)
            for block in self.blocks:
                x = block(options={"scale": 2.0}, x=x)
            return x

    model = Naming([Named(), Named()])
    with closing(start_walk(model, blocks_of(model), batches_of_two())) as walk:
        assert "the first argument of blocks.0 is not the hidden states" in walk.runner
        walk.advance(0)
        walk.advance(1)
        for hidden, batch in zip(walk.hidden, batches_of_two(), strict=True):
            assert torch.equal(hidden, model(**batch))


def test_models_that_do_not_run_with_their_blocks_bypassed():
    class Watchful(Toy):
        def forward(self, input_ids, use_cache=False):
            hidden = self.embedding(input_ids)
            for block in self.blocks:
                before, hidden = hidden, block(hidden, {"scale": 1.0})
                assert not torch.equal(before, hidden), "the block did nothing"
            return hidden

    model = Watchful([Block(), Block()])
    with closing(start_walk(model, blocks_of(model), batches_of_two())) as walk:
        assert "run with its blocks bypassed (the block did nothing" in walk.runner
        walk.advance(0)
        walk.advance(1)
        assert torch.equal(walk.hidden[0], model(**batches_of_two()[0]))


def test_blocks_that_the_model_skips():
    model = toy(order=[0, 2])
    with closing(start_walk(model, blocks_of(model), batches_of_two())) as walk:
        walk.advance(0)
        assert walk.statistics(1, linears_of(model.blocks[1])) == {}
        walk.advance(1)
        walk.advance(2)
        hidden = model.between(walk.hidden[0])
        assert torch.equal(hidden, model(**batches_of_two()[0]))


@pytest.mark.parametrize("order", [[0, 1, 1], [1, 0, 2]])
def test_blocks_out_of_order_are_refused_before_any_is_pruned(order):
    model = toy(order=order)
    before = weights_of(model)
    with pytest.raises(PruneError, match=r"^capture: .*called twice, or out of order.*no block is"):
        prune_model(model, token_ids(6), 0.5, blocks="blocks", batch_size=2, **QUIET)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    walk = Lockstep(model, blocks_of(model), batches_of_two())
    with closing(walk), pytest.raises(OrderError, match="called twice, or out of order"):
        for i in range(3):
            walk.advance(i)
    assert waiting() == []


def test_the_report_says_how_the_blocks_ran():
    model = toy()
    report = prune_model(model, token_ids(6), 0.5, blocks="blocks", batch_size=2, **QUIET)
    assert "in lock-step: the model changes the hidden states" in report.runner
    assert report.runner in str(report)
    plain = prune_model(tiny_model(), token_ids(), 0.5, **QUIET)
    assert plain.runner == "each block ran by itself"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("place", ["glue", "block"])
def test_what_stops_a_walk_leaves_no_thread(stop, place):
    calls, runs = [], []

    def between(hidden):
        calls.append(torch.is_grad_enabled())
        if place == "glue" and len(calls) == 7:  # 2 of capture, 3 after block 0, 2 after block 1
            raise stop
        return hidden + 1

    def run(*_):
        runs.append(1)
        if place == "block" and len(runs) == 2:
            raise stop

    model = toy(between)
    model.blocks[1].linears["b"].register_forward_hook(run)
    model = model.train()
    with pytest.raises(PruneError if stop is ZeroDivisionError else stop) as caught:
        prune_model(model, token_ids(6), 0.5, blocks="blocks", batch_size=2, **QUIET)
    assert caught.value.report.status == "stopped at blocks.1"
    assert len(caught.value.report.pruned) == 2
    assert not any(calls)  # gradients are off in every thread
    assert waiting() == []
    assert model.training
    assert not any("forward" in block.__dict__ for block in model.blocks)


def test_a_device_changes_nothing_but_the_place():
    model = toy()
    here = start_walk(model, blocks_of(model), batches_of_two())
    with Copies(torch.device("cpu")) as copies:
        there = start_walk(model, blocks_of(model), batches_of_two(), copies)
        with closing(here), closing(there):
            for i in range(3):
                there.statistics(i, linears_of(model.blocks[i]))
                there.advance(i)
                copies.finish()
            here.close()
    with closing(start_walk(model, blocks_of(model), batches_of_two())) as here:
        for i in range(3):
            here.advance(i)
        for a, b in zip(here.hidden, there.hidden, strict=True):
            assert torch.equal(a, b)


def test_a_model_that_fails_either_way_says_why():
    class Failing(nn.Module):
        def forward(self, hidden, options):
            raise ValueError("no such rotary table")

    model = Toy([Failing(), Failing()])
    with pytest.raises(ValueError, match="no such rotary table"):
        start_walk(model, blocks_of(model), batches_of_two())
    model = toy()
    with pytest.raises(GlueError):
        Walk(model, blocks_of(model), batches_of_two())
