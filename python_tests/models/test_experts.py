"""Fused experts: recognised by what they hold, and pruned expert by expert."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from tiny_models import changed, token_ids, weights_of
from torch import nn

from wanda_ext.models.blocks import dense_weight, find_blocks, weight_shape
from wanda_ext.models.experts import FEW_TOKENS, expert_slices, layout_of, reads, tokens_read
from wanda_ext.prune.prune import PruneError, prune_model
from wanda_ext.prune.verify import verify

QUIET = {"swap": False, "progress": False}
CPU = torch.device("cpu")


def experts_of(model, index=1):
    block = find_blocks(model)[index][1]
    path, module = next((n, m) for n, m in block.named_modules() if layout_of(m))
    return f"{find_blocks(model)[index][0]}.{path}", module


class Experts(nn.Module):
    """Four experts of width 8 -> 12 -> 8, in any layout."""

    def __init__(self, transposed=False, gated=True, bias=False) -> None:
        super().__init__()
        up, down = (12 * (1 + gated), 8), (8, 12)
        if transposed:
            up, down = up[::-1], down[::-1]
        name = "gate_up_proj" if gated else "up_proj"
        setattr(self, name, nn.Parameter(torch.randn(4, *up)))
        self.down_proj = nn.Parameter(torch.randn(4, *down))
        if bias:
            setattr(self, f"{name}_bias", nn.Parameter(torch.randn(4, 12 * (1 + gated))))
        self.act_fn = nn.SiLU()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_layouts_are_told_from_the_shapes(transposed, gated):
    experts = Experts(transposed, gated)
    if not gated:
        experts.is_transposed = transposed  # both fit the shapes [12, 8] and [8, 12]
    layout = layout_of(experts)
    name = "gate_up_proj" if gated else "up_proj"
    assert (layout.up, layout.experts, layout.transposed, layout.gated) == (
        *(name, 4),
        *(transposed, gated),
    )
    slices = expert_slices(nn.ModuleDict({"experts": experts}))
    assert list(slices)[:3] == [f"experts.0.{name}", "experts.0.down_proj", f"experts.1.{name}"]
    assert weight_shape(slices[f"experts.3.{name}"]) == (12 * (1 + gated), 8)
    assert weight_shape(slices["experts.3.down_proj"]) == (8, 12)
    with dense_weight(slices["experts.2.down_proj"], CPU) as weight:
        weight[:, 0] = 0
    stored = experts.down_proj.detach().transpose(1, 2) if transposed else experts.down_proj
    assert [not part[:, 0].any() for part in stored] == [False, False, True, False]


def test_other_modules_are_no_experts():
    class Other(Experts):
        pass

    assert layout_of(nn.Linear(4, 4)) is None
    for damage in ("act_fn", "down_proj"):
        other = Other()
        delattr(other, damage)
        assert layout_of(other) is None
    other = Other()
    other.down_proj = nn.Parameter(torch.randn(4, 8, 13))  # does not fit
    assert layout_of(other) is None
    other.down_proj = nn.Parameter(torch.randn(5, 8, 12))  # has no input for one
    assert layout_of(other) is None
    other.down_proj = nn.Parameter(torch.randn(3, 8, 12))  # the fourth is not used
    assert layout_of(other).experts == 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_each_expert_reads_the_tokens_routed_to_it(transposed, bias):
    experts = Experts(transposed, bias=bias)
    hidden = torch.randn(6, 8)
    routes = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1], [1, 0], [2, 4]])  # 4: to no expert here
    keep = torch.tensor([True, True, True, False, True, True])
    assert tokens_read(experts, (hidden, routes)) == 6
    found = {(e, name): rows for e, name, rows in reads(experts, (hidden, routes, None), keep)}
    assert found.keys() == {(e, n) for e in range(3) for n in ("gate_up_proj", "down_proj")}
    for expert, tokens in ((0, [0, 2, 4]), (1, [0, 1, 4]), (2, [1, 2, 5])):
        rows = hidden[tokens]
        assert torch.equal(found[expert, "gate_up_proj"], rows)
        weight = experts.gate_up_proj[expert].detach()
        out = rows @ (weight if transposed else weight.T)
        if bias:
            out = out + experts.gate_up_proj_bias[expert].detach()
        inner = out[:, 12:] * nn.functional.silu(out[:, :12])
        torch.testing.assert_close(found[expert, "down_proj"], inner)


def test_parts_for_each_expert_instead_of_routes():
    experts = Experts()
    parts = torch.randn(4, 5, 8)
    parts[0, 1:] = 0  # a token that goes elsewhere is zero
    keep = torch.tensor([True, False, True, True, True])
    assert tokens_read(experts, (parts.flatten(0, 1),)) == 5
    found = {(e, n): rows for e, n, rows in reads(experts, (parts.flatten(0, 1),), keep)}
    assert torch.equal(found[0, "gate_up_proj"], parts[0, :1])
    assert torch.equal(found[3, "gate_up_proj"], parts[3, keep])


@pytest.mark.parametrize("row", ["mixtral", "gpt_oss", "llama4"])
def test_experts_are_pruned_slice_by_slice(row):
    model = families.build(row, "eager")
    report = prune_model(model, token_ids(8), "2:4", **QUIET)
    path, module = experts_of(model)
    lines = {line.name: line for line in report.linears if line.name.startswith(path)}
    assert list(lines) == [f"{path}.{name}" for name in expert_slices(module)]
    assert {line.status for line in lines.values()} == {"pruned"}
    for target in expert_slices(module).values():
        with dense_weight(target, CPU) as weight:
            assert int((weight.unflatten(1, (-1, 4)) != 0).sum(2).max()) == 2
    assert verify(model, report).ok
    with torch.no_grad():
        module.down_proj[0] = 1
    assert not verify(model, report).ok


def test_few_token_experts_are_named():
    model = families.build("mixtral")
    with torch.no_grad():  # expert 3 gets no token, the others do
        gate = model.model.layers[1].mlp.gate
        gate.weight.zero_()
        gate.weight[:3] = torch.randn(3, 32)
        gate.weight[3] = 0
        model.model.layers[1].mlp.gate.register_forward_hook(no_expert_3)
    report = prune_model(model, token_ids(8), 0.5, **QUIET)
    path, _ = experts_of(model)
    lines = {line.name: line for line in report.linears}
    for weight in ("gate_up_proj", "down_proj"):
        line = lines[f"{path}.3.{weight}"]
        assert (line.tokens, line.reached, line.status) == (0, 0.5, "pruned")
        assert line.note == "few tokens: norms of all experts"
        most = max((lines[f"{path}.{e}.{weight}"] for e in range(3)), key=lambda one: one.tokens)
        assert most.tokens >= FEW_TOKENS and most.note == ""
    assert "few tokens" in str(report)


def no_expert_3(module, args, out):
    logits, weights, index = out
    return logits, weights, index.where(index != 3, 0)


def test_experts_are_chosen_by_globs():
    model = families.build("qwen3_moe")
    before = weights_of(model)
    path, module = experts_of(model)
    spec = {"*.experts.*.down_proj": "2:4", "*.experts.0": 0.25}
    report = prune_model(model, token_ids(8), spec, ignore="*.experts.2", **QUIET)
    lines = {line.name: line for line in report.linears}
    assert lines[f"{path}.1.down_proj"].asked == "2:4"
    assert lines[f"{path}.1.gate_up_proj"].status == "left dense"
    assert lines[f"{path}.0.gate_up_proj"].asked == "25%"
    assert lines[f"{path}.2.down_proj"].status == "ignored"
    old = before[f"{path}.down_proj"]
    assert [torch.equal(a, b) for a, b in zip(module.down_proj, old, strict=True)] == [
        *(False, False),
        *(True, False),
    ]


def test_a_block_that_fails_restores_its_experts():
    model = families.build("mixtral")
    with torch.no_grad():
        experts_of(model)[1].down_proj[2, 1, 3] = float("nan")
    before = weights_of(model)
    with pytest.raises(PruneError, match=r"^model\.layers\.1: .*NaN"):
        prune_model(model, token_ids(8), 0.5, **QUIET)
    assert {name.split(".")[2] for name in changed(model, before)} == {"0"}


def test_swap_leaves_experts_dense():
    model = families.build("mixtral")
    twin = copy.deepcopy(model)
    report = prune_model(model, token_ids(8), "2:4", swap=True, progress=False)
    assert report.swap.startswith("swapped 12 of 12 linears")
    assert isinstance(experts_of(model)[1].down_proj, nn.Parameter)
    only = {"*.experts": "2:4"}
    with pytest.raises(ValueError, match="fused experts stay dense"):
        prune_model(twin, token_ids(8), only, swap=True, progress=False)
