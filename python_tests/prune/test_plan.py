"""Which linears are pruned to what, and why others stay."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Block, Toy, changed, tiny_model, token_ids, weights_of
from torch import nn

from wanda_ext.methods.sparsity import parse_sparsity
from wanda_ext.models.blocks import linears_of
from wanda_ext.prune.plan import PlannedBlock, PlannedLinear, check_packable
from wanda_ext.prune.prune import prune_model

QUIET = {"swap": False, "progress": False}
UP = "model.layers.1.mlp.up_proj"


def test_sparsity_by_module_and_ignore():
    model = tiny_model()
    before = weights_of(model)
    spec = {"*.mlp.*": "2:4", "*.q_proj": 0.25}
    report = prune_model(
        model, token_ids(), spec, ignore=["*.down_proj", "model.layers.0"], **QUIET
    )
    lines = {line.name: line for line in report.linears}
    assert lines["model.layers.0.mlp.up_proj"].status == "ignored"
    assert lines["model.layers.1.mlp.down_proj"].status == "ignored"
    assert lines["model.layers.1.self_attn.k_proj"].status == "left dense"
    assert lines[UP].reached == 0.5
    assert lines["model.layers.1.self_attn.q_proj"].asked == "25%"
    assert set(changed(model, before)) == {f"{line.name}.weight" for line in report.pruned}
    assert len(report.pruned) == 2 * 3
    only = prune_model(tiny_model(), token_ids(), 0.5, ignore="*.mlp.*", **QUIET)
    assert len(only.pruned) == 3 * 4


def test_shared_weights_are_pruned_once():
    model = tiny_model()
    first, last = model.model.layers[0].mlp.up_proj, model.model.layers[2].mlp.up_proj
    last.weight = first.weight
    report = prune_model(model, token_ids(), 0.5, **QUIET)
    lines = {line.name: line for line in report.linears}
    assert lines["model.layers.2.mlp.up_proj"].status == (
        "shares the weight of model.layers.0.mlp.up_proj"
    )
    assert float((first.weight == 0).float().mean()) == 0.5


def test_linears_that_are_never_called_are_reported():
    model = tiny_model()
    model.model.layers[1].idle = nn.Linear(16, 16)
    before = weights_of(model)
    report = prune_model(model, token_ids(), 0.5, **QUIET)
    line = next(line for line in report.linears if line.name.endswith("idle"))
    assert (line.status, line.reached) == ("never called", 0.0)
    assert "model.layers.1.idle.weight" not in changed(model, before)
    assert "never called" in str(report)


def test_what_cannot_be_packed_is_refused_before_any_block():
    model = tiny_model()
    before = weights_of(model)
    for linear in linears_of(model).values():  # as if another program watched them
        linear.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"no linear can be packed \(.*q_proj: carries hooks"):
        prune_model(model, token_ids(), "2:4", swap=True)
    assert changed(model, before) == []
    narrow = Toy([Block()])
    with pytest.raises(
        ValueError, match=r"linears\.a: a bitmap of \[.*\] takes 4368 bytes, dense 2"
    ):
        prune_model(narrow, token_ids(), "2:4", blocks="blocks", swap=True)


@pytest.mark.parametrize(
    ("sparsity", "told"),
    [
        ("16:32", r"self_attn\.q_proj: a bitmap of \[64, 64\] takes 17424 bytes, dense 16384"),
        (0.5, r"self_attn\.q_proj: a bitmap of \[64, 64\] takes 18542 bytes, dense 16384"),
        ("3:4", r"self_attn\.q_proj becomes 3:4: prune more, or do not ask for packing"),
        ({"*.q_proj": "2:4", "*.up_proj": 0.2}, r"up_proj becomes 20%: prune more"),
    ],
)
def test_patterns_that_cannot_be_packed_are_refused_before_any_block(sparsity, told):
    model = tiny_model()
    before = weights_of(model)
    with pytest.raises(ValueError, match=told):
        prune_model(model, token_ids(), sparsity, swap=True, ignore="*.down_proj", progress=False)
    assert changed(model, before) == []


@pytest.mark.parametrize(
    ("shape", "sparsity", "told"),
    [
        (
            (512, 160),
            0.31,
            "a bitmap of .512, 160. takes ",
        ),  # the surplus is what makes it too large
        ((512, 160), 0.69, ""),
        ((16, 70000), 0.5, "its 70000 columns are over 65536"),
        ((16, 70000), "8:16", ""),
        ((16, 70016), "2:4", ""),
    ],
)
def test_what_a_surplus_forbids_is_known_before(shape, sparsity, told):
    n, k = shape
    block = nn.Module()
    block.linear = nn.Linear(k, n, dtype=torch.bfloat16, device="meta")
    linear = PlannedLinear("linear", block.linear, parse_sparsity(sparsity), "planned")
    plan = [PlannedBlock("block", block, {"linear": linear})]
    if told:
        with pytest.raises(ValueError, match=rf"no linear can be packed \(linear: {told}"):
            check_packable(block, plan)
    else:
        check_packable(block, plan)


def test_one_linear_that_can_be_packed_is_enough():
    model = tiny_model()
    sparsity = {"*.q_proj": "2:4", "*.up_proj": "16:32"}
    report = prune_model(model, token_ids(), sparsity, swap=True, progress=False)
    assert report.swap.startswith("swapped 3 of 6 linears for packed ones; ")
    assert report.swap.endswith(
        "up_proj and 2 more: not 2:4; a bitmap would take 106% of its bytes"
    )


def test_weights_are_checked_before_any_block():
    model = tiny_model()
    model.model.layers[2].mlp.up_proj.to(torch.float64)
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight is float64"):
        prune_model(model, token_ids(), 0.5, **QUIET)
    assert changed(model, before) == []
    model.config.quantization_config = {"quant_method": "gptq"}
    model.model.layers[1].mlp.up_proj.register_buffer("scales", torch.ones(1))
    with pytest.raises(ValueError, match=r"quantized \(gptq: .*up_proj\)"):
        prune_model(model, token_ids(), 0.5, **QUIET)
