"""Text and tokens in, batches out; also of text that a prune did not see.

Every source of calibration data enters here, and nowhere else.
"""

from __future__ import annotations

from wanda_ext.calibration.batches import MAX_SEQLEN, Batch, calibration_batches, read_by
from wanda_ext.calibration.held_out import held_out_batches, perplexity_of

__all__ = [
    "MAX_SEQLEN",
    "Batch",
    "calibration_batches",
    "held_out_batches",
    "perplexity_of",
    "read_by",
]
