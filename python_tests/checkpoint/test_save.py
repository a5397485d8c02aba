"""swap, unswap and save: the same function, the same bytes, and reasons for what stays dense."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from models_24 import CONFIGS, dense_model, digests, logits, model_24
from torch import nn
from transformers import AutoModelForCausalLM

from wanda_ext.checkpoint import save as checkpoint
from wanda_ext.checkpoint.save import PACKED, save_pretrained, swap_linears, unswap_linears

FAMILIES = list(CONFIGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_model_computes_what_its_masked_twin_computes(family):
    model = model_24(family)
    expected = logits(model)
    outcome = swap_linears(model)
    head = outcome.pop("lm_head")
    tied = model.config.tie_word_embeddings
    assert head.startswith("shares its weight with" if tied else "not 2:4: row 0, columns 0 to 3")
    assert outcome and set(outcome.values()) == {PACKED}
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_unswap_restores_the_dense_model(family):
    model = model_24(family)
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    outcome = swap_linears(model)
    names = unswap_linears(model)
    assert names == [name for name, what in outcome.items() if what == PACKED]
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config") and not model.is_quantized
    assert unswap_linears(model) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_bytes_are_at_most_057_of_dense(family):
    model = model_24(family, torch.bfloat16)
    dense = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    swap_linears(model)
    packed = checkpoint.packed_linears(model)
    stored = sum(module.weight.nbytes + module.meta.nbytes for module in packed.values())
    assert 0 < stored <= 0.57 * sum(dense[f"{name}.weight"] for name in packed)


def test_unswapped_weights_are_frozen_where_they_were():
    model = model_24("gpt2").requires_grad_(False)
    model.transformer.h[1].requires_grad_(True)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        swap_linears(model)
    unswap_linears(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_names_choose_and_the_rest_stays():
    model = model_24("llama")
    name = "model.layers.1.mlp.up_proj"
    assert swap_linears(model, name) == swap_linears(model, [name]) == {name: PACKED}
    assert list(checkpoint.packed_linears(model)) == [name]
    assert model.config.quantization_config.modules == [name]
    assert swap_linears(model)[name] == PACKED


def test_unknown_name_is_an_error():
    with pytest.raises(ValueError, match=r"layers\.9: no such linear"):
        swap_linears(model_24("llama"), ["model.layers.9"])


def test_dense_model_is_an_error_and_stays_as_it_was():
    model = dense_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"none of the 15 linears can be packed \(model\.layers"):
        swap_linears(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not checkpoint.packed_linears(model) and not checkpoint.attached(model)


def test_what_cannot_be_packed_says_why():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        {
            "good": nn.Linear(16, 4),
            "narrow": nn.Linear(12, 4),
            "fp64": nn.Linear(16, 4, dtype=torch.float64),
            "absent": nn.Linear(16, 4, device="meta"),
            "doubled": Doubled(16, 4),
            "hooked": nn.Linear(16, 4),
            "patched": nn.Linear(16, 4),
            "one": nn.Linear(16, 4),
            "two": nn.Linear(16, 4),
            "attention": nn.MultiheadAttention(16, 2),
            "lora": nn.ModuleDict({"base_layer": nn.Linear(16, 4)}),
        }
    )
    for parameter in model.parameters():
        parameter.data.zero_()
    model["hooked"].register_forward_hook(lambda module, args, output: None)
    model["patched"].forward = lambda x: x
    model["two"].weight = model["one"].weight
    assert swap_linears(model) == {
        "good": PACKED,
        "narrow": "its 12 columns are not a multiple of 16; a bitmap would take 2275% of its bytes",
        "fp64": "its weight is torch.float64, not float32, bfloat16 or float16",
        "absent": "its weight is not in memory (meta device)",
        "doubled": "a Doubled computes more than x @ W.T + bias",
        "hooked": "carries hooks, which packing would drop; remove them first",
        "patched": "carries hooks, which packing would drop; remove them first",
        "one": "shares its weight with two",
        "two": "shares its weight with one",
        "attention.out_proj": "a NonDynamicallyQuantizableLinear computes more than x @ W.T + bias",
        "lora.base_layer": "has an adapter; merge it first",
    }


def test_refuses_a_model_quantized_by_others():
    model = model_24("llama")
    model.is_quantized, model.quantization_method = True, "gptq"
    model.model.layers[0].mlp.up_proj.register_buffer("scales", torch.ones(1))
    with pytest.raises(ValueError, match=r"quantized \(gptq: model.layers.0.mlp.up_proj\)"):
        swap_linears(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_dense_or_packed_whatever_is_in_memory(family, dtype, tmp_path):
    model = model_24(family, dtype)
    expected = logits(model)
    save_pretrained(model, tmp_path / "dense")
    save_pretrained(model, tmp_path / "packed", packed=True)
    assert not checkpoint.packed_linears(model) and not checkpoint.attached(model)
    outcome = swap_linears(model)
    modules = list(model.modules())
    save_pretrained(model, tmp_path / "dense2")
    save_pretrained(model, tmp_path / "packed2", packed=True)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert checkpoint.attached(model)
    assert digests(tmp_path / "dense") == digests(tmp_path / "dense2")
    assert digests(tmp_path / "packed") == digests(tmp_path / "packed2")

    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    entry = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    packed = [name for name, what in outcome.items() if what == PACKED]
    assert entry == {
        "quant_method": "wanda_ext",
        "format_version": 1,
        "modules": packed,
        "transposed": packed if family == "gpt2" else [],
        "dense": {"lm_head": outcome["lm_head"]},
    }
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(dense), expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert list(checkpoint.packed_linears(loaded)) == packed
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_load_state_dict_save_is_byte_identical(family, tmp_path):
    save_pretrained(model_24(family, torch.bfloat16), tmp_path / "first", packed=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    loaded.load_state_dict(copy.deepcopy(loaded.state_dict()))
    loaded.save_pretrained(tmp_path / "second")
    assert digests(tmp_path / "second") == digests(tmp_path / "first")


def test_packed_save_of_a_dense_model_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="Packing needs pruned weights"):
        save_pretrained(dense_model("llama"), tmp_path / "out", packed=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("packed", [True, False])
def test_a_partly_swapped_model_is_saved_whole(packed, tmp_path):
    model = model_24("llama")
    save_pretrained(model, tmp_path / "whole", packed=packed)
    swap_linears(model, "model.layers.1.mlp.up_proj")
    modules = list(model.modules())
    save_pretrained(model, tmp_path / "part", packed=packed)
    assert digests(tmp_path / "part") == digests(tmp_path / "whole")
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert model.config.quantization_config.modules == ["model.layers.1.mlp.up_proj"]


def test_refuses_a_foreign_directory_before_it_does_anything(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    model = model_24("llama")
    with pytest.raises(ValueError, match="exists and holds"):
        save_pretrained(model, tmp_path, packed=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_offloaded_weights_are_not_unswapped():
    model = model_24("llama")
    swap_linears(model)
    before = list(model.modules())
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is not in memory"):
        unswap_linears(model)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_a_failed_save_restores_the_model(tmp_path, monkeypatch):
    model = model_24("llama")
    swap_linears(model)
    modules = list(model.modules())

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(model, tmp_path / "out")
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert checkpoint.attached(model) and not list(tmp_path.iterdir())


def test_a_copy_of_a_swapped_model_works(tmp_path):
    model = model_24("llama")
    swap_linears(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    unswap_linears(copied)
    assert checkpoint.packed_linears(model) and not checkpoint.packed_linears(copied)


def compiled(model, how):
    """The model, or parts of it, behind torch.compile; nothing is compiled before it runs."""
    if how == "whole":
        return torch.compile(model, backend="eager")
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for i, block in enumerate(blocks):
        blocks[i] = torch.compile(block, backend="eager")
    return model


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("how", ["whole", "by block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_model_is_saved_under_its_own_names(family, how, packed, tmp_path):
    save_pretrained(model_24(family), tmp_path / "plain", packed=packed)
    model = compiled(model_24(family), how)
    modules = list(model.modules())
    save_pretrained(model, tmp_path / "compiled", packed=packed)
    assert digests(tmp_path / "compiled") == digests(tmp_path / "plain")
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("how", ["whole", "by block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_swapped_compiled_model_is_too(family, how, own, tmp_path):
    plain = model_24(family)
    expected = swap_linears(plain)
    plain.save_pretrained(tmp_path / "plain")
    model = compiled(model_24(family), how)
    outcome = swap_linears(model)
    assert {name.replace("_orig_mod.", ""): what for name, what in outcome.items()} == expected
    if own:
        model.save_pretrained(tmp_path / "compiled")
    else:
        save_pretrained(model, tmp_path / "compiled", packed=True)
    assert digests(tmp_path / "compiled") == digests(tmp_path / "plain")
    assert torch.equal(logits(model), logits(plain))
    save_pretrained(model, tmp_path / "dense")
    save_pretrained(plain, tmp_path / "plain dense")
    assert digests(tmp_path / "dense") == digests(tmp_path / "plain dense")
    names = unswap_linears(model)
    assert len(names) == list(outcome.values()).count(PACKED)


def test_a_linear_that_is_compiled_itself_stays_dense(tmp_path):
    model = model_24("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = torch.compile(mlp.up_proj, backend="eager")
    outcome = swap_linears(model)
    assert "compiled by itself" in outcome["model.layers.0.mlp.up_proj._orig_mod"]
    model.save_pretrained(tmp_path / "packed")
    entry = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.up_proj" in entry["dense"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
