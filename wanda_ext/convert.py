"""Checkpoint directories converted between dense and packed, without instantiating the model.

Works tensor by tensor on safetensors, so it needs the memory of one shard.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from wanda_ext.checkpoint import PACKED, stay_dense
from wanda_ext.directory import MARKER, new_directory
from wanda_ext.linear import pack
from wanda_ext.quantizer import WandaExtConfig
from wanda_ext.reader import INDEX, Checkpoint, open_checkpoint

META_FILES = "wanda_ext_meta_files"  # index metadata: NAME.meta -> its shard, if not NAME.weight's
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


@dataclass(frozen=True)
class _Conversion:
    """What to write: tensor name -> shard, how to make a tensor, and what config and index say."""

    outcome: dict[str, str]
    layout: dict[str, str]
    tensor: Callable[[str], Tensor]
    parameters: int  # how many more of them than in the source
    quantization_config: Mapping[str, Any] | None = None
    meta_files: dict[str, str] = field(default_factory=dict)


def convert(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], to: str = PACKED
) -> dict[str, str]:
    """Writes the checkpoint in `src` to `dst` as "packed" or "dense"; exact both ways.

    Packed -> dense -> packed gives the same bytes again. Tokenizer and other files are copied;
    weights in other formats are not. `dst` appears whole or not at all.

    Returns name -> "packed", "dense" or why it stayed dense. Raises ValueError, before anything is
    written, for a checkpoint `open_checkpoint` refuses, one that is in that form already, one with
    nothing to pack, and a `dst` that exists and is not ours.
    """
    if to not in ("dense", PACKED):
        raise ValueError(f'convert: to: expected "packed" or "dense", got {to!r}')
    checkpoint = open_checkpoint(src)
    if (checkpoint.packed is not None) == (to == PACKED):
        raise ValueError(f"convert: {src} is {to} already")
    check_apart(src, dst)
    conversion = (_to_packed if to == PACKED else _to_dense)(checkpoint)
    with new_directory(dst) as folder:
        _write(checkpoint, conversion, folder)
        copy_other_files(checkpoint.folder, folder)
    return conversion.outcome


def check_apart(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Raises ValueError where one directory is, or lies in, the other."""
    source, target = Path(src).resolve(), Path(dst).resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"{dst} and {src} overlap; name a directory outside it")


def copy_other_files(source: Path, folder: Path) -> None:
    """Copies a checkpoint's tokenizer, code and so on: not its config, and no weights."""
    for path in source.iterdir():
        if path.name in ("config.json", MARKER) or path.name.endswith(OTHER_WEIGHTS):
            continue
        if path.is_dir() and not path.name.startswith("."):
            ignore = shutil.ignore_patterns(*(f"*{suffix}" for suffix in OTHER_WEIGHTS))
            shutil.copytree(path, folder / path.name, ignore=ignore, dirs_exist_ok=True)
        elif path.is_file():
            shutil.copy(path, folder / path.name)


def _to_dense(checkpoint: Checkpoint) -> _Conversion:
    assert checkpoint.packed is not None
    names = checkpoint.packed_names()
    transposed = set(checkpoint.packed.transposed)
    if not transposed <= set(names):
        raise ValueError(
            f"convert: {checkpoint.folder} stores its linears under other names than the model has;"
            " load the model and call wanda_ext.save_pretrained(model, directory) instead"
        )
    outcome = dict.fromkeys(names, "dense")
    layout = checkpoint.files()
    meta_files = {}
    for name in names:
        file = layout.pop(f"{name}.meta")
        if file != layout[f"{name}.weight"]:
            meta_files[f"{name}.meta"] = file

    def tensor(name: str) -> Tensor:
        linear = name.removesuffix(".weight")
        if linear not in outcome:
            return checkpoint.read(name)
        weight = checkpoint.read_dense(linear)
        return weight.T.contiguous() if linear in transposed else weight

    pruned = sum(checkpoint.headers[f"{name}.weight"].numel for name in names)
    return _Conversion(outcome, layout, tensor, pruned, None, meta_files)


def _to_packed(checkpoint: Checkpoint) -> _Conversion:
    model = _skeleton(checkpoint)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    transposed = [name for name, module in linears.items() if isinstance(module, Conv1D)]
    reasons = stay_dense(model)

    @functools.lru_cache(maxsize=1)  # values and metadata of a weight are asked for in turn
    def packed(name: str) -> tuple[Tensor, Tensor]:
        weight = checkpoint.read(f"{name}.weight")
        return pack(weight.T if name in transposed else weight)

    def outcome_of(name: str) -> str:
        if name in reasons:
            return reasons[name]
        if f"{name}.weight" not in checkpoint.headers:
            return "stored under another name than the model has"
        try:
            packed(name)
        except ValueError as reason:
            return str(reason)
        return PACKED

    def tensor(name: str) -> Tensor:
        linear, _, kind = name.rpartition(".")
        if kind == "weight" and linear in names:
            return packed(linear)[0]
        return packed(linear)[1] if kind == "meta" else checkpoint.read(name)

    outcome = {name: outcome_of(name) for name in linears}
    names = [name for name, what in outcome.items() if what == PACKED]
    if not names:
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(outcome.items())[:3])
        raise ValueError(f"convert: {checkpoint.folder}: no linear can be packed ({shown})")
    layout = checkpoint.files()
    meta_files = checkpoint.index["metadata"].get(META_FILES, {}) if checkpoint.index else {}
    for name in names:
        layout[f"{name}.meta"] = meta_files.get(f"{name}.meta", layout[f"{name}.weight"])
    entry = WandaExtConfig(
        names,
        [name for name in transposed if outcome[name] == PACKED],
        {name: reason for name, reason in outcome.items() if reason != PACKED},
    )
    pruned = sum(checkpoint.headers[f"{name}.weight"].numel // 2 for name in names)
    return _Conversion(outcome, layout, tensor, -pruned, entry.to_dict())


def _skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's model without weights: which modules are linears, and which share."""
    import transformers

    kinds = checkpoint.config.get("architectures") or ["none"]
    kind = getattr(transformers, kinds[0], None)
    if kind is None:
        raise ValueError(
            f"convert: {checkpoint.folder}: transformers has no architecture {kinds[0]!r}; load "
            "the model and call wanda_ext.save_pretrained(model, directory, packed=True) instead"
        )
    with torch.device("meta"):
        model: nn.Module = kind(transformers.AutoConfig.from_pretrained(checkpoint.folder))
    model.tie_weights()  # type: ignore[operator]
    return model


def _write(checkpoint: Checkpoint, conversion: _Conversion, folder: Path) -> None:
    shards = defaultdict(list)
    for name, file in conversion.layout.items():
        shards[file].append(name)
    with safe_open(next(iter(checkpoint.headers.values())).file, framework="pt") as source:
        file_metadata = source.metadata()
    total_size = 0
    for file, names in sorted(shards.items()):
        tensors = {name: conversion.tensor(name) for name in names}
        save_file(tensors, folder / file, file_metadata)
        total_size += sum(tensor.nbytes for tensor in tensors.values())

    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    if conversion.quantization_config is not None:
        config["quantization_config"] = conversion.quantization_config
    write_json(folder / "config.json", config)
    if checkpoint.index is None:
        return
    metadata = {k: v for k, v in checkpoint.index["metadata"].items() if k != META_FILES}
    metadata["total_size"] = total_size
    if "total_parameters" in metadata:
        metadata["total_parameters"] += conversion.parameters
    if conversion.meta_files:
        metadata[META_FILES] = conversion.meta_files
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": conversion.layout})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Byte for byte as transformers writes its own."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
