"""Sums of what linears and experts read: shared, masked, and ended early where nothing is lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wanda_ext.methods.statistic import InputStatistic
from wanda_ext.models.experts import FEW_TOKENS, ExpertSlice, expert_slices
from wanda_ext.runner.inputs import InputSums


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 4))
        self.act_fn = nn.SiLU()

    def forward(self, hidden, routes, weights):
        return hidden


def routed(*tokens):
    """Hidden states and routes with so many tokens for each expert."""
    routes = torch.cat([torch.full((n, 1), e) for e, n in enumerate(tokens)])
    return torch.randn(len(routes), 4), routes, torch.ones(len(routes), 1)


def test_experts_with_few_tokens_share_the_layers_mean():
    block = nn.ModuleDict({"experts": Experts()})
    targets = expert_slices(block)
    sums = InputSums(targets)
    hidden, routes, weights = routed(FEW_TOKENS, FEW_TOKENS - 1, 0)
    for half in (slice(0, 20), slice(20, None)):
        with sums.watching(None, ()):
            block["experts"](hidden[half], routes[half], weights[half])
    found = sums.result()
    assert list(found) == list(targets)
    own, few, none = (found[f"experts.{e}.gate_up_proj"] for e in range(3))
    assert [s.tokens for s in (own, few, none)] == [FEW_TOKENS, FEW_TOKENS - 1, 0]
    assert [s.of_layer for s in (own, few, none)] == [False, True, True]
    square = hidden.double().square()
    torch.testing.assert_close(own.sumsq, square[:FEW_TOKENS].sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(few.sumsq, square.mean(0) * (FEW_TOKENS - 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(none.sumsq, square.mean(0), rtol=1e-6, atol=0)


def test_experts_that_are_never_called_are_absent():
    block = nn.ModuleDict({"experts": Experts()})
    sums = InputSums(expert_slices(block))
    with sums.watching(None, ()):
        pass
    assert sums.result() == {}
    with sums.watching(torch.zeros(1, 5, dtype=torch.bool), ()):
        block["experts"](*routed(2, 2, 1))  # of which none counts
    assert sums.result() == {}


def test_some_experts_only():
    block = nn.ModuleDict({"experts": Experts()})
    targets = {n: s for n, s in expert_slices(block).items() if n.endswith("1.down_proj")}
    assert [type(s) for s in targets.values()] == [ExpertSlice]
    sums = InputSums(targets)
    with sums.watching(None, ()):
        block["experts"](*routed(40, 3, 40))
    found = sums.result()
    assert list(found) == ["experts.1.down_proj"]
    assert found["experts.1.down_proj"].tokens == 3
    assert found["experts.1.down_proj"].of_layer  # with those of the experts that are no targets


def test_a_pass_ends_only_where_all_have_read():
    linears = nn.ModuleDict({name: nn.Linear(4, 4) for name in "ab"})
    experts = Experts()
    block = nn.ModuleDict({"linears": linears, "experts": experts})
    targets = {**{f"linears.{n}": m for n, m in linears.items()}, **expert_slices(block)}
    x, ended = routed(1, 1, 1), []

    def run():
        linears["a"](x[0])
        experts(*x)
        ended.append("experts")
        linears["b"](x[0])
        ended.append("all")

    sums = InputSums(targets)
    order = ["linears", "linears.a", "experts", "linears.b"]
    for known, expected in (([], 2), (order, 1), (order[:3], 2), ([*order, "experts"], 2)):
        ended.clear()
        with sums.watching(None, known) as called:
            run()
        assert len(ended) == expected
        assert called == ["linears.a", "experts", "linears.b"]
    assert sums.result()["linears.a"].tokens == 4 * 3


def test_masks_that_do_not_fit_are_named():
    block = nn.ModuleDict({"experts": Experts(), "fc": nn.Linear(4, 4)})
    sums = InputSums({"fc": block["fc"], **expert_slices(block)})
    with sums.watching(torch.ones(2, 4, dtype=torch.bool), ()):
        with pytest.raises(RuntimeError, match="experts reads 5 tokens where the attention_mask h"):
            block["experts"](*routed(2, 2, 1))
        with pytest.raises(RuntimeError, match="fc reads 3 tokens where the attention_mask has 8"):
            block["fc"](torch.randn(3, 4))


def test_other_exceptions_pass_and_leave_no_hook():
    linear = nn.Linear(4, 4)
    sums = InputSums({"fc": linear})
    with pytest.raises(ZeroDivisionError), sums.watching(None, ()):
        raise ZeroDivisionError
    assert not linear._forward_pre_hooks
    with sums.watching(None, ["fc"]):
        linear(torch.ones(2, 4))
        raise AssertionError("the pass goes on after its last linear")


def test_sums_of_other_processes_come_in_order():
    linear = nn.Linear(2, 2)
    asked = []

    def share(own):
        asked.append(own and own["fc"].tokens)
        others = {"fc": InputStatistic(torch.tensor([1e-20, 1.0], dtype=torch.float64), 7)}
        return [[others, own], [own], [others], []][len(asked) - 1]

    sums = InputSums({"fc": linear}, share)
    for rows in (3, 4):
        with sums.watching(None, ()):
            linear(torch.ones(rows, 2))
    found = sums.result()["fc"]
    assert asked == [3, 4, None, None]
    assert found.tokens == 21
    assert found.sumsq.tolist() == [7.0, 9.0]


def test_grams_are_shared_by_those_that_read_one_tensor():
    linears = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcd"})
    x, keep = torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    keep[1, 3:] = False
    sums = InputSums(linears, gram=True)
    for number, mask in enumerate((None, keep)):
        with sums.watching(mask, ()):
            for name in "ab":
                linears[name](x)
            linears["c"](x if number else x + 1)  # of its own in one batch
            linears["d"](x)
            linears["d"](x)
    found = sums.result()
    rows = torch.cat([x.reshape(-1, 4), x[keep]])
    assert found["a"] is found["b"]
    torch.testing.assert_close(found["a"].gram, rows.t() @ rows)
    torch.testing.assert_close(found["a"].gram.diagonal(), found["a"].sumsq.float())
    torch.testing.assert_close(found["d"].gram, 2 * (rows.t() @ rows))
    other = torch.cat([x.reshape(-1, 4) + 1, x[keep]])
    torch.testing.assert_close(found["c"].gram, other.t() @ other)
    without = InputSums(linears)
    with without.watching(None, ()):
        linears["a"](x)
    assert without.result()["a"].gram is None


def test_experts_with_few_tokens_share_the_layers_gram():
    block = nn.ModuleDict({"experts": Experts()})
    sums = InputSums(expert_slices(block), gram=True)
    hidden, routes, weights = routed(FEW_TOKENS, 2, 0)
    with sums.watching(None, ()):
        block["experts"](hidden, routes, weights)
    found = sums.result()
    own, few, none = (found[f"experts.{e}.gate_up_proj"] for e in range(3))
    torch.testing.assert_close(own.gram, hidden[:FEW_TOKENS].t() @ hidden[:FEW_TOKENS])
    torch.testing.assert_close(few.gram, hidden.t() @ hidden)
    assert few.gram is none.gram
