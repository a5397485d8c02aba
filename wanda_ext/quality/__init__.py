"""Is a pruned model good enough, and winning quality back.

Perplexity, the tasks of lm-eval, the gate, the errors of single blocks; and the repair that trains
the weights that are left. What measures or improves a model that is pruned already enters here;
how it was pruned does not matter to this room.
"""

from __future__ import annotations

from wanda_ext.quality.continuation import PROMPTS, continuations
from wanda_ext.quality.evaluate import evaluate_text, evaluation_text, perplexity
from wanda_ext.quality.gate import MAX_RATIO, GateReport, check_ratio, gate
from wanda_ext.quality.repair import RepairError, RepairReport, repair
from wanda_ext.quality.tasks import evaluate_tasks

__all__ = [
    "MAX_RATIO",
    "PROMPTS",
    "GateReport",
    "RepairError",
    "RepairReport",
    "check_ratio",
    "continuations",
    "evaluate_tasks",
    "evaluate_text",
    "evaluation_text",
    "gate",
    "perplexity",
    "repair",
]
