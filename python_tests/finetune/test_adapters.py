"""Adapters: nothing fills a zero, merged is what ran before, packed linears keep theirs apart."""

from __future__ import annotations

import copy
import sys
import warnings

import peft
import pytest
import torch
from fresh_python import run_python
from models_24 import IDS, logits, model_24, wide_model
from tiny_models import changed, tiny_model, token_ids, weights_of

import wanda_ext
from wanda_ext.finetune.lora_layers import MaskedLora, PackedLora
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
    wanda_ext.add_adapters(adapted, config(), name="other")
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


# --- Adapters that peft itself loads --------------------------------------------------------------

PLAIN = """
import sys
{first}
import peft, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
{then}
base, folder = sys.argv[1:]
loads = {{
    "PeftModel": lambda: peft.PeftModel.from_pretrained(model(), folder),
    "config": lambda: peft.get_peft_model(model(), peft.PeftConfig.from_pretrained(folder)),
    "transformers": lambda: model().load_adapter(folder),
}}
def model():
    return AutoModelForCausalLM.from_pretrained(base)
for name, load in loads.items():
    try:
        load()
    except Exception as error:
        print(name, type(error).__name__, error)
    else:
        print(name, "loaded")
"""


@pytest.mark.parametrize("order", ["without us", "we first", "we last"])
def test_plain_peft_refuses_our_adapters(order, tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path / "base")
    adapted = wanda_ext.add_adapters(model, config())
    train(adapted)
    adapted.save_pretrained(tmp_path / "adapters")
    ours = "import wanda_ext"
    code = PLAIN.format(
        first=ours if order == "we first" else "", then=ours if order == "we last" else ""
    )
    run = run_python(code, str(tmp_path / "base"), str(tmp_path / "adapters"))
    assert run.returncode == 0, run.stderr
    told = run.stdout.splitlines()
    assert len(told) == 3
    for line in told:
        assert "loaded" not in line.split() and "load it with wanda_ext.add_adapters" in line, line


def test_where_add_adapters_was_used_peft_gives_our_layers(tmp_path):
    model = pruned()
    again, third = copy.deepcopy(model), copy.deepcopy(model)
    zeros = zeros_of(model)
    adapted = wanda_ext.add_adapters(model, config())
    train(adapted)
    ran = outputs(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(outputs(loaded), ran)
    assert any(isinstance(m, MaskedLora) for m in loaded.modules())
    assert_zeros_kept(wanda_ext.merge_adapters(loaded), zeros)
    two = wanda_ext.add_adapters(third, config(target_modules=["o_proj"]))
    two.load_adapter(tmp_path, "second")
    two.set_adapter("second")
    assert torch.equal(outputs(two), ran)


def test_adapters_that_were_not_masked_are_refused(tmp_path):
    model = pruned()
    again, third = copy.deepcopy(model), copy.deepcopy(model)
    adapted = peft.get_peft_model(model, config())
    train(adapted)
    adapted.save_pretrained(tmp_path)
    names = [name for name, _ in again.named_modules()]
    with pytest.raises(ValueError, match=r"was not saved by .*add_adapters.* was trained without"):
        wanda_ext.add_adapters(again, tmp_path)
    assert [name for name, _ in again.named_modules()] == names
    masked = wanda_ext.add_adapters(third, config())
    with pytest.raises(ValueError, match=r"wanda_ext\.add_adapters\(model, config"):
        masked.load_adapter(tmp_path, "second")
    with pytest.raises(ValueError, match=r"wanda_ext.add_adapters\(model, config, name="):
        masked.add_adapter("second", config())


def test_masked_and_packed_are_not_taken_for_each_other(tmp_path):
    """Beside a packed linear nothing is masked: another function."""
    beside = wanda_ext.add_adapters(packed(), config())
    train(beside, ids=IDS)
    beside.save_pretrained(tmp_path / "beside")
    with pytest.raises(ValueError, match=r"q_proj was packed when .* and is not here"):
        wanda_ext.add_adapters(model_24("llama"), tmp_path / "beside")
    masked = wanda_ext.add_adapters(model_24("llama"), config())
    train(masked, ids=IDS)
    masked.save_pretrained(tmp_path / "masked")
    with pytest.raises(ValueError, match=r"q_proj was not packed when .* and is here"):
        wanda_ext.add_adapters(packed(), tmp_path / "masked")
    assert torch.equal(
        logits(wanda_ext.add_adapters(model_24("llama"), tmp_path / "masked")), logits(masked)
    )


def test_a_second_adapter_is_saved_as_the_first(tmp_path):
    adapted = wanda_ext.add_adapters(pruned(), config())
    wanda_ext.add_adapters(adapted, config(target_modules=["o_proj"]), name="other")
    adapted.set_adapter("other")
    train(adapted)
    ran = outputs(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = wanda_ext.add_adapters(pruned(), tmp_path / "other")
    assert torch.equal(outputs(loaded), ran)
    with pytest.raises(ValueError, match="'other' already exists"):
        wanda_ext.add_adapters(adapted, config(), name="other")
