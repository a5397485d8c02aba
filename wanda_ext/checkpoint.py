"""Packed linears in and out of a model, and models in and out of directories."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from wanda_ext.directory import new_directory
from wanda_ext.linear import SparseLinear24
from wanda_ext.quantizer import attach, attached, packed_linears

PACKED = "packed"


def swap_linears(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, str]:
    """Replaces every linear whose weight is 2:4 by a SparseLinear24; name -> "packed" or why not.

    Any model will do, pruned by wanda_ext or not. names: only these modules (default: all). The
    model's own save_pretrained then writes a packed checkpoint.

    Raises ValueError for a name that is no linear of the model, for a model quantized by another
    method, and if nothing could be packed; the model is then as it was.
    """
    _refuse_quantized(model)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, SparseLinear24))
    }
    names = [names] if isinstance(names, str) else names
    wanted = list(linears) if names is None else list(names)
    unknown = [name for name in wanted if name not in linears]
    if unknown:
        raise ValueError(
            f"swap_linears: {', '.join(unknown)}: no such linear in this model; its linears are "
            f"{', '.join(list(linears)[:4])}, ..."
        )
    reasons = stay_dense(model)
    outcome: dict[str, str] = {}
    try:
        for name in wanted:
            if not isinstance(linears[name], SparseLinear24):
                outcome[name] = reasons.get(name) or _swap(model, name)
            else:
                outcome[name] = PACKED
    finally:
        kept = {name: reason for name, reason in outcome.items() if reason != PACKED}
        attach(model, kept)
    if PACKED not in outcome.values():
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(outcome.items())[:3])
        raise ValueError(
            f"swap_linears: none of the {len(outcome)} linears can be packed ({shown}"
            f"{'; ...' if len(outcome) > 3 else ''}). Packing needs 2:4 weights: prune the model "
            'with sparsity="2:4" first'
        )
    return outcome


def unswap_linears(model: nn.Module) -> list[str]:
    """Restores the dense modules of all packed linears, exactly, and returns their names."""
    names = []
    for name, module in packed_linears(model).items():
        model.set_submodule(name, module.to_dense())
        names.append(name)
    attach(model, {})
    return names


def save_pretrained(
    model: Any,
    directory: str | os.PathLike[str],
    packed: bool = False,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a transformers checkpoint, as one step: `directory` appears whole or not at all.

    packed=False: dense weights with zeros and no quantization_config, which loads anywhere, swapped
    linears included. packed=True: 2:4 linears packed, which loads after `import wanda_ext`. The
    model itself is left as it was. Takes, beside the model, the memory of its other form.

    Raises ValueError for packed=True on a model that is not 2:4, and for a directory that exists
    and holds anything that was not written by wanda_ext.
    """
    with new_directory(directory) as folder, _in_form(model, packed):
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def stay_dense(model: nn.Module) -> dict[str, str]:
    """Name -> why it must stay dense, for linears that no look at their weights can clear."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    reasons = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        shared = [owner for owner in owners.get(id(module.weight), []) if owner != name]
        if shared:
            reasons[name] = f"shares its weight with {', '.join(shared)}"
        elif name.endswith(".base_layer"):
            reasons[name] = "has an adapter; merge it first"
        elif _is_hooked(module):
            reasons[name] = "carries hooks, which packing would drop; remove them first"
        elif not _is_plain(module):
            reasons[name] = f"a {type(module).__name__} computes more than x @ W.T + bias"
    return reasons


def _is_hooked(module: nn.Module) -> bool:
    patched = "forward" in vars(module) and not hasattr(module, "_hf_hook")  # accelerate's: devices
    return bool(module._forward_hooks or module._forward_pre_hooks or patched)


def _is_plain(module: nn.Module) -> bool:
    kind = type(module)
    if issubclass(kind, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight without calling it
    return kind.forward in (nn.Linear.forward, Conv1D.forward) or kind.__name__ == "FalconLinear"


def _swap(model: nn.Module, name: str) -> str:
    try:
        model.set_submodule(name, SparseLinear24.from_dense(model.get_submodule(name)))
    except ValueError as reason:
        return str(reason)
    return PACKED


def _refuse_quantized(model: nn.Module) -> None:
    if getattr(model, "is_quantized", False) and not attached(model):
        raise ValueError(
            f"swap_linears: the model is quantized ({getattr(model, 'quantization_method', '?')}); "
            "expected float32, bfloat16 or float16 weights: load it unquantized"
        )


@contextmanager
def _in_form(model: Any, packed: bool) -> Iterator[None]:
    """The model all dense, or packed, inside; its own modules and quantizer again after."""
    if packed == bool(packed_linears(model)):
        yield
        return
    before = dict(model.named_modules())
    dense = model.config.quantization_config.dense if attached(model) else {}
    try:
        if packed:
            swap_linears(model)
        else:
            unswap_linears(model)
        yield
    finally:
        for name, module in before.items():
            if name and model.get_submodule(name) is not module:
                model.set_submodule(name, module)
        attach(model, dense)
