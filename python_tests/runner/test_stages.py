"""Two streams through a block: what enters each linear in both, while the block is changed."""

from __future__ import annotations

import copy
import threading
from contextlib import closing

import families
import pytest
import torch
from tiny_models import Block, Toy, batches_of_two, padded_batches, tiny_model, token_ids
from torch import nn

from wanda_ext.models.blocks import find_blocks, preserved, targets_of_block
from wanda_ext.models.transfer import Copies
from wanda_ext.runner.capture import OrderError
from wanda_ext.runner.held import NAME
from wanda_ext.runner.stages import after_first, two_streams
from wanda_ext.runner.walk import Walk


def waiting():
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def toy(*blocks, **options):
    torch.manual_seed(0)
    return Toy(blocks, **options)


def blocks_of(model):
    return [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]


def halve(linear):
    with torch.no_grad():
        linear.weight[:, ::2] = 0


def inputs_of(model, batches):
    """What enters each linear over all tokens that count, by name: [tokens, k] float64."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def see(_, args, name=name):
                seen.setdefault(name, []).append(args[0])

            hooks.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    kept = [after_first(batch) for batch in batches]
    return {
        name: torch.cat(
            [x.flatten(0, -2)[keep.flatten()] for x, keep in zip(xs, kept, strict=True)]
        ).double()
        for name, xs in seen.items()
        if len(xs) == len(batches)
    }


def assert_walked(model, blocks, batches, **options):
    """Every linear is halved when its turn comes; every stage has what a whole model would tell."""
    dense = copy.deepcopy(model)
    of_dense = inputs_of(dense, batches)
    with preserved(model), two_streams(model, blocks, batches, **options) as streams:
        for i, (path, block) in enumerate(blocks):
            targets = targets_of_block(block)
            names = []
            with closing(streams.stages(i, targets)) as stages:
                for stage in stages:
                    ((name, got),) = stage.items()
                    names.append(name)
                    x = inputs_of(model, batches)[f"{path}.{name}"]
                    x0 = of_dense[f"{path}.{name}"]
                    gram, drift = x.t() @ x, (x0 - x).t() @ x
                    size = float(gram.abs().max())
                    near = {"rtol": 1e-4, "atol": 1e-5 * size}
                    torch.testing.assert_close(got.gram.double(), gram, **near)
                    torch.testing.assert_close(got.drift.double(), drift, **near)
                    torch.testing.assert_close(got.sumsq, x.square().sum(0), rtol=1e-5, atol=0)
                    assert got.tokens == len(x)
                    if (i, len(names)) > (0, 4):
                        assert drift.abs().max() > 1e-3 * size
                    halve(targets[name])
            assert sorted(names) == sorted(targets)
    assert waiting() == []
    assert not any(module._forward_pre_hooks for module in model.modules())
    return streams


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "opt"])
def test_each_stage_sees_what_was_done_before_it(family):
    model = tiny_model(family)
    streams = assert_walked(model, find_blocks(model), batches_of_two())
    assert streams.runner == "each block ran by itself"


def test_padding_does_not_count():
    model = tiny_model()
    assert_walked(model, find_blocks(model), padded_batches())


def test_models_that_run_in_lock_step():
    model = toy(Block(), Block(), Block(), between=lambda hidden: hidden * 0.5 + 1)
    for block in model.blocks:
        del block.linears["c"]
    streams = assert_walked(model, blocks_of(model), batches_of_two())
    assert "in lock-step" in streams.runner


def test_states_that_travel():
    model = tiny_model()
    with Copies(torch.device("cpu")) as copies:
        assert_walked(model, find_blocks(model), batches_of_two(), copies=copies)


def test_linears_that_read_one_tensor_share_one_statistic():
    model = tiny_model()
    found = {}
    with preserved(model), two_streams(model, find_blocks(model), batches_of_two()) as streams:
        for stage in streams.stages(0, targets_of_block(model.model.layers[0])):
            found |= {name.rpartition(".")[2]: one for name, one in stage.items()}
    assert list(found) == [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
    assert found["q_proj"] is found["k_proj"] is found["v_proj"]
    assert found["gate_proj"] is found["up_proj"]
    assert len({id(one) for one in found.values()}) == 4
    assert not found["q_proj"].drift.any()


def test_what_leaves_a_block_is_what_a_plain_pass_gives():
    model = tiny_model()
    blocks = find_blocks(model)
    with preserved(model), two_streams(model, blocks, batches_of_two()) as streams:
        alone = Walk(model, blocks, batches_of_two())
        with closing(streams.stages(0, targets_of_block(blocks[0][1]))) as stages:
            for stage in stages:
                for name in stage:
                    halve(blocks[0][1].get_submodule(name))
        alone.advance(0)
        pairs = zip(streams.pruned.hidden, alone.hidden, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


# --- What has no stage of its own -----------------------------------------------------------------


def stages_of(model, index=0):
    found = []
    with preserved(model), two_streams(model, blocks_of(model), batches_of_two()) as streams:
        for i in range(index + 1):
            with closing(streams.stages(i, targets_of_block(model.blocks[i]))) as stages:
                found = list(stages)
    return [
        {n.removeprefix("linears."): one.drift is not None for n, one in s.items()} for s in found
    ]


def test_linears_that_only_some_batches_call_come_first_without_drift():
    block = Block(calls=("b", "bc"))
    assert stages_of(toy(block)) == [{"c": False}, {"a": True}, {"b": True}]


def test_linears_that_are_called_twice():
    assert stages_of(toy(Block(calls=("bb",)))) == [{"b": False}, {"a": True}]


def test_linears_that_batches_call_in_another_order():
    stages = stages_of(toy(Block(calls=("bc", "cb"))))
    assert stages == [{"a": False, "b": False, "c": False}]


def test_linears_that_read_only_some_tokens():
    class Routed(Block):
        def forward(self, hidden, options):
            hidden = self.linears["a"](hidden)
            hidden[:, 5:] += self.linears["b"](hidden[:, 5:])
            return hidden

    assert stages_of(toy(Routed())) == [{"b": False}, {"a": True}]


def test_inputs_that_are_overwritten_later():
    class InPlace(Block):
        def forward(self, hidden, options):
            hidden = self.linears["a"](hidden)
            hidden += self.linears["b"](hidden)
            return hidden

    assert stages_of(toy(InPlace())) == [{"b": False}, {"a": True}]


def test_fused_experts_come_first():
    model = families.build("qwen3_moe")
    blocks, batches = find_blocks(model), batches_of_two()
    with preserved(model), two_streams(model, blocks, batches) as streams:
        first, *others = streams.stages(0, targets_of_block(blocks[0][1]))
    assert all("experts" in name and one.drift is None for name, one in first.items())
    assert [name.rpartition(".")[2] for one in others for name in one][:4] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]


def test_blocks_that_the_model_skips():
    class Skipping(Toy):
        def forward(self, input_ids, use_cache=False):
            hidden = self.embedding(input_ids)
            for i, block in enumerate(self.blocks):
                if i != 1 or input_ids[0, 0] % 2:
                    hidden = block(hidden, {"scale": torch.tensor(1.0)})
            return hidden

    torch.manual_seed(0)
    model = Skipping([Block(), Block(), Block()])
    odd = [int(batch["input_ids"][0, 0]) % 2 for batch in batches_of_two()]
    assert sorted(set(odd)) == [0, 1]
    assert stages_of(model, 1) == [{"a": True}, {"b": True}]
    assert stages_of(model, 2) == [{"a": True}, {"b": True}]


# --- The first token ------------------------------------------------------------------------------


def test_the_first_token_of_a_window_does_not_count():
    ids = token_ids(2, 4)
    assert after_first({"input_ids": ids}).tolist() == [[False, True, True, True]] * 2
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])
    kept = after_first({"input_ids": ids, "attention_mask": mask})
    assert kept.tolist() == [[False, False, True, True], [False, False, False, True]]
    assert after_first({"input_ids": ids[:, :1]}).all()


# --- Ends -----------------------------------------------------------------------------------------


def test_a_block_that_is_left_in_the_middle_leaves_nothing_behind():
    model = tiny_model()
    with preserved(model), two_streams(model, find_blocks(model), batches_of_two()) as streams:
        stages = streams.stages(0, targets_of_block(model.model.layers[0]))
        next(stages)
        assert len(waiting()) == 3
        stages.close()
        assert waiting() == []
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_block_that_decides_by_its_inputs_is_told():
    class Deciding(Block):
        def forward(self, hidden, options):
            hidden = self.linears["a"](hidden)
            return self.linears["b" if hidden.any() else "c"](hidden)

    model = toy(Deciding())
    with preserved(model), two_streams(model, blocks_of(model), batches_of_two()) as streams:
        stages = streams.stages(0, targets_of_block(model.blocks[0]))
        next(stages)
        for parameter in model.blocks[0].linears["a"].parameters():
            parameter.zero_()
        with pytest.raises(OrderError, match=r"linears\.b is not called where it was"):
            next(stages)
    assert waiting() == []
