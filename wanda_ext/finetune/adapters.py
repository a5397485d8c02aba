"""LoRA adapters on pruned models, by peft: trained under the masks, merged without losing a zero.

On packed linears they stay separate. peft is optional, the extra `finetune`, and imported where it
is used only; lora_layers.py has the layers that it is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from wanda_ext.packed import PackedLinear

ALL = "all-linear"  # peft's word for every linear but the output embedding
INITS = (True, False, "gaussian")  # those that leave the weight as it is


def add_adapters(
    model: nn.Module, config: Any, *, trainable: bool = True, name: str = "default"
) -> Any:
    """A peft.PeftModel around `model`, ready to train, whose adapters respect what was pruned.

    model: pruned, with zeros or packed; its linears are wrapped in place and frozen. config: a
    peft.LoraConfig (target_modules="all-linear" means the packed ones too), or the directory to
    which save_pretrained of such a PeftModel wrote adapters, which are loaded. trainable: whether
    loaded ones are to be trained on. name: of the adapter; where `model` is what an earlier call
    gave, it is one more, inactive until set_adapter(name).

    Where a linear's weight W [n, k] is zero its adapters do nothing: y = x @ (W + mask * (B @ A) *
    scale).T, computed as one product, or as two where adapters in training have a dropout. Around a
    packed linear adapters are not masked, and stay. peft alone does not load what was saved: its
    layers would compute something else.

    Raises ImportError without peft; TypeError for what is no LoraConfig; ValueError, and the model
    is as it was, for what would change zeros or is not plain LoRA: DoRA and other variants, initial
    values taken from the weight (PiSSA, OLoRA, LoftQ, ...), target_parameters; for saved adapters
    that were trained without masks, or around packed linears where they are dense here, or the
    other way round; for a name that is taken.
    """
    peft, layers = _peft()
    is_more = isinstance(model, peft.PeftModel)
    if isinstance(config, (str, Path)):
        found = _checked(peft.PeftConfig.from_pretrained(config), peft)
        if not isinstance(found, layers.PrunedLoraConfig):
            raise ValueError(
                f"{config} was not saved by a model of add_adapters: it was trained without masks, "
                "and would compute something else with them. Train it again, or load it with peft"
            )
        for linear, module in _linears(model).items():
            found.check(linear, isinstance(module, PackedLinear))
        options = {"is_trainable": trainable}
        if not is_more:
            return peft.PeftModel.from_pretrained(model, config, name, config=found, **options)
        _check_free(model, name)
        model.load_adapter(config, name, **options)  # type: ignore[operator]
        return model
    config = layers.PrunedLoraConfig.of(_checked(config, peft))
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL:
        config.target_modules = list(_linears(model))
    if is_more:
        _check_free(model, name)
        model.add_adapter(name, config)  # type: ignore[operator]
        adapted: Any = model
    else:
        adapted = peft.get_peft_model(model, config, adapter_name=name)
    config.linears = layers.adapted_linears(adapted, name)
    return adapted


def merge_adapters(model: Any) -> Any:
    """The pruned model that add_adapters wrapped, its active adapters now in its weights.

    Every zero is still one, and the outputs stay the same. `model` itself is used up.

    Raises TypeError for what is no PeftModel, and ValueError, and nothing is merged, where an
    adapter is on a packed linear, was not made by add_adapters, or is not finite.
    """
    peft, layers = _peft()
    if not isinstance(model, peft.PeftModel):
        raise TypeError(
            f"merge_adapters: expected the PeftModel that add_adapters gave, got "
            f"{type(model).__name__}"
        )
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, layers.PackedLora):
            raise ValueError(layers.CANNOT_MERGE.format(name))
        if not isinstance(layer, layers.lora.LoraLayer):
            continue
        base = layer.get_base_layer()
        if isinstance(base, (nn.Linear, Conv1D)) and not isinstance(layer, layers.MaskedLora):
            raise ValueError(
                f"{name} holds an adapter that add_adapters has not made: merging it would fill "
                "the zeros of the weight"
            )
        if not layers.is_finite(layer):
            raise ValueError(
                f"{name} holds an adapter with NaN or infinity: its training diverged, nothing was "
                "merged. Train again with a lower learning rate"
            )
    return model.merge_and_unload(safe_merge=True)  # rounds as the forward does


def _check_free(model: Any, name: str) -> None:
    if name in model.peft_config:
        raise ValueError(f"an adapter called {name!r} already exists in this model: name another")


def _linears(model: Any) -> dict[str, nn.Module]:
    """All linears, dense and packed, but the output embedding, by their names without adapters."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    kinds = (nn.Linear, Conv1D, PackedLinear)
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not head and ".lora_" not in name
    }


def _checked(config: Any, peft: Any) -> Any:
    """The config; raises unless it asks for LoRA that can be masked."""
    if not isinstance(config, peft.LoraConfig):
        raise TypeError(
            "add_adapters: expected a peft.LoraConfig, or the directory of saved LoRA adapters, "
            f"got {type(config).__name__}"
        )
    refused = {
        "init_lora_weights": config.init_lora_weights not in INITS,
        "target_parameters": bool(config.target_parameters),
        "use_dora": config.use_dora,
    }
    for option, is_refused in refused.items():
        if is_refused:
            raise ValueError(
                f"{option}={getattr(config, option)!r} would change weights that were pruned, or "
                "cannot be masked: use plain LoRA on linears (target_modules), which starts from "
                "init_lora_weights=True"
            )
    return config


def _peft() -> tuple[Any, Any]:
    """peft, and our layers for it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"adapters need peft ({error}): pip install 'wanda_ext[finetune]'"
        ) from None
    from wanda_ext.finetune import lora_layers

    return peft, lora_layers
