"""prune_model: plan which linear gets what, prune block by block, commit, swap, verify.

A block is committed whole or not at all, and everything that can be refused is refused by the plan.
How weights are chosen is the business of `wanda_ext.methods`, how a block runs that of
`wanda_ext.runner`.
"""

from __future__ import annotations

from wanda_ext.prune.commit import check_method
from wanda_ext.prune.owl import has_owl
from wanda_ext.prune.plan import (
    PlannedBlock,
    PlannedLinear,
    check_packable,
    plan_blocks,
    report_of,
)
from wanda_ext.prune.prune import PruneError, prune_block, prune_model
from wanda_ext.prune.verify import verify

__all__ = [
    "PlannedBlock",
    "PlannedLinear",
    "PruneError",
    "check_method",
    "check_packable",
    "has_owl",
    "plan_blocks",
    "prune_block",
    "prune_model",
    "report_of",
    "verify",
]
