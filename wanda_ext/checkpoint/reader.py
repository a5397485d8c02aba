"""Checkpoint directories read as files: config, index and headers, and whether they agree."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from wanda_ext.checkpoint.conversion import Loading
from wanda_ext.checkpoint.load import check_floats
from wanda_ext.checkpoint.quantizer import QUANT_METHOD, WandaExtConfig, check_headers
from wanda_ext.files import (
    Stored,
    TensorHeader,
    check_inside,
    is_plain,
    read_headers,
    stored_tensors,
)
from wanda_ext.packed import FORMATS, PackedLinear, sound_linears, stored_linears

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checked directory; `packed` is None where it is dense, `index` where it is one file."""

    folder: Path
    config: dict[str, Any]
    packed: WandaExtConfig | None
    index: dict[str, Any] | None
    headers: dict[str, TensorHeader]

    def read(self, name: str) -> Tensor:
        with safe_open(self.headers[name].file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor

    def files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        return {name: header.file.name for name, header in self.headers.items()}

    def stored(self) -> dict[str, Stored]:
        """Tensor name -> where it lies. Raises ValueError for a dtype that torch does not have."""
        return stored_tensors(sorted({header.file for header in self.headers.values()}))

    def packed_linears(self) -> dict[str, type[PackedLinear]]:
        """Names, as stored, of the packed linears, and their formats."""
        if self.packed is None:
            return {}
        named = {kind for kind, _ in self.packed.packed.values()}
        return {
            name: kind
            for kind in FORMATS
            if kind.FORMAT in named
            for name in stored_linears(self.headers, kind)
        }

    def read_packed(self, name: str, kind: type[PackedLinear]) -> dict[str, Tensor]:
        """The tensors of a packed linear, by their short names. Raises ValueError where they are no
        weight."""
        stored = stored_linears(self.headers, kind)[name]
        tensors = {short: self.read(f"{name}.{short}") for short in stored}
        problem = kind.problem_in(tensors)
        if problem:
            raise ValueError(f"{self.folder}: {name} {problem}; copy or download it again")
        return tensors


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Reads config, index and headers of a dense or packed checkpoint; no tensor yet.

    Raises ValueError, which says what to do, for a directory that is not a whole safetensors
    checkpoint, has a link or a file name that leads out of it, is quantized by another method, or
    was packed by a newer wanda_ext.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory; expected a downloaded checkpoint")
    config = _read_json(folder, "config.json")
    entry = config.get("quantization_config")
    if entry is not None and not isinstance(entry, dict):
        raise ValueError(
            f"{folder}: config.json: quantization_config is {entry!r}; expected a mapping, or none"
        )
    if entry is not None and entry.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{folder}: quantized by {entry.get('quant_method')!r}; expected a dense checkpoint or "
            "one packed by wanda_ext"
        )
    index = None
    names = {WEIGHTS}
    if not (folder / WEIGHTS).exists():
        index = _read_index(folder)
        names = set(index["weight_map"].values())
    for name in names:
        check_inside(folder / name, folder)
    headers = read_headers(folder / name for name in sorted(names))
    absent = [] if index is None else [name for name in index["weight_map"] if name not in headers]
    if absent:
        raise ValueError(
            f"{folder}: {INDEX} lists {absent[0]}, which no file holds; copy or download it again"
        )
    headers = {name: headers[name] for name in sorted(headers, key=Loading.dot_natural_key)}
    packed = None if entry is None else WandaExtConfig(**entry)
    checkpoint = Checkpoint(folder, config, packed, index, headers)
    if packed is not None:
        check_headers(headers, packed)
    elif any(sound_linears(headers, kind) for kind in FORMATS):
        raise ValueError(
            f"{folder}: the files hold packed linears, but config.json has no quantization_config; "
            "restore its config.json"
        )
    check_floats(folder, headers)
    return checkpoint


def holds_safetensors(folder: str | os.PathLike[str]) -> bool:
    """Whether this is a local directory with a checkpoint that `open_checkpoint` may read."""
    return any((Path(folder) / name).exists() for name in (WEIGHTS, INDEX))


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    check_inside(path, folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); expected a transformers checkpoint directory"
        ) from error
    return content


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).exists():
        shards = any(folder.glob("model-*.safetensors"))
        problem = f"has shards, but not their {INDEX}" if shards else f"has no {WEIGHTS}"
        raise ValueError(
            f"{folder} {problem}; wanda_ext reads whole safetensors checkpoints: copy or download "
            "it again, or save it with save_pretrained"
        )
    index = _read_json(folder, INDEX)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{folder / INDEX} has no weight_map; copy or download it again")
    for name, file in files.items():
        if not is_plain(file) or not file.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX} puts {name} into {file}; expected a .safetensors file beside it"
            )
    return index
