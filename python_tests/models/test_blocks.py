"""Finding blocks and linears, and refusing models that cannot be pruned in place."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, changed, tiny_model, token_ids, weights_of
from torch import nn
from torch.nn.utils import prune

import wanda_ext
from wanda_ext.models.blocks import (
    check_prunable,
    check_weight,
    context_of,
    dense_weight,
    find_blocks,
    linears_of,
    vocab_size_of,
    weight_shape,
)
from wanda_ext.packed.linear_24 import SparseLinear24
from wanda_ext.prune import prune_model

PATHS = {"opt": "model.decoder.layers", "bloom": "transformer.h", "gpt2": "transformer.h"}
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_the_blocks_of_every_family(family):
    model = tiny_model(family)
    path = PATHS.get(family, "gpt_neox.layers" if family == "gpt_neox" else "model.layers")
    blocks = find_blocks(model)
    assert [name for name, _ in blocks] == [f"{path}.{i}" for i in range(3)]
    assert [block for _, block in blocks] == list(model.get_submodule(path))
    assert context_of(model) == (None if family == "bloom" else 64)
    assert vocab_size_of(model) == 128
    inside = [name for _, block in blocks for name in linears_of(block)]
    assert len(inside) == 3 * len(linears_of(blocks[0][1]))
    assert "lm_head" not in " ".join(inside)


def test_blocks_of_a_model_without_a_head():
    assert find_blocks(tiny_model().model)[0][0] == "layers.0"


def test_blocks_can_be_given():
    model = tiny_model()
    for given in ("model.layers", model.model.layers):
        assert find_blocks(model, given) == find_blocks(model)
    with pytest.raises(ValueError, match=r"no ModuleList of this model; it has model\.layers"):
        find_blocks(model, "model.blocks")


class Twins(nn.Module):
    """Two lists of blocks of the same length."""

    def __init__(self, no_split: list[str], depth: int = 2) -> None:
        super().__init__()
        self.config = type("Config", (), {"num_hidden_layers": 2})()
        self._no_split_modules = no_split
        self.first = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(depth)])
        self.second = nn.ModuleList([nn.Linear(4, 4) for _ in range(depth)])


def test_ambiguous_and_missing_blocks():
    with pytest.raises(ValueError, match=r"found 2 \(first, second\): pass blocks="):
        find_blocks(Twins([]))
    assert find_blocks(Twins(["Sequential"]))[0][0] == "first.0"
    with pytest.raises(ValueError, match=r"in Twins, found 0 \(none\): pass blocks="):
        find_blocks(Twins([], depth=3))
    with pytest.raises(ValueError, match="in Linear, found 0"):
        find_blocks(nn.Linear(4, 4))


def test_inner_lists_are_not_blocks():
    model = Twins([])
    model.second = nn.Identity()
    for block in model.first:
        block.append(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    assert [name for name, _ in find_blocks(model)] == ["first.0", "first.1"]


def test_linears_are_subclasses_and_conv1d_too():
    class Odd(nn.Linear):
        pass

    block = nn.Sequential(Odd(3, 4), nn.LayerNorm(4), nn.Embedding(2, 2))
    assert list(linears_of(block)) == ["0"]
    gpt2 = linears_of(tiny_model("gpt2").transformer.h[0])
    assert {name: weight_shape(module) for name, module in gpt2.items()} == {
        "attn.c_attn": (192, 64),
        "attn.c_proj": (64, 64),
        "mlp.c_fc": (96, 64),
        "mlp.c_proj": (64, 96),
    }


def test_dense_weight_writes_back_what_it_lends():
    conv = tiny_model("gpt2").transformer.h[0].mlp.c_fc
    before = conv.weight.detach().clone()
    address = conv.weight.data_ptr()
    with dense_weight(conv, CPU) as weight:
        assert weight.shape == (96, 64)
        assert weight.stride(1) == 1
        weight[:, :8] = 0
    assert conv.weight.data_ptr() == address
    assert not conv.weight[:8].any()
    assert torch.equal(conv.weight[8:], before[8:])
    linear = nn.Linear(4, 4)
    with dense_weight(linear, CPU) as weight:
        assert weight.data_ptr() == linear.weight.data_ptr()


# --- Refusals ------------------------------------------------------------------------------------


def test_plain_models_pass():
    check_prunable(tiny_model())
    check_weight("fc", nn.Linear(4, 4, dtype=torch.float16))


def test_not_a_module():
    with pytest.raises(TypeError, match="model must be a torch module, not str: load it"):
        check_prunable("facebook/opt-125m")


def test_a_quantized_model():
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "gptq"}
    check_prunable(model)  # a label alone, see checkpoint/test_label.py
    model.model.layers[1].mlp.up_proj.register_buffer("scales", torch.ones(1))
    with pytest.raises(ValueError, match=r"quantized \(gptq: .*up_proj\): prune the original"):
        check_prunable(model)


def test_packed_already():
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.q_proj = SparseLinear24.shaped_like(attention.q_proj)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj is packed already"):
        check_prunable(model)


@pytest.mark.parametrize(
    ("base", "name", "module", "match"),
    [
        (nn.Linear, "Linear", "peft.tuners.lora.layer", "an unmerged adapter"),
        (nn.Module, "FullyShardedDataParallel", "torch.distributed.fsdp", "sharded by FSDP"),
    ],
)
def test_adapters_and_shards(base, name, module, match):
    kind = type(name, (base,), {"__module__": module})
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = kind(4, 4) if base is nn.Linear else kind()
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.up_proj.*{match}"):
        check_prunable(model)


def test_experts_spread_over_processes():
    model = tiny_model()
    model.model.layers[1].mlp._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"layers\.1\.mlp holds a part of the experts only"):
        check_prunable(model)


def test_meta_weights():
    model = tiny_model()
    model.model.layers[2].mlp.to("meta")
    with pytest.raises(
        ValueError, match=r"layers\.2\.mlp\.gate_proj\.weight is on the meta device"
    ):
        check_prunable(model)


def test_weights_that_are_no_plain_floats():
    class FP8Linear(nn.Linear):
        pass

    fp8 = FP8Linear(4, 4)
    fp8.weight = nn.Parameter(fp8.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"blocks\.0\.fc\.weight is float8_e4m3fn, and only"):
        check_weight("blocks.0.fc", fp8)
    with pytest.raises(ValueError, match=r"fc\.weight is float64"):
        check_weight("fc", nn.Linear(4, 4, dtype=torch.float64))

    class DTensor(torch.Tensor):
        pass

    sharded = nn.Linear(4, 4)
    sharded.weight = nn.Parameter(sharded.weight.detach().as_subclass(DTensor))
    with pytest.raises(ValueError, match=r"fc\.weight is a DTensor, a quantized or distributed"):
        check_weight("fc", sharded)


@pytest.mark.parametrize(
    "computed",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        torch.nn.utils.weight_norm,
        lambda linear: prune.random_unstructured(linear, "weight", 0.5),
    ],
)
def test_weights_that_are_computed_are_refused(computed):
    model = tiny_model()
    computed(model.model.layers[1].mlp.up_proj)
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is computed anew"):
        prune_model(model, token_ids(), "2:4", swap=False, progress=False)
    assert changed(model, before) == []
    report = prune_model(
        model, token_ids(), "2:4", ignore="*.1.mlp.up_proj", swap=False, progress=False
    )
    assert len(report.pruned) == 20
    outcome = wanda_ext.swap_linears(model)
    assert "computed anew" in outcome["model.layers.1.mlp.up_proj"]
    with pytest.raises(ValueError, match="down_proj"):  # a repair, of a prune that torch did
        victim = tiny_model()
        prune.l1_unstructured(victim.model.layers[0].mlp.down_proj, "weight", 0.5)
        wanda_ext.repair(victim, tiny_model(), token_ids(), progress=False)
