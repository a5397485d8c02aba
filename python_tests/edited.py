"""Helpers that change saved checkpoints: their tensors, and code that they bring along."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models_24 import edit_json
from safetensors.torch import load_file, save_file

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
pathlib.Path({folder!r}, "ran").touch()
class Config(LlamaConfig):
    model_type = "odd"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Rewrites model.safetensors with what `change` makes of its tensors, or changes in place."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def without(folder: Path, *names: str) -> Path:
    return edit_tensors(folder, lambda t: {n: one for n, one in t.items() if n not in names})


def renamed(folder: Path, old: str, new: str) -> Path:
    return edit_tensors(folder, lambda t: {new if n == old else n: one for n, one in t.items()})


def with_code(folder: Path, model: bool = True) -> Path:
    """Makes a saved Llama, or its tokenizer alone, one of a class of its own, whose code leaves a
    file `ran` beside it."""
    (folder / "odd.py").write_text(CODE.format(folder=str(folder)))
    if model:
        names = {"AutoConfig": "odd.Config", "AutoModelForCausalLM": "odd.Model"}
        entries = {"model_type": "odd", "architectures": ["Model"], "auto_map": names}
        edit_json(folder / "config.json", **entries)
    else:
        names = {"AutoTokenizer": [None, "odd.Tokenizer"]}
        entries = {"tokenizer_class": "Tokenizer", "auto_map": names}
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return folder


def ran(folder: Path) -> bool:
    """Whether the code of `with_code` did."""
    return (folder / "ran").exists()
