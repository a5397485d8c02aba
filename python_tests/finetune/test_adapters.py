"""Adapters: nothing fills a zero, merged is what ran before, packed linears keep theirs apart."""

from __future__ import annotations

import copy
import sys
import warnings

import peft
import pytest
import torch
from models_24 import IDS, logits, model_24, wide_model
from tiny_models import changed, tiny_model, token_ids, weights_of

import wanda_ext
from wanda_ext.finetune.lora_layers import PackedLora
from wanda_ext.packed.bitmap import SparseLinearBitmap
from wanda_ext.packed.linear_24 import SparseLinear24

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
DOWN = "model.layers.0.mlp.down_proj"


def config(family="llama", **options):
    options = {"target_modules": TARGETS[family], "r": 4, "lora_alpha": 8, **options}
    return peft.LoraConfig(**options)


def pruned(family="llama", dtype=torch.float32):
    model = tiny_model(family, dtype)
    wanda_ext.prune_model(model, token_ids(), "60%", progress=False)
    return model


def packed():
    model = model_24("llama")
    wanda_ext.swap_linears(model)
    return model


def train(model, steps=5, ids=None):
    """A few steps at a rate that moves every adapter far; the losses."""
    ids = token_ids(4) if ids is None else ids
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def outputs(model):
    return model(token_ids(2, seed=5)).logits


def zeros_of(model):
    return {n: p.detach() == 0 for n, p in model.named_parameters() if p.dim() == 2}


def assert_zeros_kept(model, zeros):
    for name, parameter in model.named_parameters():
        if name in zeros:
            assert not parameter.detach()[zeros[name]].any(), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 stores its weights transposed
def test_merging_loses_no_zero_and_changes_no_output(family):
    model = pruned(family)
    zeros, before, dense_run = zeros_of(model), weights_of(model), outputs(model)
    adapted = wanda_ext.add_adapters(model, config(family, lora_dropout=0.1, bias="none"))
    assert torch.equal(outputs(adapted), dense_run)  # B is zero at first
    losses = train(adapted)
    assert losses[-1] < losses[0]
    ran = outputs(adapted)
    assert (ran - dense_run).abs().max() > 0.1
    merged = wanda_ext.merge_adapters(adapted)
    assert merged is model and not any("lora" in name for name, _ in merged.named_modules())
    assert torch.equal(outputs(merged), ran)
    assert_zeros_kept(merged, zeros)
    touched = changed(merged, before)
    assert touched and all(any(t in name for t in TARGETS[family]) for name in touched)


def test_adapters_of_peft_alone_would_have_filled_the_zeros():
    model = pruned()
    zeros = zeros_of(model)
    adapted = peft.get_peft_model(model, config())
    train(adapted)
    with pytest.raises(ValueError, match="q_proj holds an adapter that add_adapters has not made"):
        wanda_ext.merge_adapters(adapted)
    with pytest.raises(AssertionError):
        assert_zeros_kept(adapted.merge_and_unload(), zeros)


def test_bfloat16_and_biases_of_adapters():
    model = pruned("gpt2", torch.bfloat16)
    zeros = zeros_of(model)
    adapted = wanda_ext.add_adapters(model, config("gpt2", lora_bias=True))
    train(adapted)
    ran = outputs(adapted)
    merged = wanda_ext.merge_adapters(adapted)
    assert merged.transformer.h[0].attn.c_attn.weight.dtype == torch.bfloat16
    assert_zeros_kept(merged, zeros)
    assert torch.equal(outputs(merged), ran)


def test_merged_in_place_and_back_and_switched_off():
    model = pruned()
    base, zeros = outputs(model), zeros_of(model)
    adapted = wanda_ext.add_adapters(model, config())
    train(adapted)
    ran = outputs(adapted)
    adapted.merge_adapter()
    torch.testing.assert_close(outputs(adapted), ran, rtol=0, atol=1e-5)
    held = {n.replace(".weight", ".base_layer.weight"): z for n, z in zeros.items()}
    assert_zeros_kept(adapted.get_base_model(), zeros | held)
    adapted.unmerge_adapter()
    torch.testing.assert_close(outputs(adapted), ran, rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        torch.testing.assert_close(outputs(adapted), base, rtol=0, atol=1e-5)


def test_two_adapters_in_one_batch_are_refused():
    adapted = wanda_ext.add_adapters(pruned(), config()).eval()
    with pytest.raises(ValueError, match="masked adapters cannot differ within a batch"):
        adapted(token_ids(2), adapter_names=["default", "__base__"])


def test_of_two_adapters_the_active_one_is_merged():
    adapted = wanda_ext.add_adapters(pruned(), config())
    adapted.add_adapter("other", config())
    adapted.set_adapter("other")
    zeros = zeros_of(adapted.get_base_model())
    train(adapted)
    ran = outputs(adapted)
    merged = wanda_ext.merge_adapters(adapted)
    torch.testing.assert_close(outputs(merged), ran, rtol=0, atol=1e-5)
    assert_zeros_kept(merged, {n.replace("base_layer.", ""): z for n, z in zeros.items()})


def test_saved_adapters_load_masked_again(tmp_path):
    model = pruned()
    again = copy.deepcopy(model)
    adapted = wanda_ext.add_adapters(model, config())
    train(adapted)
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 50_000  # no mask, no weight
    loaded = wanda_ext.add_adapters(again, tmp_path, trainable=False)
    assert torch.equal(outputs(loaded), outputs(adapted))
    assert not any(p.requires_grad for p in loaded.parameters())
    zeros = zeros_of(pruned())
    assert_zeros_kept(wanda_ext.merge_adapters(loaded), zeros)


def train_and_load_again(adapted, twin, folder):
    """Trains; merging is refused; saved, and loaded around the twin of its base, which it gives."""
    losses = train(adapted, ids=IDS)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="q_proj is packed and cannot take adapters in: keep them"):
        wanda_ext.merge_adapters(adapted)
    with pytest.raises(ValueError, match="this linear is packed"):
        adapted.merge_adapter()
    adapted.save_pretrained(folder)
    loaded = wanda_ext.add_adapters(twin, str(folder))
    assert torch.equal(logits(loaded), logits(adapted))
    return loaded


def test_packed_linears_keep_their_adapters_apart(tmp_path):
    model = packed()
    before = weights_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of peft, about classes it does not know
        adapted = wanda_ext.add_adapters(model, config(target_modules="all-linear"))
    layers = [m for m in adapted.modules() if isinstance(m, PackedLora)]
    assert len(layers) == sum(isinstance(m, SparseLinear24) for m in adapted.modules()) == 14
    loaded = train_and_load_again(adapted, packed(), tmp_path)
    assert layers[0].lora_B["default"].weight.any()
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, p in adapted.named_parameters() if p.requires_grad
    ]
    train(loaded, ids=IDS)
    assert not torch.equal(logits(loaded), logits(adapted))
    assert changed(adapted.unload(), before) == []


def test_bitmaps_keep_their_adapters_apart(tmp_path):
    def bitmaps():
        model = wide_model("mixed", dtype=torch.float32)
        wanda_ext.swap_linears(model)
        return model

    model = bitmaps()
    before, base = weights_of(model), logits(model)
    adapted = wanda_ext.add_adapters(model, config(target_modules="all-linear"))
    layers = [m for m in adapted.modules() if isinstance(m, PackedLora)]
    beside = [layer for layer in layers if isinstance(layer.base_layer, SparseLinearBitmap)]
    assert len(layers) == 7 and len(beside) == 4
    assert torch.equal(logits(adapted), base)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(layer.lora_B["default"].weight.grad.any() for layer in layers)
    train_and_load_again(adapted, bitmaps(), tmp_path)
    assert not torch.equal(logits(adapted), base)
    assert changed(adapted.unload(), before) == []


def test_refusals_leave_the_model_as_it_was():
    model = pruned()
    names = [name for name, _ in model.named_modules()]
    for options in (
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"target_parameters": ["mlp.experts.down_proj"]},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.* would change weights"):
            wanda_ext.add_adapters(model, config(**options))
    with pytest.raises(TypeError, match=r"expected a peft.LoraConfig, .*, got dict"):
        wanda_ext.add_adapters(model, {"r": 4})
    with pytest.raises(TypeError, match="expected the PeftModel that add_adapters gave, got Llama"):
        wanda_ext.merge_adapters(model)
    assert [name for name, _ in model.named_modules()] == names
    asked = config()
    adapted = wanda_ext.add_adapters(model, asked)
    assert asked._custom_modules is None  # the caller's own stays as it was
    with torch.no_grad():
        adapted.get_base_model().get_submodule(DOWN).lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{DOWN} holds an adapter with NaN or infinity"):
        wanda_ext.merge_adapters(adapted)


def test_without_peft_one_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ImportError, match=r"adapters need peft .*pip install 'wanda_ext\[finetune\]"
    ):
        wanda_ext.add_adapters(pruned(), None)
