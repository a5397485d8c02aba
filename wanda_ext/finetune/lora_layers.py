"""What peft puts around pruned linears: LoRA whose product is masked, and LoRA beside a packed one.

A masked layer computes x @ (W + mask * (B @ A) * scale).T, with mask 0 where W is: merging adds
what the forward did, so it fills no zero. A packed weight cannot take anything in; its adapters
stay beside it, and are not masked. Only adapters.py imports this module, for it needs peft.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import lora
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from wanda_ext.packed import FORMATS, PackedLinear

# The peft_type in the file of saved adapters. peft looks its class up by it: where this module is
# loaded it finds ours, and elsewhere nothing, and its error is this text.
SAVED_AS = "LoRA on pruned weights: load it with wanda_ext.add_adapters(model, directory)"
MASKED, BESIDE = "masked", "beside a packed weight"


@dataclass
class PrunedLoraConfig(LoraConfig):  # type: ignore[misc]
    """A LoraConfig that puts the layers below around linears, and says so where it is saved.

    linears: what the adapter of each linear is, MASKED or BESIDE; None until there are any.
    """

    linears: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._register_custom_module(LAYERS)

    @classmethod
    def of(cls, config: LoraConfig) -> PrunedLoraConfig:
        """A copy of it, for adapters that are new."""
        own: Any = copy.deepcopy(config)
        own.__class__ = cls
        own.linears = None
        own._register_custom_module(LAYERS)
        return own  # type: ignore[no-any-return]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "peft_type": SAVED_AS}

    def check(self, name: str, is_packed: bool) -> None:
        """Raises ValueError where a saved adapter of this linear computed something else."""
        saved = (self.linears or {}).get(name)
        if saved is not None and (saved == BESIDE) != is_packed:
            told = ("was packed", "is not") if saved == BESIDE else ("was not packed", "is")
            raise ValueError(
                f"{name} {told[0]} when its adapter was trained, and {told[1]} here: only around "
                "weights that are packed no adapter is masked, so it would compute something else. "
                f"{'Pack' if saved == BESIDE else 'Unpack'} the model first"
            )


PEFT_TYPE_TO_CONFIG_MAPPING[SAVED_AS] = PrunedLoraConfig


class PlainLora(lora.Linear):  # type: ignore[misc]
    """What both layers share: none of the variants of LoRA, which compute something else."""

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **options: Any) -> None:
        if not isinstance(config, PrunedLoraConfig):
            raise ValueError(
                "this model's adapters respect what was pruned; one of peft's own among them would "
                "not: call wanda_ext.add_adapters(model, config, name=...)"
            )
        config.check(options.get("target_name", ""), isinstance(self, PackedLora))
        super().update_layer(adapter_name, *args, config=config, **options)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}


class MaskedLora(PlainLora):
    """Around an nn.Linear or a Conv1D: what is zero in its weight now stays zero when merged."""

    pruned: Tensor  # bool, in the shape of the weight; it is the weight's, so it is not saved

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, **options)
        base: Any = self.get_base_layer()
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self.register_buffer("pruned", base.weight.detach() == 0, persistent=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the weight, in the weight's shape."""
        delta: Tensor = super().get_delta_weight(adapter)
        return delta.masked_fill(self.pruned, 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: masked adapters cannot differ within a batch; run a batch for each "
                "adapter, after set_adapter()"
            )
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        base: Any = self.get_base_layer()
        weight, bias = base.weight, base.bias
        dropped: list[Tensor] = []
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                delta, dropout = self.get_delta_weight(adapter), self.lora_dropout[adapter]
                if self.lora_bias[adapter]:
                    bias = bias + (self.lora_B[adapter].bias * self.scaling[adapter]).to(bias.dtype)
                if self.training and isinstance(dropout, nn.Dropout):  # base reads x without it
                    own = dropout(self._cast_input_dtype(x, delta.dtype))
                    dropped.append(
                        functional.linear(own, delta.T if self.fan_in_fan_out else delta)
                    )
                else:  # the very weight that merging gives, so the same bits
                    weight = weight + delta.to(weight.dtype)
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        out: Tensor = functional_call(base, tensors, (x, *args), kwargs)
        for product in dropped:
            out = out + product.to(out.dtype)
        return out


class PackedLora(PlainLora):
    """Around a packed linear: y + (x @ A.T) @ B.T * scale, beside the packed product for good."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, PackedLinear)  # peft warns of classes that it does not know
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(CANNOT_MERGE.format("this linear"))


CANNOT_MERGE = (
    "{} is packed and cannot take adapters in: keep them separate (save_pretrained saves them "
    "alone), or train and merge them before the model is packed"
)
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: MaskedLora,
    Conv1D: MaskedLora,
    **dict.fromkeys(FORMATS, PackedLora),
}


def adapted_linears(model: Any, adapter: str) -> dict[str, str]:
    """What the linears of a PeftModel that hold an adapter of this name are, by their names."""
    return {
        name: BESIDE if isinstance(layer, PackedLora) else MASKED
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, PlainLora) and adapter in layer.lora_A
    }


def is_finite(layer: lora.LoraLayer) -> bool:
    """Whether all of a layer's adapters are finite numbers."""
    own = (layer.lora_A, layer.lora_B)
    return all(bool(torch.isfinite(p).all()) for module in own for p in module.parameters())
