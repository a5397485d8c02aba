"""Blocks are pruned whole or not at all, whatever stops the work."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from tiny_models import changed, tiny_model, token_ids, weights_of

from wanda_ext.methods import Magnitude, Wanda
from wanda_ext.prune.prune import PruneError, prune_model

QUIET = {"swap": False, "progress": False}
UP = "model.layers.1.mlp.up_proj"


def assert_stopped_at_block_1(model, before, report):
    """Block 0 is pruned, blocks 1 and 2 are bit for bit as before, nothing else is left over."""
    touched = {
        name.partition(".mlp")[0].partition(".self_attn")[0] for name in changed(model, before)
    }
    assert touched == {"model.layers.0"}
    assert len(changed(model, before)) == len(report.pruned) == 7
    assert {line.name.rpartition(".")[0][:14] for line in report.linears} == {"model.layers.0"}
    assert report.status == "stopped at model.layers.1"
    assert report.peak_memory
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert model.training
    assert model.config.use_cache


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("linear", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_weights_that_are_not_finite_are_named(value, linear):
    model = tiny_model().train()
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.{linear}").weight[3, 5] = value
    before = weights_of(model)
    with pytest.raises(
        PruneError, match=rf"^model\.layers\.1: model\.layers\.1\.{linear}\.weight h"
    ) as e:
        prune_model(model, token_ids(), 0.5, **QUIET)
    assert_stopped_at_block_1(model, before, e.value.report)


def test_activations_that_are_not_finite_are_named():
    model = tiny_model().train()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = float("inf")
    before = weights_of(model)
    with pytest.raises(
        PruneError, match=r"activations enter model\.layers\.1\.mlp\.gate_proj"
    ) as e:
        prune_model(model, token_ids(), "2:4", **QUIET)
    assert_stopped_at_block_1(model, before, e.value.report)


def test_scores_that_overflow_are_named():
    model = tiny_model().train()
    with torch.no_grad():
        model.get_submodule(UP).weight[7, 1] = 3e38
        model.model.layers[1].post_attention_layernorm.weight.fill_(1e3)
    before = weights_of(model)
    with pytest.raises(
        PruneError, match=r"up_proj\.weight has a NaN or infinite score in row 7"
    ) as e:
        prune_model(model, token_ids(), "2:4", ignore="*.down_proj", **QUIET)
    report = e.value.report
    assert report.status == "stopped at model.layers.1"
    assert not [name for name in changed(model, before) if "layers.0" not in name]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("run", [2, 3, 5])  # of block 1: hooked passes, then plain ones
def test_interrupt_leaves_whole_blocks(stop, run):
    model = tiny_model().train()
    before = weights_of(model)
    runs = []

    def interrupt(module, args):
        runs.append(1)
        if len(runs) == run:
            raise stop

    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(stop) as caught:
        prune_model(model, token_ids(), 0.5, batch_size=3, **QUIET)
    handle.remove()
    assert_stopped_at_block_1(model, before, caught.value.report)


def test_failure_in_a_method_restores_the_block():
    class Failing(Magnitude):
        def prune_(self, weight, sparsity, inputs, bad):
            weight.zero_()
            if weight.shape == (64, 96) and len(runs) == 1:
                raise OSError("disk on fire")
            runs.extend([1] if weight.shape == (64, 96) else [])

    runs: list[int] = []
    model = tiny_model().train()
    before = weights_of(model)
    with pytest.raises(PruneError, match=r"^model\.layers\.1: disk on fire \(stopped") as caught:
        prune_model(model, None, 0.5, method=Failing(), **QUIET)
    assert isinstance(caught.value.__cause__, OSError)
    assert_stopped_at_block_1(model, before, caught.value.report)


def test_what_a_method_refuses_is_told_with_the_linear():
    class Refusing(Magnitude):
        def prune_(self, weight, sparsity, inputs, bad):
            raise ValueError("not today")

    model = tiny_model()
    before = weights_of(model)
    with pytest.raises(
        PruneError, match=r"^model\.layers\.0: model\.layers\.0\.self_attn\.q_proj: not t"
    ):
        prune_model(model, None, 0.5, method=Refusing(), **QUIET)
    assert changed(model, before) == []


def test_scores_are_of_the_weights_before_the_prune():
    class Doubling(Wanda):
        def prune_(self, weight, sparsity, inputs, bad):
            super().prune_(weight, sparsity, inputs, bad)
            weight.mul_(2)

    ours, theirs = (
        prune_model(
            tiny_model(), token_ids(), "2:4", method=method, ignore="*.layers.[12]", **QUIET
        )
        for method in (Wanda(), Doubling())
    )
    for one, two in zip(ours.pruned, theirs.pruned, strict=True):
        assert (one.score_kept, one.score_lost) == (two.score_kept, two.score_lost)
        assert one.score_lost > 0


def test_model_that_cannot_be_captured():
    model = tiny_model()
    model.model.embed_tokens.register_forward_hook(lambda *_: 1 / 0)
    before = weights_of(model)
    with pytest.raises(PruneError, match=r"^capture: division by zero.*no block is ch") as caught:
        prune_model(model, token_ids(), 0.5, **QUIET)
    assert caught.value.report.linears == []
    assert changed(model, before) == []


def test_interrupt_while_data_is_read_has_a_report_too():
    class Interrupted:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise KeyboardInterrupt

    model = tiny_model()
    loader = torch.utils.data.DataLoader(Interrupted())
    with pytest.raises(KeyboardInterrupt) as caught:
        prune_model(model, loader, 0.5, **QUIET)
    assert caught.value.report.status == "stopped at calibration"
    assert str(caught.value.report)


@pytest.mark.parametrize("n", [1, 9, 20])  # hooks of the probe, of the first and the second batch
def test_interrupt_between_two_hooks_leaves_none(n, monkeypatch):
    model = tiny_model().train()
    register, hooks = torch.nn.Module.register_forward_pre_hook, []

    def interrupt(module, *args, **kwargs):
        hooks.append(module)
        if len(hooks) == n:
            raise KeyboardInterrupt
        return register(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune_model(model, token_ids(), 0.5, batch_size=2, **QUIET)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_interrupt_on_the_way_to_eval_mode(monkeypatch):
    model = tiny_model().train()

    def interrupted(self):
        self.training = False
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "eval", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_model(model, token_ids(), 0.5, **QUIET)
    assert all(module.training for module in model.modules())


def test_failed_swap_says_that_the_blocks_are_pruned(monkeypatch):
    model = tiny_model()
    before = weights_of(model)
    monkeypatch.setattr("wanda_ext.prune.swap.swap_linears", lambda *_, **__: 1 / 0)
    with pytest.raises(PruneError, match=r"^swap: division.*\(stopped; all blocks are pruned\)$"):
        prune_model(model, token_ids(), "2:4", swap=True, progress=False)
    assert len(changed(model, before)) == 21


def test_training_flags_and_random_states_are_as_before():
    model = tiny_model().train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    loader = torch.utils.data.DataLoader(token_ids(), batch_size=2, shuffle=True)
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    seen = SimpleNamespace(training=None)
    model.register_forward_pre_hook(lambda m, _: setattr(seen, "training", m.training))
    prune_model(model, loader, 0.5, **QUIET)
    assert seen.training is False
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert not any(parameter.grad_fn for parameter in model.parameters())
