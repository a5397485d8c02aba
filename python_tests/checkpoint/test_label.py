"""A label of quantization in a model's config, and weights that agree with it or not."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from models_24 import logits, model_24
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from wanda_ext import save_pretrained
from wanda_ext.checkpoint.label import quantized_by


def as_codes(linear: nn.Linear) -> nn.Module:
    """What a quantizer puts in its place."""
    module = nn.Module()
    module.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    return module


def with_scale(linear: nn.Linear) -> nn.Module:
    linear.register_buffer("weight_scale", torch.ones(1))
    return linear


def of_fp8(linear: nn.Linear) -> nn.Module:
    return linear.to(torch.float8_e4m3fn)


def of_a_subclass(linear: nn.Linear) -> nn.Module:
    linear.__class__ = type("QuantLinear", (nn.Linear,), {})
    return linear


@pytest.mark.parametrize("config", [{"quant_method": "x"}, SimpleNamespace(quant_method="x"), None])
@pytest.mark.parametrize("quantize", [as_codes, with_scale, of_fp8, of_a_subclass])
def test_quantized_weights(config, quantize):
    model = tiny_model()
    name = "model.layers.1.mlp.up_proj"
    model.set_submodule(name, quantize(model.get_submodule(name)))
    model.is_quantized = True
    if config is not None:
        model.config.quantization_config = config
    method = "x" if config else "by an unknown method"
    assert quantized_by(model) == f"{method}: {name}"


def test_a_label_on_plain_weights_passes():
    """transformers leaves it on what it has dequantized."""
    model = tiny_model()
    model.config.quantization_config = SimpleNamespace(quant_method="gguf")
    model.is_quantized = True
    assert quantized_by(model) == ""


@pytest.mark.parametrize("packed", [False, True])
def test_a_label_that_the_weights_belie_is_not_saved(packed, tmp_path):
    """transformers leaves one on what it has dequantized, and its quantizer cannot save."""

    class Dequantized:
        def get_state_dict_and_metadata(self, model):
            raise AssertionError("asked to save")

    model = model_24("llama")
    expected = logits(model)
    labels = {"is_quantized": True, "quantization_method": "gguf", "hf_quantizer": Dequantized()}
    vars(model).update(labels)
    model.config.quantization_config = {"quant_method": "gguf"}
    save_pretrained(model, tmp_path / "out", packed=packed)
    entry = json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config")
    assert (entry or {}).get("quant_method") == ("wanda_ext" if packed else None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), expected)
    assert {name: getattr(model, name) for name in labels} == labels
    assert model.config.quantization_config == {"quant_method": "gguf"}
