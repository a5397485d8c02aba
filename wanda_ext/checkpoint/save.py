"""Packed linears in and out of a model, and models in and out of directories."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from wanda_ext.checkpoint.conversion import names_apart
from wanda_ext.checkpoint.label import quantized_by, unlabelled
from wanda_ext.checkpoint.quantizer import attach, attached, packed_linears, wrapped_state
from wanda_ext.files import new_directory
from wanda_ext.packed import (
    FORMATS,
    PackedLinear,
    cannot_run,
    check_tokens,
    computes_weight,
    find_groups,
    merged,
    not_faster,
    pack,
    row_major,
)

PACKED = "packed"
_WHERE = re.compile(r"(?<=not 2:4): row \d+, columns \d+ to \d+ hold \d+ non-zeros")


def swap_linears(
    model: nn.Module,
    names: Iterable[str] | None = None,
    fuse: bool = False,
    *,
    tokens: Sequence[int] | None = None,
) -> dict[str, str]:
    """Replaces every linear whose weight fits a packed format; name -> "packed" or why not.

    2:4 weights become a SparseLinear24, others with enough zeros a SparseLinearBitmap: 16:32, 8:16,
    4:8 and unstructured ones. Any model will do, pruned by wanda_ext or not.

    names: only these modules (default: all). fuse: merge 2:4 ones that read one input (q, k and v;
    gate and up), so that one product computes them. tokens: only where packed is faster, summed
    over calls of so many rows, by the measured times of the device (see `wanda_ext.bench.tune`).
    The model's own save_pretrained then writes a packed checkpoint, the same bytes with `fuse` and
    without.

    Raises ValueError for a name that is no linear of the model, for a model quantized by another
    method, and, without `tokens`, if nothing could be packed; the model is then as it was.
    """
    model = _uncompiled(model)
    _refuse_quantized(model)
    linears = _linears(model)
    names = [names] if isinstance(names, str) else names
    wanted = linears if names is None else list(names)
    unknown = [name for name in wanted if name not in linears]
    if unknown:
        raise ValueError(
            f"swap_linears: {', '.join(unknown)}: no such linear in this model; its linears are "
            f"{', '.join(linears[:4])}, ..."
        )
    if tokens is not None:
        check_tokens(tokens)
        return _pack(model, wanted, fuse, partial(not_faster, tokens=tokens))
    outcome = _pack(model, wanted, fuse, cannot_run)
    check_some_packed(outcome)
    return outcome


def unswap_linears(model: nn.Module) -> list[str]:
    """Restores the dense modules of all packed linears, exactly, and returns their names.

    Raises ValueError, before anything is changed, where one is offloaded or on the meta device.
    """
    model = _uncompiled(model)
    packed = packed_linears(model)
    for name, module in packed.items():
        if module.weight.is_meta:
            raise ValueError(
                f"unswap_linears: {name} is not in memory (offloaded, or on the meta device): load "
                "the model, or place it, without offloading first"
            )
    for name, module in packed.items():
        _replace(model, name, module.to_dense())
    attach(model, {})
    return list(packed)


def save_pretrained(
    model: Any,
    directory: str | os.PathLike[str],
    packed: bool = False,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a transformers checkpoint, as one step: `directory` appears whole or not at all.

    packed=False: dense weights with zeros and no quantization_config, which loads anywhere, swapped
    linears included. packed=True: pruned linears packed, as swap_linears does, which loads after
    `import wanda_ext`. The model itself is left as it was. Takes, beside the model, the memory of
    its other form. A model behind torch.compile, whole or block by block, is written as without.

    Raises ValueError for packed=True on a model with nothing to pack, and for a directory that
    exists and holds anything that was not written by wanda_ext.
    """
    model = _uncompiled(model)
    with new_directory(directory) as folder, in_form(model, packed):
        state = wrapped_state(model)
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def stay_dense(model: nn.Module) -> dict[str, str]:
    """Name -> why it must stay dense, for linears that no look at their weights can clear."""
    owners: dict[int, list[str]] = {}
    linears = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    readable = names_apart(model, linears)
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
        elif computes_weight(module):
            reasons[name] = "its weight is computed anew for every call; make it a parameter first"
        elif name.endswith("._orig_mod"):
            reasons[name] = "is compiled by itself, and would run on as it is; compile its block"
        elif _is_hooked(module):
            reasons[name] = "carries hooks, which packing would drop; remove them first"
        elif not _is_plain(module):
            reasons[name] = f"a {type(module).__name__} computes more than x @ W.T + bias"
        elif name not in readable:
            reasons[name] = "transformers would read its packed tensors as something else"
    return reasons


def _is_hooked(module: nn.Module) -> bool:
    patched = "forward" in vars(module) and not hasattr(module, "_hf_hook")  # accelerate's: devices
    return bool(module._forward_hooks or module._forward_pre_hooks or patched)


def _is_plain(module: nn.Module) -> bool:
    kind = type(module)
    if issubclass(kind, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight without calling it
    return kind.forward in (nn.Linear.forward, Conv1D.forward) or kind.__name__ == "FalconLinear"


def _pack(
    model: nn.Module, names: Iterable[str], fuse: bool, refusal: Callable[..., str]
) -> dict[str, str]:
    """Packs what it can of these linears; refusal(device, dtype, n, k, packed=) says why not."""
    reasons = stay_dense(model)
    outcome: dict[str, str] = {}
    try:
        for name in names:
            module = model.get_submodule(name)
            if not isinstance(module, PackedLinear):
                outcome[name] = reasons.get(name) or _swap(model, name, refusal)
            else:
                outcome[name] = PACKED
        for members in find_groups(model) if fuse else ():
            if members.keys() <= outcome.keys():
                for name, member in merged(members).items():
                    model.set_submodule(name, member)
    finally:
        kept = {name: reason for name, reason in outcome.items() if reason != PACKED}
        attach(model, kept)
    return outcome


def _swap(model: nn.Module, name: str, refusal: Callable[..., str]) -> str:
    dense = model.get_submodule(name)
    weight = row_major(dense)
    where = (weight.device, weight.dtype, *weight.shape)
    refused = {kind: refusal(*where, packed=kind.FORMAT) for kind in FORMATS}
    if all(refused.values()) and len({*refused.values()}) == 1:
        return refused[FORMATS[0]]
    try:
        kind, tensors = pack(weight, refused)
    except ValueError as reason:
        return str(reason)
    _replace(model, name, kind.holding(dense, tensors))
    return PACKED


def check_some_packed(outcome: Mapping[str, str], where: str = "") -> None:
    """Raises ValueError, after `where`, if no linear of name -> "packed" or why not is packed."""
    if PACKED not in outcome.values():
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(outcome.items())[:3])
        told = f"{where}none of the {len(outcome)} linears can be packed ({shown}"
        told += f"{'; ...' if len(outcome) > 3 else ''})"
        if any("not pruned" in reason for reason in outcome.values()):
            told += (
                '. Packing needs pruned weights: prune first, with sparsity="2:4", "16:32" or 0.5'
            )
        raise ValueError(told)


def dense_by_reason(outcome: Mapping[str, str]) -> dict[str, list[str]]:
    """Of name -> "packed" or why not: the linears that stay dense, by reason."""
    found: dict[str, list[str]] = {}
    for name, reason in outcome.items():
        if reason != PACKED:
            found.setdefault(_WHERE.sub("", reason), []).append(name)
    return found


def told_packed(outcome: Mapping[str, str], told: str) -> str:
    """One line: `told`, which has two places for how many of how many are packed, and why not."""
    packed = sum(reason == PACKED for reason in outcome.values())
    parts = [told.format(packed, len(outcome))]
    for reason, (first, *others) in dense_by_reason(outcome).items():
        more = f" and {len(others)} more" if others else ""
        parts.append(f"{first}{more}: {reason}")
    return "; ".join(parts)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in, under the hook by which accelerate moves inputs to its device."""
    hook = getattr(model.get_submodule(name), "_hf_hook", None)
    if hook is not None:
        import_module("accelerate.hooks").add_hook_to_module(module, hook)
    model.set_submodule(name, module)


def _uncompiled(model: Any) -> Any:
    """The model that torch.compile has wrapped as a whole, or the model itself."""
    return getattr(model, "_modules", {}).get("_orig_mod", model)


def _linears(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, Conv1D, PackedLinear)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _refuse_quantized(model: nn.Module) -> None:
    label = "" if attached(model) else quantized_by(model)
    if label:
        raise ValueError(
            f"swap_linears: the model is quantized ({label}); expected float32, bfloat16 or "
            "float16 weights: load it unquantized"
        )


@contextmanager
def in_form(model: Any, packed: bool) -> Iterator[None]:
    """The model all dense, or packed, inside; its own modules and quantizer again after.

    A label of quantization that its weights belie is off inside, and so not saved.
    """
    before = dict(model.named_modules())
    dense = model.config.quantization_config.dense if attached(model) else {}
    labelled = attached(model) or quantized_by(model)
    with nullcontext() if labelled else unlabelled(model):
        try:
            if packed:
                check_some_packed(_pack(model, _linears(model), False, lambda *_, **__: ""))
            else:
                unswap_linears(model)
            yield
        finally:
            for name, module in before.items():
                if name and model.get_submodule(name) is not module:
                    model.set_submodule(name, module)
            attach(model, dense)
