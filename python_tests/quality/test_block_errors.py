"""Errors of blocks against brute force, for families whose blocks run alone and in lock-step."""

from __future__ import annotations

import copy

import pytest
import torch
from families import build
from tiny_models import batches_of_two, changed, padded_batches, tiny_model, token_ids, weights_of

import wanda_ext
from wanda_ext.models.blocks import find_blocks
from wanda_ext.models.twins import pair_blocks
from wanda_ext.quality.block_errors import block_errors
from wanda_ext.runner.capture import GlueError
from wanda_ext.runner.walk import Walk


def pruned(dense):
    model = copy.deepcopy(dense)
    wanda_ext.prune_model(model, sparsity="50%", method="magnitude", progress=False)
    return model


@torch.no_grad()
def outputs(model, batches, inside=None):
    """What leaves each block, per batch; inside(i, block, args, kwargs) looks at every call."""
    found = []
    for batch in batches:
        handles, states = [], []
        for i, (_, block) in enumerate(find_blocks(model)):

            def see(block, args, kwargs, out, i=i, states=states):
                states.append(out[0] if isinstance(out, tuple) else out)
                if inside:
                    inside(i, block, args, kwargs, states[-1])

            handles.append(block.register_forward_hook(see, with_kwargs=True))
        model(**batch, use_cache=False)
        for handle in handles:
            handle.remove()
        found.append(states)
    return found


def error(one, other, keep=None):
    ratio = (one - other).norm(dim=-1) / other.norm(dim=-1)
    return ratio.flatten() if keep is None else ratio[keep.bool()]


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "opt"])
@pytest.mark.parametrize("lockstep", [False, True])
def test_errors_are_those_of_brute_force(family, lockstep, monkeypatch):
    if lockstep:

        def glue(*_, **__):
            raise GlueError("asked")

        monkeypatch.setattr(
            "wanda_ext.runner.lockstep.Walk", type("Walk", (Walk,), {"__init__": glue})
        )
    dense, batches = tiny_model(family), batches_of_two()
    model = pruned(dense)
    before, dense_before = weights_of(model), weights_of(dense)
    pairs = pair_blocks(model, dense)
    found = block_errors(model, dense, pairs, batches, progress=False)
    assert changed(model, before) == changed(dense, dense_before) == []

    own = [[] for _ in pairs]
    alone = {unit.name: [] for pair in pairs for unit in pair.units}

    def inside(i, block, args, kwargs, out):
        twin = copy.deepcopy(pairs[i].dense)
        call = pairs[i].module.forward(*args, **kwargs)
        own[i].append(error(call[0] if isinstance(call, tuple) else call, out))
        for unit in pairs[i].units:
            part = twin.get_submodule(unit.name.removeprefix(f"{pairs[i].name}."))
            kept = part.weight.data
            part.weight.data = unit.module.weight.data
            call = twin.forward(*args, **kwargs)
            alone[unit.name].append(error(call[0] if isinstance(call, tuple) else call, out))
            part.weight.data = kept

    theirs = outputs(dense, batches, inside)
    ours = outputs(model, batches)
    for i, block in enumerate(found):
        grown = torch.cat([error(a[i], b[i]) for a, b in zip(ours, theirs, strict=True)])
        assert block.name == pairs[i].name
        assert block.grown == pytest.approx(float(grown.mean()), rel=1e-4)
        assert block.own == pytest.approx(float(torch.cat(own[i]).mean()), rel=1e-4)
        assert block.linears.keys() == {unit.name for unit in pairs[i].units}
        for name, value in block.linears.items():
            assert value == pytest.approx(float(torch.cat(alone[name]).mean()), rel=1e-4)
    assert found[0].own == pytest.approx(found[0].grown, rel=1e-4)


def test_padding_does_not_count():
    dense, batches = tiny_model(), padded_batches()
    model = pruned(dense)
    found = block_errors(model, dense, pair_blocks(model, dense), batches, progress=False)
    theirs, ours = outputs(dense, batches), outputs(model, batches)
    for i, block in enumerate(found):
        parts = [
            error(a[i], b[i], batch["attention_mask"])
            for a, b, batch in zip(ours, theirs, batches, strict=True)
        ]
        assert block.grown == pytest.approx(float(torch.cat(parts).mean()), rel=1e-4)


def test_what_is_the_same_has_no_error():
    dense = tiny_model()
    model = copy.deepcopy(dense)
    pairs = pair_blocks(model, dense)
    assert all(pair.units == () for pair in pairs)
    found = block_errors(model, dense, pairs, batches_of_two(), progress=False)
    assert [(b.own, b.grown, b.linears) for b in found] == [(0, 0, {})] * 3


def test_on_a_device_as_at_home(monkeypatch):
    monkeypatch.setattr("wanda_ext.models.transfer.is_away", lambda blocks, device: True)
    dense = tiny_model()
    model = pruned(dense)
    pairs, batches = pair_blocks(model, dense), batches_of_two()
    before = weights_of(model)
    there = block_errors(model, dense, pairs, batches, torch.device("cpu"), progress=False)
    assert there == block_errors(model, dense, pairs, batches, progress=False)
    assert changed(model, before) == []


def test_fused_experts_are_one_unit():
    dense = build("mixtral")
    model = copy.deepcopy(dense)
    wanda_ext.prune_model(model, sparsity="50%", method="magnitude", progress=False)
    names = [unit.name for unit in pair_blocks(model, dense)[0].units]
    experts = [name for name in names if name.endswith("experts")]
    assert len(experts) == 1 and len(names) == 5
    found = block_errors(model, dense, pair_blocks(model, dense), batches_of_two(), progress=False)
    assert 0 < found[0].linears[experts[0]] < 1


def test_models_that_compute_otherwise_are_no_twins():
    model, dense = tiny_model(), tiny_model()
    dense.model.layers[1].mlp.act_fn = torch.nn.ReLU()  # of the same weights
    told = r"not of one architecture: model\.layers\.1\.mlp\.act_fn is SiLU.* and ReLU in dense"
    with pytest.raises(ValueError, match=told):
        pair_blocks(model, dense)
    with pytest.raises(ValueError, match="not of one architecture"):
        wanda_ext.repair(model, dense, token_ids())
