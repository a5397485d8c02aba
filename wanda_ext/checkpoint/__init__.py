"""Models in directories, packed and dense, and the quantizer by which transformers loads them.

What reads or writes a checkpoint as a whole enters here; single files and tensors belong to
`wanda_ext.files`, packed weights to `wanda_ext.packed`.
"""

from __future__ import annotations

from wanda_ext.checkpoint.architecture import empty_of, model_class
from wanda_ext.checkpoint.conversion import Conversion, Group, Made, made_of
from wanda_ext.checkpoint.convert import Converted, check_apart, convert, write_index
from wanda_ext.checkpoint.inspection import follows, inspect_checkpoint, pattern_of
from wanda_ext.checkpoint.label import quantized_by
from wanda_ext.checkpoint.load import (
    KeysError,
    lacking,
    load_config,
    load_pretrained,
    load_tokenizer,
    misshapen,
    mistyped,
    shared_names,
    shown,
)
from wanda_ext.checkpoint.other_files import check_links, copy_other_files, told_left
from wanda_ext.checkpoint.quantizer import WandaExtConfig
from wanda_ext.checkpoint.reader import (
    INDEX,
    Checkpoint,
    holds_safetensors,
    open_checkpoint,
)
from wanda_ext.checkpoint.rewrite import save_over, write_config
from wanda_ext.checkpoint.save import (
    PACKED,
    check_some_packed,
    dense_by_reason,
    save_pretrained,
    stay_dense,
    swap_linears,
    told_packed,
    unswap_linears,
)

__all__ = [
    "INDEX",
    "PACKED",
    "Checkpoint",
    "Conversion",
    "Converted",
    "Group",
    "KeysError",
    "Made",
    "WandaExtConfig",
    "check_apart",
    "check_links",
    "check_some_packed",
    "convert",
    "copy_other_files",
    "dense_by_reason",
    "empty_of",
    "follows",
    "holds_safetensors",
    "inspect_checkpoint",
    "lacking",
    "load_config",
    "load_pretrained",
    "load_tokenizer",
    "made_of",
    "misshapen",
    "mistyped",
    "model_class",
    "open_checkpoint",
    "pattern_of",
    "quantized_by",
    "save_over",
    "save_pretrained",
    "shared_names",
    "shown",
    "stay_dense",
    "swap_linears",
    "told_left",
    "told_packed",
    "unswap_linears",
    "write_config",
    "write_index",
]
