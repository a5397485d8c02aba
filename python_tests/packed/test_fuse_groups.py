"""What is merged, and that a saved model shows no trace of it."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_24 import Attention, assert_equal_states, fused, merged
from models_24 import CONFIGS, digests, logits, model_24, prune_24
from torch import nn

from wanda_ext.checkpoint.save import PACKED, save_pretrained, swap_linears, unswap_linears
from wanda_ext.packed.fuse import find_groups
from wanda_ext.packed.linear_24 import SparseLinear24

FAMILIES = list(CONFIGS)

# --- No trace in what is saved --------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_is_that_of_the_linears_apart(family):
    model, twin = model_24(family), model_24(family)
    swap_linears(model, fuse=True)
    swap_linears(twin)
    assert_equal_states(model.state_dict(), twin.state_dict())
    for parameter in twin.parameters():
        parameter.data.zero_()
    model.load_state_dict(twin.state_dict())
    assert not logits(model).any()


def test_loading_takes_values_columns_and_bias():
    module, other = fused(), Attention()
    for linear in other.children():
        linear.weight.data = linear.weight.data.flip(1)  # other columns are kept
        linear.bias.data.neg_()
    x = torch.randn(3, 64)
    expected = other(x)
    swap_linears(other)
    module.load_state_dict(other.state_dict())
    torch.testing.assert_close(module(x), expected)


def test_loading_checks_names_and_shapes():
    module = fused()
    state = copy.deepcopy(module.state_dict())
    state["k_proj.weight"] = state["k_proj.weight"][:-1]
    del state["v_proj.meta"]
    state["q_proj.product.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as caught:
        module.load_state_dict(state)
    for problem in ("v_proj.meta", "q_proj.product.weight", "size mismatch for k_proj.weight"):
        assert problem in str(caught.value)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_saves_the_same_bytes_fused_or_not(packed, own, tmp_path):
    model, twin = model_24("llama", torch.bfloat16), model_24("llama", torch.bfloat16)
    expected = logits(model)
    swap_linears(model, fuse=True)
    swap_linears(twin)
    for kind, one in (("fused", model), ("apart", twin)):
        if own and packed:
            one.save_pretrained(tmp_path / kind)
        else:
            save_pretrained(one, tmp_path / kind, packed=packed)
    assert digests(tmp_path / "fused") == digests(tmp_path / "apart")
    assert len(merged(model)) == 10  # as before
    assert torch.equal(logits(model), logits(twin))
    torch.testing.assert_close(logits(model), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("bias", [True, False])
def test_undone_exactly(bias):
    module, plain = Attention(bias=bias).eval(), Attention(bias=bias)
    swap_linears(module, fuse=True)
    assert not module.q_proj.training
    unswap_linears(module)
    assert {name: type(m) for name, m in module.named_modules()} == {
        name: type(m) for name, m in plain.named_modules()
    }
    assert_equal_states(module.state_dict(), plain.state_dict())
    assert all(p.requires_grad for p in module.parameters()) and not module.q_proj.training


# --- What is merged -------------------------------------------------------------------------------


def test_a_swapped_model_can_be_merged_later_and_names_limit_it():
    model = model_24("llama")
    layer = "model.layers.0.self_attn."
    names = [f"{layer}{name}_proj" for name in "qkv"]
    swap_linears(model)
    assert merged(model) == []
    swap_linears(model, names[:2], fuse=True)
    assert merged(model) == []
    assert swap_linears(model, names, fuse=True) == dict.fromkeys(names, PACKED)
    assert merged(model) == names
    swap_linears(model, fuse=True)
    assert len(merged(model)) == 10 and find_groups(model) == []


def siblings(**linears: nn.Module) -> nn.ModuleDict:
    for module in linears.values():
        prune_24(module)
    return nn.ModuleDict(linears)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (siblings(gate_proj=nn.Linear(32, 8), up_proj=nn.Linear(32, 16)), True),
        (siblings(w1=nn.Linear(32, 8), w3=nn.Linear(32, 8)), True),
        (siblings(**{name: nn.Linear(32, 8) for name in ("query", "key", "value")}), True),
        (siblings(gate_proj=nn.Linear(32, 8)), False),
        (siblings(gate_proj=nn.Linear(32, 8), up_proj=nn.Linear(64, 8)), False),
        (siblings(gate_proj=nn.Linear(32, 8), up_proj=nn.Linear(32, 8, bias=False)), False),
        (siblings(gate_proj=nn.Linear(32, 8), up_proj=nn.Linear(32, 8).half()), False),
        (siblings(one=nn.Linear(32, 8), two=nn.Linear(32, 8)), False),
        (nn.ModuleDict({"cross_attn": Attention()}), False),
        (nn.ModuleDict({"encoder_attn": Attention()}), False),
        (nn.ModuleDict({"self_attn": Attention()}), True),
    ],
)
def test_only_siblings_that_read_one_input(model, expected):
    swap_linears(model, fuse=True)
    assert bool(merged(model)) == expected


def test_hooked_members_stay_apart():
    module = Attention()
    swap_linears(module)
    seen = []
    module.v_proj.register_forward_hook(lambda *_: seen.append(1))
    swap_linears(module, fuse=True)
    assert merged(module) == [] and type(module.q_proj) is SparseLinear24
    module(torch.randn(3, 64))
    assert seen == [1]


def test_it_prints_what_it_is():
    text = repr(fused())
    assert "(q_proj): FusedLinear24(\n    in_features=64, out_features=64" in text
    assert "FusedProduct(q_proj + k_proj + v_proj, in_features=64, out_features=128" in text
