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

from wanda_ext.checkpoint.load import load_config
from wanda_ext.checkpoint.quantizer import WandaExtConfig
from wanda_ext.checkpoint.reader import INDEX, Checkpoint, open_checkpoint
from wanda_ext.checkpoint.save import PACKED, check_some_packed, stay_dense
from wanda_ext.files import MARKER, new_directory
from wanda_ext.packed import PackedLinear, pack

# Index metadata: NAME.meta, and others of a packed linear -> its shard, if not NAME.weight's.
PACKED_FILES = "wanda_ext_meta_files"
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


@dataclass(frozen=True)
class _Conversion:
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
) -> dict[str, str]:
    """Writes the checkpoint in `src` to `dst` as "packed" or "dense"; exact both ways.

    Packed -> dense -> packed gives the same bytes again. Tokenizer and other files are copied;
    weights in other formats are not. `dst` appears whole or not at all. trust_remote_code: whether
    code that came with the checkpoint may run, which tells its linears where transformers does not.

    Returns name -> "packed", "dense" or why it stayed dense. Raises ValueError, before anything is
    written, for a checkpoint `open_checkpoint` refuses, one that is in that form already, one with
    nothing to pack, one whose config.json does not agree with its model on what is transposed, and
    a `dst` that exists and is not ours.
    """
    if to not in ("dense", PACKED):
        raise ValueError(f'convert: to: expected "packed" or "dense", got {to!r}')
    checkpoint = open_checkpoint(src)
    if (checkpoint.packed is not None) == (to == PACKED):
        raise ValueError(f"convert: {src} is {to} already")
    check_apart(src, dst)
    model = _skeleton(checkpoint, trust_remote_code)
    conversion = (_to_packed if to == PACKED else _to_dense)(checkpoint, model)
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


def _to_dense(checkpoint: Checkpoint, model: nn.Module) -> _Conversion:
    assert checkpoint.packed is not None
    _check_transposed(checkpoint, checkpoint.packed, model)
    packed = checkpoint.packed_linears()
    transposed = set(checkpoint.packed.transposed)
    if not transposed <= set(packed):
        raise ValueError(
            f"convert: {checkpoint.folder} stores its linears under other names than the model has;"
            " load the model and call wanda_ext.save_pretrained(model, directory) instead"
        )
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

    return _Conversion(outcome, layout, tensor, _parameters(packed), None, packed_files)


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


def _to_packed(checkpoint: Checkpoint, model: nn.Module) -> _Conversion:
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    transposed = [name for name, module in linears.items() if isinstance(module, Conv1D)]
    reasons = stay_dense(model)

    @functools.lru_cache(maxsize=1)  # the tensors of a linear are asked for in turn
    def packed(name: str) -> tuple[type[PackedLinear], dict[str, Tensor]]:
        weight = checkpoint.read(f"{name}.weight")
        return pack(weight.T if name in transposed else weight)

    kinds: dict[str, type[PackedLinear]] = {}
    entries: dict[str, tuple[str, dict[str, int]]] = {}
    layout = checkpoint.files()
    packed_files = checkpoint.index["metadata"].get(PACKED_FILES, {}) if checkpoint.index else {}

    def outcome_of(name: str) -> str:
        if name in reasons:
            return reasons[name]
        if f"{name}.weight" not in checkpoint.headers:
            return "stored under another name than the model has"
        try:
            kind, tensors = packed(name)
        except ValueError as reason:
            return str(reason)
        kinds[name], entries[name] = kind, (kind.FORMAT, kind.options(tensors))
        for short in tensors:
            full = f"{name}.{short}"
            layout.setdefault(full, packed_files.get(full, layout[f"{name}.weight"]))
        return PACKED

    def tensor(name: str) -> Tensor:
        linear, _, short = name.rpartition(".")
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
    return _Conversion(outcome, layout, tensor, _parameters(kinds), entry.to_dict())


def _parameters(kinds: Mapping[str, type[PackedLinear]]) -> set[str]:
    return {f"{name}.{short}" for name, kind in kinds.items() for short in kind.PARAMETERS}


def _skeleton(checkpoint: Checkpoint, trust: bool) -> nn.Module:
    """The checkpoint's model without weights: which modules are linears, and which share."""
    import transformers

    kinds = checkpoint.config.get("architectures") or ["none"]
    kind: Any = getattr(transformers, kinds[0], None)
    own = [
        auto
        for auto, path in (checkpoint.config.get("auto_map") or {}).items()
        if str(path).endswith(f".{kinds[0]}")
    ]
    if kind is None and not (own and trust):
        code = "pass `trust_remote_code=True` to run the code that came with it, or " if own else ""
        raise ValueError(
            f"convert: {checkpoint.folder}: transformers has no architecture {kinds[0]!r}; {code}"
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


def _write(checkpoint: Checkpoint, conversion: _Conversion, folder: Path) -> None:
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
    if checkpoint.index is None:
        return
    metadata = {k: v for k, v in checkpoint.index["metadata"].items() if k != PACKED_FILES}
    metadata["total_size"] = total_size
    if "total_parameters" in metadata:
        metadata["total_parameters"] += parameters
    if conversion.packed_files:
        metadata[PACKED_FILES] = conversion.packed_files
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": conversion.layout})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Byte for byte as transformers writes its own."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
