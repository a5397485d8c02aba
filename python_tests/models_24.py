"""Tiny random models whose linears are 2:4, without the engine that prunes."""

from __future__ import annotations

import copy
import hashlib
import json
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


def prune_24(module: nn.Module) -> None:
    weight = module.weight.detach()
    rows = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    reference.prune_nm_(rows, None, 2, 4)
    if isinstance(module, Conv1D):
        weight.copy_(rows.T)


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
