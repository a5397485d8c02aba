"""Models in directories, packed and dense, and the quantizer by which transformers loads them.

What reads or writes a checkpoint as a whole enters here; single files and tensors belong to
`wanda_ext.files`, packed weights to `wanda_ext.packed`.
"""

from __future__ import annotations

from wanda_ext.checkpoint.carry import add_tensors
from wanda_ext.checkpoint.convert import check_apart, convert, copy_other_files, write_json
from wanda_ext.checkpoint.inspection import follows, inspect_checkpoint, pattern_of
from wanda_ext.checkpoint.load import (
    KeysError,
    lacking,
    load_config,
    load_pretrained,
    load_tokenizer,
    shown,
)
from wanda_ext.checkpoint.quantizer import WandaExtConfig
from wanda_ext.checkpoint.reader import (
    INDEX,
    Checkpoint,
    check_links,
    holds_safetensors,
    open_checkpoint,
)
from wanda_ext.checkpoint.save import (
    PACKED,
    check_some_packed,
    save_pretrained,
    stay_dense,
    swap_linears,
    unswap_linears,
)

__all__ = [
    "INDEX",
    "PACKED",
    "Checkpoint",
    "KeysError",
    "WandaExtConfig",
    "add_tensors",
    "check_apart",
    "check_links",
    "check_some_packed",
    "convert",
    "copy_other_files",
    "follows",
    "holds_safetensors",
    "inspect_checkpoint",
    "lacking",
    "load_config",
    "load_pretrained",
    "load_tokenizer",
    "open_checkpoint",
    "pattern_of",
    "save_pretrained",
    "shown",
    "stay_dense",
    "swap_linears",
    "unswap_linears",
    "write_json",
]
