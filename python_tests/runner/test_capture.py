"""The pass that bypasses all blocks: what it keeps of each, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Block, Toy, batches_of_two, tiny_model, toy_statistics

from wanda_ext.models.blocks import find_blocks, linears_of
from wanda_ext.runner.walk import Walk


def test_own_arguments_of_each_block_and_linears_never_called():
    model = Toy([Block(), Block()])
    walk, tokens = toy_statistics(model)
    assert tokens == {"a": 192, "b": 192}
    walk.advance(0)
    walk.advance(1)
    for hidden, batch in zip(walk.hidden, batches_of_two(), strict=True):
        torch.testing.assert_close(hidden, model(**batch), rtol=0, atol=0)


def test_blocks_that_the_model_skips():
    model = Toy([Block(), Block(), Block()], order=[0, 2])
    walk, tokens = toy_statistics(model, index=1)
    assert tokens == {}
    walk.advance(1)
    walk.advance(2)
    torch.testing.assert_close(walk.hidden[0], model(**batches_of_two()[0]), rtol=0, atol=0)


def test_dictionaries_that_blocks_share_stay_shared():
    class Writer(Block):
        def forward(self, hidden, options):
            store = options["store"]
            store["runs"] = store.get("runs", 0) + 1
            return hidden * store["runs"]

    class Sharing(Toy):
        def forward(self, input_ids, use_cache=False):
            hidden, shared = self.embedding(input_ids), {}
            for block in self.blocks:
                hidden = block(hidden, {"store": shared})
            return hidden

    model = Sharing([Writer(), Writer()])
    walk = Walk(model, [("0", model.blocks[0]), ("1", model.blocks[1])], batches_of_two())
    walk.advance(0)
    walk.advance(1)
    for hidden, batch in zip(walk.hidden, batches_of_two(), strict=True):  # each batch has its own
        assert torch.equal(hidden, 2 * model.embedding(batch["input_ids"]))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"between": lambda hidden: hidden + 1},
            r"changes the hidden states on their way to blocks\.1",
        ),
        ({"order": [0, 1, 1]}, r"blocks\.1 is called twice, or out of order"),
        ({"order": [1, 0]}, r"blocks\.0 is called twice, or out of order"),
    ],
)
def test_models_whose_blocks_cannot_run_alone(options, match):
    model = Toy([Block(), Block(), Block()], **options)
    with pytest.raises(RuntimeError, match=match):
        toy_statistics(model)
    assert not any("forward" in block.__dict__ for block in model.blocks)


def test_model_that_calls_no_block():
    class Idle(Toy):
        def forward(self, input_ids, use_cache=False):
            return self.embedding(input_ids)

    with pytest.raises(RuntimeError, match="called none of its blocks"):
        toy_statistics(Idle([Block()]))


def test_capture_and_hooks_leave_no_trace():
    model = tiny_model()
    own = model.model.layers[1].forward
    model.model.layers[1].forward = own  # as accelerate does
    blocks = find_blocks(model)
    walk = Walk(model, blocks, batches_of_two())
    walk.statistics(0, linears_of(blocks[0][1]))
    assert model.model.layers[1].__dict__["forward"] == own
    assert "forward" not in model.model.layers[0].__dict__
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
