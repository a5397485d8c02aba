"""Helpers for what prune_checkpoint writes: sources, both ways to prune them, comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_tokenizer, token_ids

import wanda_ext


def saved(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    tiny_model(family, dtype).save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prune(src: Path, dst: Path, **options: Any) -> wanda_ext.PruneReport:
    given = {"calib": token_ids(), "batch_size": 2, "progress": False, **options}
    return wanda_ext.prune_checkpoint(src, dst, **given)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but the reports, which tell the times that it took."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.stem != "report"}


def assert_same_tensors(folder: Path, other: Path) -> None:
    one, two = tensors_of(folder), tensors_of(other)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), two[name].view(torch.uint8)), name


def in_memory(src: Path, dst: Path, packed: bool = False, **options: Any) -> wanda_ext.PruneReport:
    model = transformers.AutoModelForCausalLM.from_pretrained(src, dtype="auto")
    given = {"calib": token_ids(), "batch_size": 2, "progress": False, "swap": False, **options}
    report = wanda_ext.prune_model(model, **given)
    wanda_ext.save_pretrained(model, dst, packed=packed, tokenizer=tiny_tokenizer())
    return report


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
