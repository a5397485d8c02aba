"""Models that are compiled in whole or in part, and linears that run without being called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from tiny_models import assert_same_masks, changed, tiny_model, token_ids, weights_of
from torch import nn

from wanda_ext.prune import prune_model
from wanda_ext.prune.commit import UNSEEN
from wanda_ext.runner.eager import reads_of, uncompiled

QUIET = {"swap": False, "progress": False}


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> None:
    """Else what other tests have compiled of the same classes counts towards dynamo's limit."""
    torch.compiler.reset()


def each_block(model: nn.Module) -> None:
    for block in model.model.layers:
        block.compile(backend="eager")


def each_block_wrapped(model: nn.Module) -> None:
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")


def each_mlp_forward(model: nn.Module) -> None:
    for block in model.model.layers:
        block.mlp.forward = torch.compile(block.mlp.forward, backend="eager")


def each_linear(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.compile(backend="eager")


def whole(model: nn.Module) -> None:
    model.compile(backend="eager")


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(
    "compile_", [each_block, each_block_wrapped, each_mlp_forward, each_linear, whole]
)
def test_a_compiled_model_gets_the_masks_of_the_plain_one(
    compile_: Callable[[nn.Module], None], used: bool
) -> None:
    plain, model = tiny_model(), tiny_model()
    compile_(model)
    if used:  # code that was compiled before any hook was there
        model(token_ids(1))
    prune_model(plain, token_ids(), "2:4", **QUIET)
    report = prune_model(model, token_ids(), "2:4", **QUIET)
    assert len(report.pruned) == len(report.linears) == 21
    named = {name.replace("_orig_mod.", ""): w for name, w in model.state_dict().items()}
    clean = tiny_model()
    clean.load_state_dict(named)
    assert_same_masks(clean, plain)


def test_what_was_compiled_is_compiled_again_after() -> None:
    model = tiny_model()
    seen = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        seen.append(graph)
        return graph.forward

    model.model.layers[0].compile(backend=backend)
    prune_model(model, token_ids(), "2:4", **QUIET)
    assert not seen
    model(token_ids(1))
    assert seen


def test_errors_leave_the_stance_as_it_was() -> None:
    @uncompiled
    def fail() -> None:
        raise KeyError("x")

    double = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
    with pytest.raises(KeyError):
        fail()
    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))


# --- Linears that are read without being called ---------------------------------------------------


class Direct(nn.Module):
    """Takes an MLP's place and reads the weights itself, as fused kernels do."""

    def __init__(self, mlp: nn.Module, read: Callable[[nn.Linear, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.read(self.gate_proj, x)) * self.up_proj(x))


def functional(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, linear.weight)


def product(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return x @ linear.weight.data.T


def halves(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([F.linear(x, part) for part in linear.weight.chunk(2)], dim=-1)


def own_forward(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear.forward(x)


@pytest.mark.parametrize("read", [functional, product, halves, own_forward])
@pytest.mark.parametrize("update", [None, "corrected"])
def test_a_weight_that_is_read_without_its_linear_is_told_and_stays(
    read: Callable[[nn.Linear, torch.Tensor], torch.Tensor], update: str | None
) -> None:
    model = tiny_model()
    model.model.layers[1].mlp = Direct(model.model.layers[1].mlp, read)
    model.model.layers[1].idle = nn.Linear(4, 4)
    before = weights_of(model)
    report = prune_model(model, token_ids(), "2:4", update=update, **QUIET)
    told = {line.name: line.status for line in report.linears if line.status != "pruned"}
    assert told == {
        "model.layers.1.mlp.gate_proj": UNSEEN,
        "model.layers.1.idle": "never called",
    }
    assert not {f"{name}.weight" for name in told} & {*changed(model, before)}


def test_what_a_scripted_block_reads_is_seen() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x)

    scripted = torch.jit.script(Block())
    with reads_of({"up": scripted.up}) as read:
        scripted(torch.ones(1, 8))
    assert read == {"up"}


def test_reads_of_others_do_not_count() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    with reads_of({"a": a}) as read:
        b(torch.ones(1, 4))
    assert read == set()
