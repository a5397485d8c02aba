"""prune_model with an update: nearer to the dense model, exact masks, and whole blocks."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from tiny_models import FAMILIES, Toy, changed, padded_batches, tiny_model, token_ids
from tiny_models import weights_of as tensors_of
from torch import nn

from wanda_ext.methods import Corrected, Magnitude, SparseGPT, Wanda
from wanda_ext.prune.prune import PruneError, prune_model
from wanda_ext.prune.verify import verify

QUIET = {"swap": False, "progress": False}


def error(model, dense, ids=None):
    """Of the logits, relative."""
    ids = token_ids(seed=2) if ids is None else ids
    with torch.no_grad():
        wanted = dense(ids).logits
        return float((model(ids).logits - wanted).norm() / wanted.norm())


# --- Quality --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_come_nearer_to_the_dense_model(family):
    dense = tiny_model(family)
    plain, updated = copy.deepcopy(dense), copy.deepcopy(dense)
    ids = token_ids(16)
    prune_model(plain, ids, "2:4", **QUIET)
    report = prune_model(updated, ids, "2:4", update="corrected", **QUIET)
    verify(updated, report).raise_if_bad()
    assert report.sparsity == 0.5
    assert error(updated, dense) < 0.9 * error(plain, dense)
    assert report.arguments["update"] == "Corrected(ridge=0.1, damping=0.01, steps=20)"
    assert {line.note for line in report.pruned} == {""}
    assert {line.tokens for line in report.pruned} == {16 * 31}  # all but the first of each window


@pytest.mark.parametrize("method", [Wanda(), Magnitude(), SparseGPT()], ids=repr)
@pytest.mark.parametrize("sparsity", ["2:4", "16:32", "50%"])
def test_every_method_takes_it_and_keeps_its_pattern(method, sparsity):
    dense = tiny_model(dtype=torch.bfloat16)
    plain, updated = copy.deepcopy(dense), copy.deepcopy(dense)
    ids = token_ids(16)
    prune_model(plain, ids, sparsity, method=method, **QUIET)
    report = prune_model(updated, ids, sparsity, method=method, update="corrected", **QUIET)
    verify(updated, report).raise_if_bad()
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert error(updated, dense) < error(plain, dense)


class Layer(nn.Module):
    """One linear, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, hidden, options):
        return self.linear(hidden)


def test_a_block_undoes_what_the_one_before_it_did():
    """Where nothing of the second block goes, it can put out exactly what it did: W2 W1 V1^-1."""
    torch.manual_seed(0)
    model = Toy([Layer(), Layer()])
    dense = copy.deepcopy(model)
    prune_model(
        model,
        token_ids(16),
        {"blocks.0.*": "6:8", "blocks.1.*": "8:8"},
        update=Corrected(ridge=1e-6),
        blocks="blocks",
        **QUIET,
    )
    first, second = (block.linear.weight.detach().double() for block in model.blocks)
    was = [block.linear.weight.detach().double() for block in dense.blocks]
    expected = was[1] @ was[0] @ torch.linalg.inv(first)
    torch.testing.assert_close(second, expected, rtol=1e-2, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids()), dense(token_ids()), rtol=0, atol=1e-3)


def test_the_first_token_of_a_window_has_no_say():
    ids = token_ids(16)
    others = ids.clone()
    others[:, 0] = 7
    models = []
    for calib in (ids, others):
        torch.manual_seed(0)
        model = Toy([Layer(), Layer()])  # without attention no token sees another
        prune_model(model, calib, "2:4", update="corrected", blocks="blocks", **QUIET)
        models.append(model)
    assert changed(models[0], tensors_of(models[1])) == []


# --- The same bits --------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_bits():
    models = [tiny_model(dtype=torch.bfloat16) for _ in range(2)]
    for model in models:
        prune_model(model, padded_batches(), "2:4", update="corrected", **QUIET)
    assert changed(models[0], tensors_of(models[1])) == []


def test_models_in_lock_step_become_the_same(monkeypatch):
    alone, together = tiny_model(), tiny_model()
    prune_model(alone, token_ids(), "2:4", update="corrected", **QUIET)
    monkeypatch.setattr("wanda_ext.runner.lockstep.Walk", lambda *_: _raise_glue())
    report = prune_model(together, token_ids(), "2:4", update="corrected", **QUIET)
    assert "in lock-step" in report.runner
    assert changed(together, tensors_of(alone)) == []


def _raise_glue():
    from wanda_ext.runner.capture import GlueError

    raise GlueError("as the test wants it")


# --- Experts --------------------------------------------------------------------------------------


def test_experts_keep_their_own_target_and_the_report_says_so():
    dense = families.build("qwen3_moe")
    plain, updated = copy.deepcopy(dense), copy.deepcopy(dense)
    ids = token_ids(16)
    prune_model(plain, ids, "2:4", **QUIET)
    report = prune_model(updated, ids, "2:4", update="corrected", **QUIET)
    verify(updated, report).raise_if_bad()
    assert error(updated, dense) < error(plain, dense)
    for line in report.pruned:
        told = "target not corrected: not called with every token" in line.note
        assert told == ("experts" in line.name), line


@pytest.mark.parametrize("row", ["gemma3n", "gemma4", "gpt_oss", "qwen3_next", "rwkv"])
def test_odd_families(row):
    model = families.build(row) or families.build(row, "eager")
    report = prune_model(model, token_ids(4, 24), "50%", update="corrected", **QUIET)
    verify(model, report).raise_if_bad()
    noted = {line.name for line in report.pruned if line.note}
    assert len(noted) < len(report.pruned)
    if row == "rwkv":
        assert "in lock-step" in report.runner


# --- Refusals and stops ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "kind", "match"),
    [
        ("correct", ValueError, "there is no update 'correct'"),
        (Corrected, TypeError, "update must be None, a name"),
        (1, TypeError, "update must be None, a name"),
    ],
)
def test_bad_updates_are_refused_before_any_work(update, kind, match):
    model = tiny_model()
    before = tensors_of(model)
    with pytest.raises(kind, match=match):
        prune_model(model, token_ids(), "2:4", update=update, **QUIET)
    assert changed(model, before) == []


def test_magnitude_takes_data_with_it():
    with pytest.raises(TypeError, match="calib must be"):
        prune_model(tiny_model(), None, "2:4", method="magnitude", update="corrected", **QUIET)


def test_weights_that_blocks_share_are_refused_by_name():
    model = Toy([Layer(), Layer(), Layer()])
    model.blocks[2].linear.weight = model.blocks[0].linear.weight
    prune_model(copy.deepcopy(model), token_ids(), "2:4", blocks="blocks", **QUIET)
    call = {"update": "corrected", "blocks": "blocks", **QUIET}
    with pytest.raises(ValueError, match=r"^blocks\.0\.linear shares its weight with blocks\.2"):
        prune_model(model, token_ids(), "2:4", **call)
    prune_model(model, token_ids(), "2:4", ignore="blocks.0.*", **call)


@pytest.mark.parametrize("linear", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_weights_that_are_not_finite_are_named(linear):
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.{linear}").weight[3, 5] = float("nan")
    before = tensors_of(model)
    with pytest.raises(PruneError, match=rf"^model\.layers\.1: model\.layers\.1\.{linear}\.weight"):
        prune_model(model, token_ids(), 0.5, update="corrected", **QUIET)
    assert all("layers.0" in name for name in changed(model, before))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("run", [1, 2, 4, 7])  # of o_proj in block 1: dense, then pruned passes
def test_what_stops_a_block_leaves_it_whole(stop, run):
    model = tiny_model().train()
    before, runs = tensors_of(model), []

    def interrupt(module, args):
        runs.append(1)
        if len(runs) == run:
            raise stop

    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(interrupt)
    expected = PruneError if stop is ZeroDivisionError else stop
    with pytest.raises(expected) as caught:
        prune_model(model, token_ids(), 0.5, batch_size=2, update="corrected", **QUIET)
    handle.remove()
    assert len(runs) == run
    report = caught.value.report
    assert report.status == "stopped at model.layers.1" and len(report.pruned) == 7
    assert len(changed(model, before)) == 7
    assert all("layers.0" in name for name in changed(model, before))
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
    assert model.training
