"""What a transformers model is made of: its blocks, their linears, its experts.

What must know how models of transformers are put together enters here, a row or a rule an odd
architecture; also two models of one kind side by side, and blocks on their way to a device and
back.
"""

from __future__ import annotations

from wanda_ext.models.blocks import (
    Block,
    Linear,
    check_prunable,
    check_weight,
    context_of,
    dense_weight,
    find_blocks,
    in_eval_mode,
    is_transposed,
    preserved,
    targets_of_block,
    vocab_size_of,
    weight_identity,
    weight_of,
    weight_shape,
)
from wanda_ext.models.experts import FEW_TOKENS, ExpertSlice, expert_slices, reads, tokens_read
from wanda_ext.models.transfer import Copies, Visit, copies_to, usable_device, visits
from wanda_ext.models.twins import BlockPair, Unit, pair_blocks, twin_blocks

__all__ = [
    "FEW_TOKENS",
    "Block",
    "BlockPair",
    "Copies",
    "ExpertSlice",
    "Linear",
    "Unit",
    "Visit",
    "check_prunable",
    "check_weight",
    "context_of",
    "copies_to",
    "dense_weight",
    "expert_slices",
    "find_blocks",
    "in_eval_mode",
    "is_transposed",
    "pair_blocks",
    "preserved",
    "reads",
    "targets_of_block",
    "tokens_read",
    "twin_blocks",
    "usable_device",
    "visits",
    "vocab_size_of",
    "weight_identity",
    "weight_of",
    "weight_shape",
]
