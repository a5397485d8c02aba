"""What transformers needs to load and save packed checkpoints; importing it registers it.

A packed checkpoint is an ordinary one whose config.json has this `quantization_config` and whose
packed linears are stored as the tensors of their format (formats.py): a 2:4 one as `NAME.weight`
[n, k/2] and `NAME.meta` int16 [n, k/16] (canonical).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from wanda_ext.checkpoint.conversion import Conversion, rules_apart
from wanda_ext.checkpoint.load import check_floats, lacking
from wanda_ext.files import TensorHeader, check_inside, read_headers
from wanda_ext.packed import FORMATS, PackedLinear, named_format, sound_linears, stored_linears

QUANT_METHOD = "wanda_ext"
RULES = "_weight_conversions"  # of a model, as transformers keeps them
FIRST, BITMAPS = 1, 2  # format_version: of checkpoints with 2:4 linears only, with bitmaps too
WRAPPERS = re.compile(r"(^|\.)(?:(?:_orig_mod|_checkpoint_wrapped_module)(?:\.|$))+")


@register_quantization_config(QUANT_METHOD)
class WandaExtConfig(QuantizationConfigMixin):
    """The `quantization_config` entry of a packed checkpoint.

    modules: names of the packed 2:4 linears; bitmap: name -> non-zeros in its surplus, of those
    packed as a bitmap; transposed: those of both whose dense weight is stored [in, out] (Conv1D);
    dense: name -> why it stayed dense. Keys that this version does not know are dropped: whatever
    changes the meaning of a file raises format_version, which is 1 where there is no bitmap.
    """

    def __init__(
        self,
        modules: Iterable[str] = (),
        transposed: Iterable[str] = (),
        dense: Mapping[str, str] | None = None,
        format_version: int | None = None,
        bitmap: Mapping[str, int] | None = None,
        **_: Any,
    ) -> None:
        if not _is_bitmap(bitmap):
            raise ValueError(
                "wanda_ext: the quantization_config has a `bitmap` that is not names and numbers "
                f"of non-zeros ({str(bitmap)[:60]}); its config.json is damaged"
            )
        if format_version not in (None, FIRST, BITMAPS):
            raise ValueError(
                f"wanda_ext: the packed checkpoint has format_version {format_version!r}, this "
                f"wanda_ext reads {FIRST} and {BITMAPS}; upgrade wanda_ext to read it"
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format_version = BITMAPS if bitmap else FIRST
        self.modules = list(modules)
        self.transposed = list(transposed)
        self.dense = dict(dense or {})
        if bitmap:
            self.bitmap = dict(bitmap)
        if not self.packed:
            raise ValueError(
                "wanda_ext: the quantization_config names no packed modules; its config.json is "
                "damaged, or was not written by wanda_ext"
            )

    @classmethod
    def of(
        cls,
        packed: Mapping[str, tuple[str, Mapping[str, int]]],
        transposed: Iterable[str],
        dense: Mapping[str, str],
    ) -> WandaExtConfig:
        """From name -> (format, options) of what is packed, as `packed` gives it back."""
        bitmap = {
            name: options.get("surplus", 0)
            for name, (kind, options) in packed.items()
            if kind == "bitmap"
        }
        modules = [name for name in packed if name not in bitmap]
        return cls(modules, transposed, dense, bitmap=bitmap)

    @property
    def packed(self) -> dict[str, tuple[str, dict[str, int]]]:
        """Name -> format, and the options that shape an empty module, of every packed linear."""
        found: dict[str, tuple[str, dict[str, int]]] = {n: ("2:4", {}) for n in self.modules}
        for name, surplus in getattr(self, "bitmap", {}).items():
            found[name] = "bitmap", {"surplus": surplus} if surplus else {}
        return found


def _is_bitmap(entry: Any) -> bool:
    return entry is None or (
        isinstance(entry, Mapping)
        and all(isinstance(name, str) for name in entry)
        and all(type(count) is int and count >= 0 for count in entry.values())
    )


@register_quantizer(QUANT_METHOD)
class WandaExtQuantizer(HfQuantizer):
    """Puts empty packed modules in before a packed checkpoint's tensors are loaded."""

    requires_calibration = True  # from_pretrained only loads what is packed; swap_linears packs
    quantization_config: WandaExtConfig
    rules: list[Any] | None = None  # the model's own, by which it stores what is dense

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
        _refuse_missing(model)
        modules = dict(model.named_modules())
        if checkpoint_files:  # None: from_pretrained was given a state_dict
            _check_inside(Path(str(model.name_or_path)), checkpoint_files)
            headers = read_headers(Path(file) for file in checkpoint_files)
            check_headers(headers, self.quantization_config)
            check_floats(model.name_or_path, headers)
            self._take_places(model, headers)
            return
        prefix = f"{model.base_model_prefix}."
        for name, (kind, options) in self.quantization_config.packed.items():
            # AutoModel loads a causal LM's checkpoint without its prefix, and the other way round.
            # A name that this model lacks has no weights in it either.
            for here in (name, name.removeprefix(prefix), prefix + name):
                if here in modules:
                    _take_place(model, here, named_format(kind), options)
                    break

    def get_state_dict_and_metadata(
        self, model: nn.Module
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What save_pretrained writes: under the names of the plain model. None: its own."""
        return wrapped_state(model), {}

    def _take_places(self, model: nn.Module, headers: Mapping[str, TensorHeader]) -> None:
        """Each stored packed linear in the module that from_pretrained will load it into.

        The class that is loaded may be another one than that which config.json names the modules
        of: the text of a vision-language model. What it has no module for is loaded by none.
        """
        formats = {of for of, _ in self.quantization_config.packed.values()}
        for kind in FORMATS:
            stored = stored_linears(headers, kind) if kind.FORMAT in formats else {}
            for group in Conversion(model, (f"{name}.weight" for name in stored)).groups:
                base = group.names[0].removesuffix(".weight")
                if group.rule is not None:
                    raise ValueError(
                        f"wanda_ext: transformers takes {base} for a part of {group.first}, which "
                        "packed weights cannot be: pack the dense model again with this wanda_ext"
                    )
                name = group.first.removesuffix(".weight")
                _take_place(model, name, kind, kind.options(stored[base]))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, module in packed_linears(model).items():
            for short, parameter in module.named_parameters(recurse=False):
                if short in module.PARAMETERS:
                    parameter.requires_grad_(False)
            stored = _stored(module)
            problem = "" if any(one.is_meta for one in stored.values()) else module.problem(stored)
            if problem:
                raise ValueError(
                    f"wanda_ext: {name} {problem}: the checkpoint is damaged, or its "
                    "config.json is of another model; copy or download it again"
                )
            module.reorder_()
        attach(model, self.quantization_config.dense)  # by the names they have in this model
        return model

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        for name, module in packed_linears(model).items():
            model.set_submodule(name, module.to_dense())
        return model


def _take_place(
    model: nn.Module, name: str, kind: type[PackedLinear], options: Mapping[str, int]
) -> None:
    try:
        packed = kind.shaped_like(model.get_submodule(name), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"wanda_ext: {name} cannot be packed as config.json says: {error}"
        ) from error
    model.set_submodule(name, packed)


def _stored(module: PackedLinear) -> dict[str, Tensor]:
    """The tensors of a packed linear that was just read, those that accelerate keeps on the disk
    included."""
    elsewhere = getattr(getattr(module, "_hf_hook", None), "weights_map", None) or {}
    return {
        name: elsewhere[name] if tensor.is_meta and name in elsewhere else tensor
        for name, tensor in module.tensors().items()
    }


def _refuse_missing(model: Any) -> None:
    """Makes the load fail, once, where the checkpoint lacks a tensor of the model.

    A quantizer is not told what is missing; the model's tie_weights is, when all is read. A head
    that another class than the saved one adds is new, and not missed.
    """
    kind, where = type(model).__name__, model.name_or_path
    own = kind in (getattr(model.config, "architectures", None) or [kind])
    inside = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    computed = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())

    def tie_weights(*args: Any, missing_keys: set[str] | None = None, **options: Any) -> None:
        if missing_keys is None:  # not the one of the load
            type(model).tie_weights(model, *args, **options)
            return
        del model.tie_weights
        model.tie_weights(*args, missing_keys=missing_keys, **options)
        missed = {
            name
            for name in missing_keys
            if (own or name.startswith(inside)) and not any(re.search(p, name) for p in computed)
        }
        if missed:
            raise lacking(f"wanda_ext: {where}", kind, missed)

    model.tie_weights = tie_weights


def _check_inside(folder: Path, files: Iterable[str]) -> None:
    """Raises ValueError for a file that an index has put outside of a local checkpoint."""
    for file in map(Path, files if folder.is_dir() else ()):
        if not file.is_relative_to(folder) or ".." in file.relative_to(folder).parts:
            raise ValueError(
                f"wanda_ext: the checkpoint in {folder} puts weights into {file}, outside of its "
                "directory: copy or download it again"
            )
        check_inside(file, folder)


def check_headers(headers: Mapping[str, TensorHeader], config: WandaExtConfig) -> None:
    """Raises ValueError unless the stored tensors can be the packed linears that `config` names.

    Counts, shapes and dtypes only: transformers may store a module under another name than it has.
    """
    named = [kind for kind, _ in config.packed.values()]
    surplus = sorted(options.get("surplus", 0) for _, options in config.packed.values())
    found = []
    for kind in FORMATS:
        count = named.count(kind.FORMAT)
        stored = stored_linears(headers, kind)
        if len(stored) != count and (count or sound_linears(headers, kind)):
            raise ValueError(
                f"wanda_ext: config.json names {count} packed linears, the files hold metadata of "
                f"{len(stored)}: the checkpoint is not whole; copy or download it again"
            )
        if not count:
            continue
        for name, tensors in stored.items():
            damage = kind.damage(tensors)
            if damage:
                raise ValueError(
                    f"wanda_ext: {name}.{damage}: the checkpoint is not whole; copy or download it "
                    "again"
                )
            found.append(kind.options(tensors).get("surplus", 0))
    if sorted(found) != surplus:
        raise ValueError(
            f"wanda_ext: config.json tells of {sum(surplus)} non-zeros in surplus lists, the files "
            f"hold {sum(found)}: the checkpoint is not whole; copy or download it again"
        )


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Name -> module of every packed linear in a model."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, PackedLinear)}


def plain_name(name: str) -> str:
    """A tensor's or module's name without what torch.compile and its like put around modules."""
    return WRAPPERS.sub(r"\1", name).removesuffix(".")


def wrapped_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict under plain names; None where it has those anyway."""
    if not any(WRAPPERS.search(name) for name, _ in model.named_modules()):
        return None
    return {plain_name(name): tensor for name, tensor in model.state_dict().items()}


def attach(model: Any, dense: Mapping[str, str]) -> None:
    """Makes `model.save_pretrained` write what is packed in the model now, or nothing packed.

    A module that is not a transformers model has no such method and is left alone.
    """
    packed = {plain_name(name): module for name, module in packed_linears(model).items()}
    if not hasattr(model, "config"):
        return
    before = model.hf_quantizer.rules if attached(model) else vars(model).get(RULES)
    if not packed:
        if attached(model):
            _set_rules(model, before)
            model.hf_quantizer.remove_quantization_config(model)
        return
    transposed = [name for name, module in packed.items() if issubclass(module.dense_class, Conv1D)]
    formats = {n: (module.FORMAT, module.options(module.tensors())) for n, module in packed.items()}
    reasons = {plain_name(name): reason for name, reason in dense.items()}
    config = WandaExtConfig.of(formats, transposed, reasons)
    model.config.quantization_config = config
    _set_rules(model, before)
    model.hf_quantizer = WandaExtQuantizer(config, pre_quantized=True)
    model.hf_quantizer.rules = before
    apart = rules_apart(model, packed)
    if apart is not None:
        _set_rules(model, apart)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD


def _set_rules(model: Any, rules: list[Any] | None) -> None:
    """By which save_pretrained stores tensors; None: those that transformers has for the class."""
    if rules is not None:
        model._weight_conversions = rules
    else:
        vars(model).pop(RULES, None)


def attached(model: Any) -> bool:
    """Whether the model carries our quantizer."""
    return isinstance(getattr(model, "hf_quantizer", None), WandaExtQuantizer)
