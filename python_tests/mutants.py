"""Checkpoint directories with one thing wrong, drawn from a seed.

A mutant is a whole copy of a good checkpoint, dense or packed, in one file or in several, with one
change that damage, a bad download or an attacker could make.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models_24 import wide_model
from tiny_models import tiny_tokenizer

import wanda_ext

WEIGHTS = ("model.safetensors", "model-00001-of-00002.safetensors")
JUNK: tuple[Any, ...] = ([], "x", 5, None, {}, -1, True, 1e30, [[]], {"a": {}})


@dataclass(frozen=True)
class Mutant:
    """data: whether bits of weights changed, which nothing can tell from other weights."""

    told: str
    data: bool = False


# --- The good ones --------------------------------------------------------------------------------


@functools.cache
def _model(pattern: str) -> Any:
    return wide_model(pattern, dtype=torch.float32)


def good(folder: Path) -> list[Path]:
    """Checkpoints to mutate, in directories under `folder`; text.txt beside them."""
    made = []
    for name, pattern, packed, shard in (
        ("dense", "16:32", False, "1GB"),
        ("shards", "16:32", False, "1MB"),
        ("packed", "mixed", True, "1GB"),
        ("packed_shards", "mixed", True, "1MB"),
        ("records", "16:32", True, "1GB"),
    ):
        made.append(folder / name)
        options = {"packed": packed, "max_shard_size": shard, "tokenizer": tiny_tokenizer()}
        wanda_ext.save_pretrained(_model(pattern), made[-1], **options)
    (folder / "text.txt").write_text(" ".join(f"word{i} of line {i % 7}" for i in range(20)))
    return made


# --- Ways to spoil one ----------------------------------------------------------------------------

Spoil = Callable[[Path, random.Random], Mutant]
SPOILS: list[Spoil] = []


def spoil(function: Spoil) -> Spoil:
    SPOILS.append(function)
    return function


def mutate(folder: Path, seed: int) -> Mutant:
    """Spoils a copy of a good checkpoint in one way; the same for the same seed."""
    draw = random.Random(seed)
    return draw.choice(SPOILS)(folder, draw)


def _weights(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.glob("*.safetensors")))


def _header(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _drawn(folder: Path, draw: random.Random) -> tuple[Path, dict[str, Any], bytes, str]:
    """A file of weights, its header and data, and the name of one of its tensors."""
    file = _weights(folder, draw)
    header, data = _header(file)
    name = draw.choice(sorted(name for name in header if name != "__metadata__"))
    return file, header, data, name


def _json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@spoil
def rename_tensor(folder: Path, draw: random.Random) -> Mutant:
    file, header, data, name = _drawn(folder, draw)
    other = name[:-3] + "xyz" if draw.random() < 0.5 else f"extra.{name}"
    _write(file, {(other if key == name else key): value for key, value in header.items()}, data)
    return Mutant(f"{name} is called {other}")


@spoil
def delete_tensor(folder: Path, draw: random.Random) -> Mutant:
    file, header, data, name = _drawn(folder, draw)
    begin, end = header.pop(name)["data_offsets"]
    for value in header.values():
        if "data_offsets" in value and value["data_offsets"][0] >= end:
            value["data_offsets"] = [at - (end - begin) for at in value["data_offsets"]]
    _write(file, header, data[:begin] + data[end:])
    index = folder / "model.safetensors.index.json"
    if index.exists() and draw.random() < 0.5:
        _json(index, lambda content: content["weight_map"].pop(name, None))
    return Mutant(f"{name} is gone")


@spoil
def other_shape(folder: Path, draw: random.Random) -> Mutant:
    file, header, data, name = _drawn(folder, draw)
    shape = header[name]["shape"]
    if len(shape) == 2 and shape[0] != shape[1] and draw.random() < 0.5:
        header[name]["shape"] = shape[::-1]
    else:
        header[name]["shape"] = (
            [1, *shape] if draw.random() < 0.5 else [functools.reduce(int.__mul__, shape, 1)]
        )
        if header[name]["shape"] == shape:
            header[name]["shape"] = [*shape, 1]
    _write(file, header, data)
    return Mutant(f"{name} is {header[name]['shape']}, not {shape}")


@spoil
def other_dtype(folder: Path, draw: random.Random) -> Mutant:
    file, header, data, name = _drawn(folder, draw)
    was = header[name]["dtype"]
    same_size = {"F32": ["I32", "U32"], "I16": ["BF16", "U16"], "I32": ["F32"], "I64": ["F64"]}
    header[name]["dtype"] = draw.choice([*same_size.get(was, []), "F8_E4M3", "XX"])
    _write(file, header, data)
    return Mutant(f"{name} is {header[name]['dtype']}, not {was}")


@spoil
def flip_data(folder: Path, draw: random.Random) -> Mutant:
    file, header, data, name = _drawn(folder, draw)
    begin, end = header[name]["data_offsets"]
    at = draw.randrange(begin, end)
    data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    _write(file, header, data)
    return Mutant(f"a bit of {name}", data=True)


@spoil
def flip_header(folder: Path, draw: random.Random) -> Mutant:
    file = _weights(folder, draw)
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    at = draw.randrange(8 + length)
    content[at] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return Mutant(f"a bit of the header at {at}")


@spoil
def truncate(folder: Path, draw: random.Random) -> Mutant:
    file = draw.choice(sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json")))
    content = file.read_bytes()
    file.write_bytes(content[: draw.choice([0, 1, 7, len(content) // 2, len(content) - 1])])
    return Mutant(f"{file.name} is cut")


@spoil
def lose_file(folder: Path, draw: random.Random) -> Mutant:
    names = [*WEIGHTS, "config.json", "model.safetensors.index.json"]
    file = folder / draw.choice([name for name in names if (folder / name).exists()])
    file.unlink()
    return Mutant(f"{file.name} is missing")


@spoil
def swap_shards(folder: Path, draw: random.Random) -> Mutant:
    first, *others = sorted(folder.glob("*.safetensors"))
    if not others:
        return truncate(folder, draw)
    other = others[-1]
    shutil.copyfile(first, folder / "kept")
    shutil.copyfile(other, first)
    shutil.move(folder / "kept", other)
    return Mutant(f"{first.name} and {other.name} are swapped")


@spoil
def config_junk(folder: Path, draw: random.Random) -> Mutant:
    keys = [
        "architectures",
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "quantization_config",
    ]
    key, value = draw.choice(keys), draw.choice(JUNK)
    _json(folder / "config.json", lambda content: content.update({key: value}))
    return Mutant(f"config.json: {key} = {value!r}")


@spoil
def other_size(folder: Path, draw: random.Random) -> Mutant:
    key = draw.choice(["hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"])
    _json(
        folder / "config.json",
        lambda content: content.update({key: max(1, content[key] + draw.choice([-1, 1]))}),
    )
    return Mutant(f"config.json: another {key}")


@spoil
def quantization_junk(folder: Path, draw: random.Random) -> Mutant:
    def change(content: dict[str, Any]) -> None:
        entry = content.setdefault("quantization_config", {"quant_method": "wanda_ext"})
        keys = [*sorted(entry), "format_version", "modules", "bitmap", "transposed", "dense"]
        key = draw.choice(keys)
        entry[key] = draw.choice(JUNK)
        told.append(f"quantization_config: {key} = {entry[key]!r}")

    told: list[str] = []
    _json(folder / "config.json", change)
    return Mutant(told[0])


@spoil
def misnamed_modules(folder: Path, draw: random.Random) -> Mutant:
    def change(content: dict[str, Any]) -> None:
        entry = content.get("quantization_config")
        if entry is None:
            content["quantization_config"] = {"quant_method": "gptq", "bits": 4}
            return
        key = draw.choice(["modules", "bitmap", "transposed", "dense"])
        names = entry.get(key, [])
        if isinstance(names, list):
            entry[key] = names[1:] if names and draw.random() < 0.5 else [*names, "model.norm"]
            if key == "transposed":
                entry[key] = ["model.layers.0.self_attn.q_proj"]
        else:
            entry[key] = {**names, "model.layers.0.nowhere": next(iter(names.values()), 0)}

    _json(folder / "config.json", change)
    return Mutant("quantization_config names other modules")


@spoil
def index_leads_out(folder: Path, draw: random.Random) -> Mutant:
    """Names of files that lie outside of the directory, in whatever names a file."""
    index = folder / "model.safetensors.index.json"
    outside = folder.parent / "outside"
    aim = draw.choice([str(outside / "victim.txt"), "../outside/victim.txt", "../outside/new.txt"])
    if not index.exists():
        header, _ = _header(folder / "model.safetensors")
        names = [name for name in header if name != "__metadata__"]
        content = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
        index.write_text(json.dumps(content))

    def change(content: dict[str, Any]) -> None:
        name = draw.choice(sorted(content["weight_map"]))
        if draw.random() < 0.5:
            content["weight_map"][name] = aim
        else:
            content.setdefault("metadata", {})["wanda_ext_meta_files"] = dict.fromkeys(
                content["weight_map"], aim
            )

    _json(index, change)
    return Mutant(f"the index names {aim}")


@spoil
def index_junk(folder: Path, draw: random.Random) -> Mutant:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        index.write_text(json.dumps(draw.choice(JUNK)))
        return Mutant("an index of junk beside the file")
    key = draw.choice(["weight_map", "metadata"])
    value = draw.choice(JUNK)

    def change(content: dict[str, Any]) -> None:
        if draw.random() < 0.3:
            content.pop(key, None)
        else:
            content[key] = value

    _json(index, change)
    return Mutant(f"the index's {key} = {value!r}")


@spoil
def link_out(folder: Path, draw: random.Random) -> Mutant:
    outside = folder.parent / "outside"
    name = draw.choice(["notes.txt", "model.safetensors", "config.json", "deep/notes.txt"])
    link = folder / name
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        (outside / link.name).write_bytes(link.read_bytes())
        link.unlink()
        link.symlink_to(outside / link.name)
    else:
        link.symlink_to(outside / "victim.txt")
    return Mutant(f"{name} leads out")


@spoil
def code(folder: Path, draw: random.Random) -> Mutant:
    """Code of its own, which leaves a mark where it runs."""
    mark = folder.parent / "outside" / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    auto = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    _json(folder / "config.json", lambda content: content.update(auto_map=auto))
    if draw.random() < 0.5:
        _json(folder / "config.json", lambda content: content.update(model_type="evil"))
    return Mutant("code of its own")


@spoil
def bad_bits(folder: Path, draw: random.Random) -> Mutant:
    """Metadata or masks that mean no weight."""
    file = _weights(folder, draw)
    header, data = _header(file)
    names = [
        name for name in header if name.endswith((".meta", ".mask", ".surplus_rows", ".shape"))
    ]
    if not names:
        return flip_data(folder, draw)
    name = draw.choice(sorted(names))
    begin, end = header[name]["data_offsets"]
    size = min(end - begin, 8)
    at = draw.randrange(begin, end - size + 1)
    data = data[:at] + draw.choice([b"\0", b"\xff"]) * size + data[at + size :]
    _write(file, header, data)
    return Mutant(f"bits of {name}", data=True)
