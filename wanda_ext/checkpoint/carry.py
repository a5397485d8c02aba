"""Tensors of a checkpoint that its model has no place for, carried to where the model is saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from wanda_ext.checkpoint.convert import write_json
from wanda_ext.checkpoint.reader import INDEX, WEIGHTS
from wanda_ext.files import Stored, stored_tensors, write_shard

CARRIED = "model-carried.safetensors"


def add_tensors(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Adds stored tensors, in a file of their own, to the checkpoint just written to `folder`."""
    if not tensors:
        return
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    else:
        own = (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        stored = stored_tensors([own])
        size = sum(tensor.nbytes for tensor in stored.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(stored, own.name)}
    index["metadata"]["total_size"] += write_shard(folder / CARRIED, tensors)
    index["weight_map"] |= dict.fromkeys(tensors, CARRIED)
    write_json(folder / INDEX, index)
