"""The last step of a prune: packed linears where asked, or where they are faster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from wanda_ext.checkpoint import PACKED, dense_by_reason, swap_linears, told_packed
from wanda_ext.methods import NM
from wanda_ext.models import weight_of, weight_shape
from wanda_ext.packed import FORMATS, cannot_run, times_of
from wanda_ext.prune.plan import PlannedBlock, PlannedLinear, targets_of
from wanda_ext.report import PruneReport


def check_runnable(plan: Iterable[PlannedBlock]) -> None:
    """Raises ValueError where no linear could run packed on the device it is on."""
    reasons = {}
    for linear in targets_of(plan):
        found = [cannot_run(*_where(linear), packed=kind.FORMAT) for kind in FORMATS]
        reasons[linear.name] = "; ".join(dict.fromkeys(found)) if all(found) else ""
    if all(reasons.values()):
        name, why = next(iter(reasons.items()))
        raise ValueError(f"swap=True can pack no linear ({name}: {why}; ...): pass swap=False")


def swap_pruned(
    model: nn.Module,
    plan: Iterable[PlannedBlock],
    report: PruneReport,
    swap: bool | str,
    tokens: Sequence[int],
) -> None:
    """Swaps what was pruned; the report gets its times and one line that tells what and why."""
    linears = [linear for linear in targets_of(plan) if not linear.is_expert]
    lines = {line.name: line for line in report.linears}
    for linear in linears:
        times = times_of(*_where(linear), tokens)
        if times is not None and linear.sparsity == NM(2, 4):
            lines[linear.name].packed_us, lines[linear.name].dense_us = times
    names = [linear.name for linear in linears]
    if swap is False:
        report.swap = "swapped nothing: swap=False"
    elif not names:
        report.swap = "swapped nothing: no linear was pruned"
    else:
        when = tokens if swap == "auto" else None
        report.swap = _told(swap_linears(model, names, tokens=when))


def _where(linear: PlannedLinear) -> tuple[torch.device, torch.dtype, int, int]:
    weight = weight_of(linear.module)
    return (weight.device, weight.dtype, *weight_shape(linear.module))


def _told(outcome: Mapping[str, str]) -> str:
    reasons = dense_by_reason(outcome)
    if PACKED not in outcome.values() and len(reasons) == 1:
        return f"swapped nothing: {next(iter(reasons))}"
    return told_packed(outcome, "swapped {} of {} linears for packed ones")
