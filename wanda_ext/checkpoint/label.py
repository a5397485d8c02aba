"""What a model's config says of quantization, and whether its weights agree.

transformers labels every model that it loads from quantized files, and keeps the label where it has
dequantized them on loading (GGUF): plain floats, which are pruned, packed and saved as any others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LABELS = ("hf_quantizer", "is_quantized", "quantization_method")  # of a model
CODES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
_NONE = object()


def quantized_by(model: nn.Module) -> str:
    """How a model's weights are quantized, and the first module whose are; "" where none is."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None and not getattr(model, "is_quantized", False):
        return ""
    first = next((name for name, module in model.named_modules() if _is_quantized(module)), "")
    get = config.get if isinstance(config, dict) else partial(getattr, config)
    method = get("quant_method", getattr(model, "quantization_method", "by an unknown method"))
    return f"{getattr(method, 'value', method)}: {first}" if first else ""


def _is_quantized(module: nn.Module) -> bool:
    """Whether it holds codes, or computes with more than a weight and a bias."""
    own = {**module._parameters, **module._buffers}
    tensors = [tensor for tensor in own.values() if tensor is not None]
    if any(type(one.data) is not Tensor or one.dtype in CODES for one in tensors):
        return True
    odd = type(module) is not nn.Linear or own.keys() - {"weight", "bias"}
    return isinstance(module, nn.Linear) and bool(odd)


@contextmanager
def unlabelled(model: Any) -> Iterator[None]:
    """The model without its label inside, so that none is saved."""
    labels = {name: vars(model).pop(name) for name in LABELS if name in vars(model)}
    config = vars(getattr(model, "config", model))
    told = config.pop("quantization_config", _NONE)
    try:
        yield
    finally:
        vars(model).update(labels)
        if told is not _NONE:
            config["quantization_config"] = told
