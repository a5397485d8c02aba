"""Checkpoint directories converted between dense and packed, without instantiating the model.

Works tensor by tensor on safetensors, so it needs the memory of one shard.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from wanda_ext.checkpoint.architecture import named_class
from wanda_ext.checkpoint.conversion import Conversion, made_of
from wanda_ext.checkpoint.load import lacking, load_config, misshapen, mistyped, shared_names
from wanda_ext.checkpoint.other_files import copy_other_files
from wanda_ext.checkpoint.quantizer import WandaExtConfig
from wanda_ext.checkpoint.reader import INDEX, Checkpoint, open_checkpoint
from wanda_ext.checkpoint.save import PACKED, check_some_packed, stay_dense
from wanda_ext.files import is_plain, new_directory
from wanda_ext.packed import PackedLinear, pack, stored_linears

# Index metadata: NAME.meta, and others of a packed linear -> its shard, if not NAME.weight's.
PACKED_FILES = "wanda_ext_meta_files"


class Converted(dict[str, str]):
    """Name -> "packed", "dense" or why it stayed dense; `left`: file -> why it did not go along."""

    left: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class _Written:
    """What to write: tensor name -> shard, how to make a tensor, and what config and index say."""

    outcome: dict[str, str]
    layout: dict[str, str]
    tensor: Callable[[str], Tensor]
    parameters: set[str]  # the tensors that hold others of them than in the source
    quantization_config: Mapping[str, Any] | None = None
    packed_files: dict[str, str] = field(default_factory=dict)


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str = PACKED,
    *,
    trust_remote_code: bool = False,
) -> Converted:
    """Writes the checkpoint in `src` to `dst` as "packed" or "dense"; exact both ways.

    Packed -> dense -> packed gives the same bytes again. Every tensor and every other file goes
    along, except weights in another form, links that lead out of `src` and, without
    trust_remote_code, code. `dst` appears whole or not at all. trust_remote_code: whether code that
    came with the checkpoint may run, which tells its linears where transformers does not.

    Returns name -> "packed", "dense" or why it stayed dense; its `left` names the files that were
    left, and why. Raises ValueError, before anything is written, for a checkpoint `open_checkpoint`
    refuses, one that is in that form already, one with nothing to pack, one whose config.json does
    not agree with its model on what is transposed, one that lacks tensors of its model or has them
    in other shapes, and a `dst` that exists and is not ours.
    """
    if to not in ("dense", PACKED):
        raise ValueError(f'convert: to: expected "packed" or "dense", got {to!r}')
    checkpoint = open_checkpoint(src)
    if (checkpoint.packed is not None) == (to == PACKED):
        raise ValueError(f"convert: {src} is {to} already")
    check_apart(src, dst)
    model = _skeleton(checkpoint, trust_remote_code)
    _check_whole(checkpoint, model)
    conversion = (_to_packed if to == PACKED else _to_dense)(checkpoint, model)
    with new_directory(dst) as folder:
        _write(checkpoint, conversion, folder)
        outcome = Converted(conversion.outcome)
        done = {*checkpoint.files().values(), INDEX}
        outcome.left = copy_other_files(checkpoint.folder, folder, trust_remote_code, done)
    return outcome


def _check_whole(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Raises ValueError where a tensor of the model is not stored, or in another shape."""
    kind, packed = type(model).__name__, checkpoint.packed_linears()
    apart = {f"{name}.{short}" for name, of in packed.items() for short in of.TENSORS}
    dense = {name: one for name, one in checkpoint.stored().items() if name not in apart}
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    here: dict[str, tuple[int, ...]] = {}
    for group in Conversion(model, dense).groups:
        try:
            made = made_of(model, group, {name: dense[name] for _, name in group.parts})
        except Exception as error:
            raise ValueError(
                f"convert: {checkpoint.folder}: transformers cannot make {group.first} of "
                f"{', '.join(group.names)} ({error}); copy or download it again"
            ) from error
        here |= {name: tuple(one.shape) for name, one in made.items()}
        if tensors[group.first].is_floating_point():
            for _, name in group.parts:
                if not dense[name].stored.is_floating_point:
                    raise mistyped(f"convert: {checkpoint.folder}", name, dense[name].stored)
    for group in Conversion(model, (f"{name}.weight" for name in packed)).groups:
        name, base = (one.removesuffix(".weight") for one in (group.first, group.names[0]))
        of, stored = packed[base], stored_linears(checkpoint.headers, packed[base])[base]
        empty = of.shaped_like(model.get_submodule(name), **of.options(stored))
        shapes = {short: tuple(one.shape) for short, one in empty.tensors().items()}
        alike = all(shape == tuple(stored[short].shape) for short, shape in shapes.items())
        if "shape" in stored:  # padding hides it
            own = [empty.out_features, empty.in_features]
            alike &= checkpoint.read(f"{base}.shape").tolist() == own
        if not alike:
            raise ValueError(
                f"convert: {checkpoint.folder}: {base} is packed as another shape than {kind} "
                "has; copy or download it again"
            )
        here[group.first] = tuple(tensors[group.first].shape)
    computed = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    absent = [names[0] for names in shared_names(tensors) if not here.keys() & set(names)]
    absent = [name for name in absent if not any(re.search(p, name) for p in computed)]
    if absent:
        raise lacking(f"convert: {checkpoint.folder}", kind, absent)
    for name, shape in here.items():
        if shape != tuple(tensors[name].shape):
            where = f"convert: {checkpoint.folder}"
            raise misshapen(where, name, shape, kind, tensors[name].shape)


def check_apart(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Raises ValueError where one directory is, or lies in, the other."""
    source, target = Path(src).resolve(), Path(dst).resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"{dst} and {src} overlap; name a directory outside it")


def _to_dense(checkpoint: Checkpoint, model: nn.Module) -> _Written:
    assert checkpoint.packed is not None
    _check_transposed(checkpoint, checkpoint.packed, model)
    packed = checkpoint.packed_linears()
    transposed = _stored_names(checkpoint, checkpoint.packed.transposed, model)
    outcome = dict.fromkeys(packed, "dense")
    layout = checkpoint.files()
    packed_files = {}
    for name, kind in packed.items():
        for short in kind.TENSORS[1:]:
            file = layout.pop(f"{name}.{short}", None)
            if file not in (None, layout[f"{name}.weight"]):
                packed_files[f"{name}.{short}"] = file

    def tensor(name: str) -> Tensor:
        linear = name.removesuffix(".weight")
        if linear not in outcome:
            return checkpoint.read(name)
        weight = packed[linear].unpack(checkpoint.read_packed(linear, packed[linear]))
        return weight.T.contiguous() if linear in transposed else weight

    return _Written(outcome, layout, tensor, _parameters(packed), None, packed_files)


def _check_transposed(checkpoint: Checkpoint, packed: WandaExtConfig, model: nn.Module) -> None:
    """Raises ValueError unless the weights to be transposed are those of the model's Conv1Ds."""
    modules = dict(model.named_modules())
    turned = {name for name in packed.packed if isinstance(modules.get(name), Conv1D)}
    wrong = sorted(turned ^ set(packed.transposed))
    if wrong:
        what = "does not name" if wrong[0] in turned else "names"
        found = f"a {type(modules[wrong[0]]).__name__}" if wrong[0] in modules else "nothing"
        raise ValueError(
            f"convert: {checkpoint.folder}: config.json {what} as transposed {wrong[0]}, which is "
            f"{found} in {type(model).__name__}; copy or download it again"
        )


def _stored_names(checkpoint: Checkpoint, names: Iterable[str], model: nn.Module) -> set[str]:
    """Of packed linears, as the files have them."""
    names = set(names)
    if names <= checkpoint.packed_linears().keys():
        return names
    stored = Conversion(model, (f"{name}.weight" for name in checkpoint.packed_linears()))
    found = {
        group.first.removesuffix(".weight"): group.names[0].removesuffix(".weight")
        for group in stored.groups
        if group.rule is None
    }
    if not names <= found.keys():
        raise ValueError(
            f"convert: {checkpoint.folder} stores its linears under other names than the model has;"
            " load the model and call wanda_ext.save_pretrained(model, directory) instead"
        )
    return {found[name] for name in names}


def _to_packed(checkpoint: Checkpoint, model: nn.Module) -> _Written:
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    transposed = [name for name, module in linears.items() if isinstance(module, Conv1D)]
    reasons = stay_dense(model)
    names = {}  # of packed linears as the files have them
    conversion = Conversion(model, checkpoint.headers)
    for group in conversion.groups:
        name, base = (one.removesuffix(".weight") for one in (group.first, group.names[0]))
        if name in linears and len(group.names) == 1 and conversion.reads_back(base, name):
            names[name] = base
    modules = {base: name for name, base in names.items()}

    @functools.lru_cache(maxsize=1)  # the tensors of a linear are asked for in turn
    def packed(name: str) -> tuple[type[PackedLinear], dict[str, Tensor]]:
        weight = checkpoint.read(f"{names[name]}.weight")
        return pack(weight.T if name in transposed else weight)

    kinds: dict[str, type[PackedLinear]] = {}
    entries: dict[str, tuple[str, dict[str, int]]] = {}
    layout = checkpoint.files()
    packed_files = _packed_files(checkpoint)

    def outcome_of(name: str) -> str:
        if name in reasons:
            return reasons[name]
        if name not in names:
            return "the files hold its weight in another form, or joined with others"
        try:
            kind, tensors = packed(name)
        except ValueError as reason:
            return str(reason)
        kinds[name], entries[name] = kind, (kind.FORMAT, kind.options(tensors))
        for short in tensors:
            full = f"{names[name]}.{short}"
            layout.setdefault(full, packed_files.get(full, layout[f"{names[name]}.weight"]))
        return PACKED

    def tensor(name: str) -> Tensor:
        base, _, short = name.rpartition(".")
        linear = modules.get(base, "")
        if linear in kinds and short in kinds[linear].TENSORS:
            return packed(linear)[1][short]
        return checkpoint.read(name)

    outcome = {name: outcome_of(name) for name in linears}
    check_some_packed(outcome, f"convert: {checkpoint.folder}: ")
    entry = WandaExtConfig.of(
        entries,
        [name for name in transposed if outcome[name] == PACKED],
        {name: reason for name, reason in outcome.items() if reason != PACKED},
    )
    parameters = _parameters({names[name]: kind for name, kind in kinds.items()})
    return _Written(outcome, layout, tensor, parameters, entry.to_dict())


def _parameters(kinds: Mapping[str, type[PackedLinear]]) -> set[str]:
    return {f"{name}.{short}" for name, kind in kinds.items() for short in kind.PARAMETERS}


def _packed_files(checkpoint: Checkpoint) -> dict[str, str]:
    """What an earlier conversion has left in the index: a packed linear's tensor -> its file."""
    found = _metadata(checkpoint).get(PACKED_FILES, {})
    if not isinstance(found, dict):
        found = {PACKED_FILES: found}
    for name, file in found.items():
        if not is_plain(file) or not file.endswith(".safetensors"):
            raise ValueError(
                f"convert: {checkpoint.folder / INDEX} puts {name} into {file}; expected a "
                f".safetensors file beside it: remove {PACKED_FILES} there"
            )
    return found


def _metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    metadata = (checkpoint.index or {}).get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _skeleton(checkpoint: Checkpoint, trust: bool) -> nn.Module:
    """The checkpoint's model without weights: which modules are linears, and which share."""
    config = load_config(checkpoint.folder, trust_remote_code=trust)
    kind = named_class(config)
    named = [*(getattr(config, "architectures", None) or ()), "none"][0]
    code = checkpoint.config.get("auto_map")
    code = code if isinstance(code, dict) else {}
    own = [auto for auto, path in code.items() if str(path).endswith(f".{named}")]
    if kind is None and not (own and trust):
        code = "pass `trust_remote_code=True` to run the code that came with it, or " if own else ""
        raise ValueError(
            f"convert: {checkpoint.folder}: transformers has no architecture {named!r}; {code}"
            "load the model and call wanda_ext.save_pretrained(model, directory, packed=...)"
        )
    config = load_config(checkpoint.folder, trust_remote_code=trust)
    with torch.device("meta"):
        model: nn.Module = (
            getattr(transformers, own[0]).from_config(config, trust_remote_code=True)
            if own and trust
            else kind(config)
        )
    model.tie_weights()  # type: ignore[operator]
    return model


def _write(checkpoint: Checkpoint, conversion: _Written, folder: Path) -> None:
    shards = defaultdict(list)
    for name, file in conversion.layout.items():
        shards[file].append(name)
    with safe_open(next(iter(checkpoint.headers.values())).file, framework="pt") as source:
        file_metadata = source.metadata()
    total_size = 0
    headers = checkpoint.headers
    parameters = -sum(headers[name].numel for name in conversion.parameters if name in headers)
    for file, names in sorted(shards.items()):
        names.sort(key=lambda name: name.rpartition(".")[0])  # a linear is packed once
        tensors = {name: conversion.tensor(name) for name in names}
        save_file(tensors, folder / file, file_metadata)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        parameters += sum(tensors[name].numel() for name in conversion.parameters & {*tensors})

    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    if conversion.quantization_config is not None:
        config["quantization_config"] = conversion.quantization_config
    write_json(folder / "config.json", config)
    parameters += _metadata(checkpoint).get("total_parameters", 0)
    layout, packed_files = conversion.layout, conversion.packed_files
    write_index(folder, checkpoint, layout, total_size, parameters, packed_files)


def write_index(
    folder: Path,
    source: Checkpoint,
    layout: Mapping[str, str],
    nbytes: int,
    parameters: int,
    packed_files: Mapping[str, str] | None = None,
) -> None:
    """The source's index for what its tensors became; nothing where the source has none.

    layout: tensor -> file. packed_files: see PACKED_FILES; None: as the source has them.
    """
    if source.index is None:
        return
    metadata = {**_metadata(source), "total_size": nbytes}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = parameters
    if packed_files is not None:
        metadata.pop(PACKED_FILES, None)
    if packed_files:
        metadata[PACKED_FILES] = packed_files
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": layout})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Byte for byte as transformers writes its own."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
