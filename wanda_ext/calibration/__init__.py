"""Text and tokens in, batches out; also of text that a prune did not see.

Every source of calibration data enters here, and nowhere else.
"""

from __future__ import annotations

from wanda_ext.calibration.batches import MAX_SEQLEN, Batch, calibration_batches, read_by
from wanda_ext.calibration.held_out import held_out_batches, perplexity_of, token_losses
from wanda_ext.calibration.mixture import calib_told
from wanda_ext.calibration.text import Protocol, leading_ids

__all__ = [
    "MAX_SEQLEN",
    "Batch",
    "Protocol",
    "calib_told",
    "calibration_batches",
    "held_out_batches",
    "leading_ids",
    "perplexity_of",
    "read_by",
    "token_losses",
]
