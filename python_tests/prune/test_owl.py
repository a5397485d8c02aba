"""Outlier-weighted ratios: the paper's formula, and what prune_model makes of it."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from tiny_models import assert_same_masks, changed, tiny_model, token_ids, weights_of
from torch import nn

from wanda_ext.methods.sparsity import Owl, Unstructured, parse_sparsity
from wanda_ext.methods.statistic import InputStatistic
from wanda_ext.models.blocks import find_blocks, linears_of
from wanda_ext.prune.owl import Outliers, count_outliers
from wanda_ext.prune.prune import PruneError, prune_model

QUIET = {"swap": False, "progress": False}


@torch.no_grad()
def plain_ratios(model, ids, ratio, lam, m):
    """One forward of the dense model; each block's share of scores over m times their mean."""
    shares = []
    inputs = {}

    def see(module, args):
        inputs[module] = args[0].reshape(-1, args[0].shape[-1])

    hooks = [linear.register_forward_pre_hook(see) for linear in linears_of(model).values()]
    model(ids)
    for hook in hooks:
        hook.remove()
    for _, block in find_blocks(model):
        scores = torch.cat(
            [
                (linear.weight.abs() * inputs[linear].norm(dim=0)).flatten()
                for linear in linears_of(block).values()
            ]
        )
        shares.append(float((scores > m * scores.mean()).double().mean()))
    shares = torch.tensor(shares, dtype=torch.float64)
    more = (shares - shares.min()) * (1 / (shares.max() - shares.min()) * lam * 2)
    return (1 - (more - more.mean() + (1 - ratio))).tolist()


def test_ratios_are_those_of_the_paper():
    model = tiny_model()
    twin = copy.deepcopy(model)
    expected = plain_ratios(model, token_ids(), 0.6, 0.1, 3.0)
    report = prune_model(model, token_ids(), Owl(0.6, lam=0.1, m=3.0), batch_size=3, **QUIET)
    asked = [line.asked for line in report.linears[::7]]
    got = [float(text.rstrip("%")) / 100 for text in asked]
    assert got == pytest.approx(expected, abs=1e-8)
    assert max(got) - min(got) == pytest.approx(0.2)
    assert sum(got) / 3 == pytest.approx(0.6)  # the blocks have equally many weights
    assert report.sparsity == pytest.approx(0.6, abs=0.01)  # rows are cut to whole weights
    assert "Owl(0.6, lam=0.1, m=3.0)" in report.arguments["sparsity"]
    by_block = {f"model.layers.{i}": ratio for i, ratio in enumerate(got)}
    prune_model(twin, token_ids(), by_block, batch_size=3, **QUIET)
    assert_same_masks(model, twin)


def test_the_mean_is_over_weights_and_only_over_those():
    model = families.build("qwen3_moe")
    spec = {"*.experts": Owl(0.5, lam=0.2, m=2.0), "*.self_attn": "2:4"}
    report = prune_model(model, token_ids(8), spec, **QUIET)
    ours = [line for line in report.pruned if "experts" in line.name]
    weights = sum(line.weights for line in ours)
    mean = sum(float(line.asked.rstrip("%")) * line.weights for line in ours) / weights
    assert mean == pytest.approx(50)
    assert {line.asked for line in report.pruned if "self_attn" in line.name} == {"2:4"}
    assert len({line.asked for line in ours}) == 3
    uneven = tiny_model()
    uneven.model.layers[0].mlp = nn.Identity()
    report = prune_model(uneven, token_ids(), Owl(0.5, lam=0.2, m=2.0), **QUIET)
    weights = sum(line.weights for line in report.pruned)
    mean = sum(float(line.asked.rstrip("%")) * line.weights for line in report.pruned) / weights
    assert mean == pytest.approx(50)


@pytest.mark.parametrize("row", ["llama", "mixtral", "gpt_oss", "gemma3n"])
def test_a_device_changes_nothing_but_the_place(row, monkeypatch):
    """device="cpu" counts as another place than the model's here, so that all goes by copies."""
    monkeypatch.setattr("wanda_ext.prune.prune.usable_device", lambda device: torch.device("cpu:0"))
    results = []
    for device in (None, "cpu"):
        model = families.build(row, "eager")
        prune_model(model, token_ids(6), Owl(0.5, m=3.0), device=device, batch_size=2, **QUIET)
        results.append(weights_of(model))
    for name, weight in results[0].items():
        assert torch.equal(weight, results[1][name]), name


def test_other_methods_use_the_ratios_too():
    model, twin = tiny_model(), tiny_model()
    owl = prune_model(model, token_ids(), Owl(0.5, m=3.0), method="magnitude", **QUIET)
    wanda = prune_model(twin, token_ids(), Owl(0.5, m=3.0), **QUIET)
    assert [line.asked for line in owl.linears] == [line.asked for line in wanda.linears]
    assert owl.pruned[0].tokens == 0


def test_no_lam_and_no_difference_are_uniform():
    model, twin = tiny_model(), tiny_model()
    prune_model(model, token_ids(), Owl(0.5, lam=0), **QUIET)
    prune_model(twin, token_ids(), 0.5, **QUIET)
    assert_same_masks(model, twin)
    report = prune_model(tiny_model(), token_ids(), Owl(0.5, m=1e6), **QUIET)  # no outlier at all
    assert {line.asked for line in report.linears} == {"50%"}


def test_ratio_that_leaves_its_range_is_refused_before_any_block():
    model = tiny_model()
    before = weights_of(model)
    with pytest.raises(PruneError, match=r"would prune 1\d\d\.\d% of model\.layers\.\d: pass a sm"):
        prune_model(model, token_ids(), Owl(0.95, lam=0.4, m=3.0), **QUIET)
    assert changed(model, before) == []


def test_outliers_are_counted_over_all_linears_together():
    small, large = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        small.weight.fill_(1)
        small.weight[1, 2] = -10
        large.weight.fill_(2)
    found = {
        "small": InputStatistic(torch.ones(4, dtype=torch.float64), 5),
        "large": InputStatistic(torch.tensor([1.0, 16.0], dtype=torch.float64), 5),
    }
    targets = {"small": small, "large": large, "never called": nn.Linear(7, 7)}
    # scores: 7 of 1, 1 of 10, 3 of 2, 3 of 8; their mean is 47 / 14
    assert count_outliers(targets, found, 2.0) == Outliers(4, 14)
    assert count_outliers(targets, found, 2.5) == Outliers(1, 14)


def test_owl_is_checked_and_is_a_sparsity():
    assert parse_sparsity(Owl(0.7)) == Owl(0.7, lam=0.08, m=5.0)
    assert Owl(0.7).keep_fraction == pytest.approx(Unstructured(0.7).keep_fraction)
    for wrong in ({"ratio": 1.0}, {"ratio": 0.5, "lam": -0.1}, {"ratio": 0.5, "m": 0}):
        with pytest.raises(ValueError, match=r"from 0 up to|Owl needs"):
            Owl(**wrong)
