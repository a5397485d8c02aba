"""Masks of a real model that must never change: Gemma 3 270M, blocks of its start, middle and end.

`golden_masks.safetensors` holds the norms of what entered their linears when the model was pruned
to 2:4, and its metadata the hashes of the masks that follow from those norms and the weights.

    python python_tests/golden_masks.py     makes it anew
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import wanda_ext
from real_sources import CACHE, model_folder, text_file
from wanda_ext.methods import InputStatistic, Reads, Sparsity, Wanda, parse_sparsity

FILE = Path(__file__).with_name("golden_masks.safetensors")
MODEL = CACHE / "gemma"
BLOCKS = (0, 9, 17)
PATTERNS = ("2:4", "16:32", "50%")
DATA: dict[str, Any] = {"nsamples": 8, "seqlen": 512, "seed": 0, "batch_size": 2}


class Recording:
    """Wanda that remembers the norms it was given, in the order of the linears."""

    name = "wanda"
    reads: Reads = "norm"
    kernels = Wanda.kernels

    def __init__(self) -> None:
        self.norms: list[Tensor] = []

    def check(self, name: str, sparsity: Sparsity) -> None:
        Wanda().check(name, sparsity)

    def prune_(
        self, weight: Tensor, sparsity: Sparsity, inputs: InputStatistic | None, bad: Tensor
    ) -> None:
        assert inputs is not None
        self.norms.append(inputs.norm.clone())
        Wanda().prune_(weight, sparsity, inputs, bad)


def load() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()


def norms_from_text(model: Any) -> dict[str, Tensor]:
    """Prunes the model to 2:4; what entered the linears, by name."""
    method = Recording()
    calib = str(text_file("faq", "calib"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    report = wanda_ext.prune_model(
        model, calib, "2:4", method=method, tokenizer=tokenizer, swap=False, progress=False, **DATA
    )
    return {line.name: norm for line, norm in zip(report.pruned, method.norms, strict=True)}


def chosen(name: str) -> bool:
    return any(f".layers.{block}." in name for block in BLOCKS)


def mask(weight: Tensor, norm: Tensor, pattern: str) -> Tensor:
    """True = kept."""
    pruned = weight.detach().clone()
    bad = torch.full((1,), -1, dtype=torch.int32)
    statistic = InputStatistic(norm.double().square(), 1)
    Wanda().prune_(pruned, parse_sparsity(pattern), statistic, bad)
    assert int(bad) == -1
    return pruned != 0


def hash_of(mask: Tensor) -> str:
    return hashlib.sha256(mask.contiguous().numpy().tobytes()).hexdigest()


def stored() -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
    """Norms by linear, and hashes by linear and pattern."""
    with safe_open(FILE, framework="pt") as file:
        norms = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return norms, json.loads(file.metadata()["masks"])


def main() -> None:
    model_folder("gemma")
    norms = {name: norm for name, norm in norms_from_text(load()).items() if chosen(name)}
    dense = load()
    masks = {
        name: {p: hash_of(mask(dense.get_submodule(name).weight, norm, p)) for p in PATTERNS}
        for name, norm in norms.items()
    }
    save_file(norms, FILE, metadata={"masks": json.dumps(masks)})


if __name__ == "__main__":
    main()
