"""Tiny random models that are 2:4 or of other patterns, without the engine that prunes."""

from __future__ import annotations

import copy
import hashlib
import json
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from wanda_ext import reference

TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **TOKENS,
    ),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **TOKENS),
    "opt": OPTConfig(
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
        **TOKENS,
    ),
}
# Wide enough for bitmaps, whose records lie in tiles of 16 rows and 128 columns.
WIDE = {
    "llama": LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **TOKENS,
    ),
    "gpt2": GPT2Config(n_embd=256, n_layer=1, n_head=4, n_positions=64, **TOKENS),
}
MIXED = {"*mlp*": "2:4", "*attn*": 0.5}  # by name in models of WIDE
PATTERNS = {"16:32": "16:32", "50%": 0.5, "mixed": MIXED}
IDS = torch.arange(32).reshape(2, 16) % 96


def dense_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[family])
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def model_24(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """All linears but lm_head are 2:4."""
    model = dense_model(family, dtype)
    for name, module in model.named_modules():
        if name != "lm_head" and isinstance(module, (nn.Linear, Conv1D)):
            prune_24(module)
    return model


def dense_wide(
    family: str = "llama", dtype: torch.dtype = torch.float32, blocks: int = 1
) -> PreTrainedModel:
    """Of WIDE, with as many blocks."""
    torch.manual_seed(0)
    config = copy.deepcopy(WIDE[family])
    config.num_hidden_layers = blocks
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def wide_model(
    pattern: str, family: str = "llama", dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """Of WIDE; all linears but lm_head are pruned as PATTERNS has it."""
    return copy.deepcopy(_wide_model(pattern, family, dtype))


@cache
def _wide_model(pattern: str, family: str, dtype: torch.dtype) -> PreTrainedModel:
    model = dense_wide(family, dtype)
    sparsity = PATTERNS[pattern]
    for name, module in model.named_modules():
        if name != "lm_head" and isinstance(module, (nn.Linear, Conv1D)):
            found = sparsity
            if isinstance(sparsity, dict):
                found = next(value for glob, value in sparsity.items() if fnmatch(name, glob))
            prune_to(module, found)
    return model


def prune_to(module: nn.Module, sparsity: str | float) -> None:
    """By magnitude: keep:group, or a share of each row."""
    weight = module.weight.detach()
    rows = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    if isinstance(sparsity, str):
        reference.prune_nm_(rows, None, *map(int, sparsity.split(":")))
    else:
        reference.prune_rows_(rows, None, int(rows.shape[1] * sparsity))
    if isinstance(module, Conv1D):
        weight.copy_(rows.T)


def prune_24(module: nn.Module) -> None:
    prune_to(module, "2:4")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def digests(directory: Path) -> dict[str, str]:
    """File name -> hash of its bytes; our own list of files left out."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.name != "wanda_ext.json"
    }


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
