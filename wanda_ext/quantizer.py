"""What transformers needs to load and save packed checkpoints; importing it registers it.

A packed checkpoint is an ordinary one whose config.json has this `quantization_config` and whose
packed linears are stored as `NAME.weight` [n, k/2] and `NAME.meta` int16 [n, k/16] (canonical).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from wanda_ext.directory import TensorHeader, read_headers
from wanda_ext.linear import SparseLinear24

QUANT_METHOD = "wanda_ext"
FORMAT_VERSION = 1


@register_quantization_config(QUANT_METHOD)
class WandaExtConfig(QuantizationConfigMixin):
    """The `quantization_config` entry of a packed checkpoint.

    modules: names of the packed linears; transposed: those of them whose dense weight is stored
    [in, out] (Conv1D); dense: name -> why it stayed dense. Keys that this version does not know are
    dropped: whatever changes the meaning of a file raises format_version.
    """

    def __init__(
        self,
        modules: Iterable[str] = (),
        transposed: Iterable[str] = (),
        dense: Mapping[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        **_: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"wanda_ext: the packed checkpoint has format_version {format_version!r}, this "
                f"wanda_ext reads {FORMAT_VERSION}; upgrade wanda_ext to read it"
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.modules = list(modules)
        self.transposed = list(transposed)
        self.dense = dict(dense or {})
        if not self.modules:
            raise ValueError(
                "wanda_ext: the quantization_config names no packed modules; its config.json is "
                "damaged, or was not written by wanda_ext"
            )


@register_quantizer(QUANT_METHOD)
class WandaExtQuantizer(HfQuantizer):
    """Puts empty SparseLinear24 modules in before a packed checkpoint's tensors are loaded."""

    requires_calibration = True  # from_pretrained only loads what is packed; swap_linears packs
    quantization_config: WandaExtConfig

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:  # adapters: gradients pass through a packed linear
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if checkpoint_files:  # None: from_pretrained was given a state_dict
            _check_inside(Path(str(model.name_or_path)), checkpoint_files)
            headers = read_headers(Path(file) for file in checkpoint_files)
            check_headers(headers, self.quantization_config)
        modules = dict(model.named_modules())
        prefix = f"{model.base_model_prefix}."
        for name in self.quantization_config.modules:
            # AutoModel loads a causal LM's checkpoint without its prefix, and the other way round.
            # A name that this model lacks has no weights in it either.
            for here in (name, name.removeprefix(prefix), prefix + name):
                if here in modules:
                    try:
                        packed = SparseLinear24.shaped_like(modules[here])
                    except (TypeError, ValueError) as error:
                        raise ValueError(
                            f"wanda_ext: {name} cannot be packed as config.json says: {error}"
                        ) from error
                    model.set_submodule(here, packed)
                    break

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for module in packed_linears(model).values():
            module.weight.requires_grad_(False)
            module.reorder_()
        attach(model, self.quantization_config.dense)  # by the names they have in this model
        return model

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        for name, module in packed_linears(model).items():
            model.set_submodule(name, module.to_dense())
        return model


def _check_inside(folder: Path, files: Iterable[str]) -> None:
    """Raises ValueError for a file that an index has put outside of a local checkpoint."""
    for file in map(Path, files if folder.is_dir() else ()):
        # Names decide, not where links lead.
        if not file.is_relative_to(folder) or ".." in file.relative_to(folder).parts:
            raise ValueError(
                f"wanda_ext: the checkpoint in {folder} puts weights into {file}, outside of its "
                "directory: copy or download it again"
            )


def check_headers(headers: Mapping[str, TensorHeader], config: WandaExtConfig) -> None:
    """Raises ValueError unless the stored tensors can be the packed linears that `config` names.

    Counts and shapes only: transformers may store a module under another name than it has.
    """
    metas = {
        name.removesuffix(".meta"): header
        for name, header in headers.items()
        if name.endswith(".meta") and header.dtype == "I16"
    }
    if len(metas) != len(config.modules):
        raise ValueError(
            f"wanda_ext: config.json names {len(config.modules)} packed linears, the files hold "
            f"metadata of {len(metas)}: the checkpoint is not whole; copy or download it again"
        )
    for name, meta in metas.items():
        weight = headers.get(f"{name}.weight")
        if weight is None or weight.shape != (meta.shape[0], 8 * meta.shape[1]):
            stored = "missing" if weight is None else f"of shape {list(weight.shape)}"
            raise ValueError(
                f"wanda_ext: {name}.weight is {stored}, its metadata of shape {list(meta.shape)}: "
                "the checkpoint is not whole; copy or download it again"
            )


def packed_linears(model: nn.Module) -> dict[str, SparseLinear24]:
    """Name -> module of every SparseLinear24 in a model."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, SparseLinear24)}


def attach(model: Any, dense: Mapping[str, str]) -> None:
    """Makes `model.save_pretrained` write what is packed in the model now, or nothing packed.

    A module that is not a transformers model has no such method and is left alone.
    """
    packed = packed_linears(model)
    if not hasattr(model, "config"):
        return
    if not packed:
        if attached(model):
            model.hf_quantizer.remove_quantization_config(model)
        return
    transposed = [name for name, module in packed.items() if issubclass(module.dense_class, Conv1D)]
    config = WandaExtConfig(packed, transposed, dense)
    model.config.quantization_config = config
    model.hf_quantizer = WandaExtQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD


def attached(model: Any) -> bool:
    """Whether the model carries our quantizer."""
    return isinstance(getattr(model, "hf_quantizer", None), WandaExtQuantizer)
