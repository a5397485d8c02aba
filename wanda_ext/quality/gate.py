"""gate: whether a pruned model is good enough on text the prune did not see, and what to restore.

The measure is its perplexity beside the dense model's. Where it is too high, the linears that do
their blocks the most harm get their dense weights back, as few as will do: the worst one, the worst
two, four, eight ... until the gate holds, then halving down to the smallest number that does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from wanda_ext.calibration import Protocol, held_out_batches, perplexity_of, read_by
from wanda_ext.interrupt import held_back
from wanda_ext.models import (
    BlockPair,
    Unit,
    pair_blocks,
    preserved,
    targets_of_block,
    usable_device,
    weight_of,
)
from wanda_ext.quality.block_errors import BlockError, block_errors
from wanda_ext.report import PruneReport

MAX_RATIO = 1.1  # allowed where nothing else is asked: 10 percent more perplexity
RESTORED = "restored by the gate"  # the status of a linear in the report


@dataclass(frozen=True)
class GateReport:
    """What a gate found. str() is a table of the blocks whose last line is the verdict.

    Perplexities are of the held-out text: of the dense model, of the pruned one as it came, and of
    what it is now, which differs from that where linears were restored.
    """

    max_ratio: float
    dense: float
    pruned: float
    final: float
    tokens: int  # held out
    blocks: list[BlockError]
    restored: list[str]  # linears that have their dense weights again, the worst first

    @property
    def ratio(self) -> float:
        """final / dense."""
        return self.final / self.dense

    @property
    def passed(self) -> bool:
        return self.final <= self.max_ratio * self.dense

    def raise_if_failed(self) -> None:
        """Raises ValueError, with what to do, unless the gate holds."""
        if not self.passed:
            raise ValueError(
                f"the gate does not hold: {self._verdict()}. Let it leave the worst linears dense "
                "(fallback), allow more, or prune less"
            )

    def __str__(self) -> str:
        rows = [("block", "own error", "grown error", "worst linear", "alone")]
        for block in self.blocks:
            worst = max(block.linears, key=block.linears.__getitem__, default="-")
            alone = f"{block.linears[worst]:.2%}" if worst in block.linears else "-"
            short = worst.removeprefix(f"{block.name}.")
            rows.append((block.name, f"{block.own:.2%}", f"{block.grown:.2%}", short, alone))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        told = [f"restored {name}" for name in self.restored]
        return "\n".join(
            [*table, *told, f"gate {'holds' if self.passed else 'fails'}: {self._verdict()}"]
        )

    def _verdict(self) -> str:
        count = len(self.restored)
        dense = f", with {count} linear{'s' * (count > 1)} left dense" if count else ""
        return (
            f"perplexity {self.final:.4g}{dense} is {self.ratio:.4g} times the dense model's "
            f"{self.dense:.4g}, {self.max_ratio:g} allowed ({self.tokens} held-out tokens)"
        )


def gate(
    model: nn.Module,
    dense: nn.Module,
    calib: Any,
    *,
    max_ratio: float = MAX_RATIO,
    fallback: bool = False,
    windows: int = 32,
    tokenizer: Any = None,
    nsamples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    blocks: str | None = None,
    report: PruneReport | None = None,
    protocol: Protocol = "model",
    progress: bool = True,
) -> GateReport:
    """Whether perplexity on held-out calibration text is at most max_ratio times that of `dense`.

    model: pruned, its linears not packed. dense: the same model, not pruned. calib, tokenizer,
    nsamples, seqlen, seed: what the prune got: `windows` other windows of that source are held out
    (see held_out.py); tokens and batches are used as they are, so give others than the prune got.
    device: where one block of each model at a time, and then each whole model, is taken to;
    default: where they are. blocks: their path, as in prune_model. report: the prune's; it gets
    what was found.

    Every block's own error and the one that has grown along the pruned model are measured, and what
    each linear does alone to its block's output (block_errors.py). With `fallback` the linears are
    ranked by that, and where the gate does not hold, the shortest beginning of the ranking with
    which it does gets its dense weights again. Fused experts of a layer are restored together. If
    not even all of them would do, `model` stays as it is.

    Raises ValueError or TypeError before any work for a packed model, two models that are not the
    same but for weights, too little text, a max_ratio below 1; ValueError where the dense model's
    perplexity is not finite. A pruned model's may be: then it is infinity.
    """
    check_ratio(max_ratio)
    pairs = pair_blocks(model, dense, blocks)
    at = None if device is None else usable_device(device)
    if at is not None and any(len({p.device for p in m.parameters()}) > 1 for m in (model, dense)):
        raise ValueError(f"device={str(at)!r} moves models that are on several: leave device out")
    with held_back(), preserved(model), preserved(dense):
        batches = held_out_batches(
            calib,
            windows,
            nsamples=nsamples,
            seqlen=seqlen,
            seed=seed,
            batch_size=batch_size,
            protocol=protocol,
            progress=progress,
            **read_by(model, tokenizer),
        )
        reference = perplexity_of(dense, batches, at)
        allowed = max_ratio * reference
        if not math.isfinite(reference):
            raise ValueError("dense: its perplexity on the held-out text is not finite")
        pruned = perplexity_of(model, batches, at)
        errors = block_errors(model, dense, pairs, batches, at, progress)
        units: list[Unit] = []
        final = pruned
        if fallback and pruned > allowed:
            ranked = _ranked([unit for pair in pairs for unit in pair.units], errors)
            found = _fewest(ranked, lambda: perplexity_of(model, batches, at), allowed)
            units, final = found or ([], pruned)
            for unit in units:
                unit.restore()
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    names = [unit.name for unit in units]
    result = GateReport(max_ratio, reference, pruned, final, tokens, errors, names)
    if report is not None:
        _enter(report, result, pairs)
    return result


def check_ratio(max_ratio: float) -> None:
    """Raises ValueError unless max_ratio can be asked of a gate."""
    if not 1 <= max_ratio < math.inf:
        raise ValueError(
            f"max_ratio is a perplexity over the dense model's, 1 or more, not {max_ratio!r}: pass "
            "1.1 to allow 10 percent more"
        )


def _ranked(units: Sequence[Unit], errors: Sequence[BlockError]) -> list[Unit]:
    """The worst first; of equal ones the one that runs first."""
    alone = {name: error for block in errors for name, error in block.linears.items()}
    return sorted(units, key=lambda unit: -alone[unit.name])


def _fewest(
    ranked: Sequence[Unit], measure: Callable[[], float], allowed: float
) -> tuple[list[Unit], float] | None:
    """The shortest beginning that, dense, brings measure() down to `allowed`, and what it gives.

    Found by doubling, then halving, as if more dense linears were never worse; what is returned was
    measured. None where not even all of them do. The models are as they were afterwards.
    """

    def at(count: int) -> float:
        with ExitStack() as exchanged:
            for unit in ranked[:count]:
                exchanged.enter_context(unit.exchanged())
            return measure()

    low, high, value = 0, 0, math.inf
    while value > allowed:
        if high == len(ranked):
            return None
        low, high = high, min(2 * high or 1, len(ranked))
        value = at(high)
    while high - low > 1:
        middle = (low + high) // 2
        between = at(middle)
        if between <= allowed:
            high, value = middle, between
        else:
            low = middle
    return list(ranked[:high]), value


def _enter(report: PruneReport, found: GateReport, pairs: Sequence[BlockPair]) -> None:
    """Tells the prune's report what the gate found, and which lines are not pruned any more."""
    report.gate = {**asdict(found), "ratio": found.ratio, "passed": found.passed}
    targets = {
        f"{pair.name}.{name}": target
        for pair in pairs
        for name, target in targets_of_block(pair.module).items()
    }
    for line in report.linears:
        if any(f"{line.name}.".startswith(f"{name}.") for name in found.restored):
            weight = weight_of(targets[line.name])
            line.reached = 1 - int(weight.count_nonzero()) / weight.numel()
            line.status = RESTORED
            line.score_kept, line.score_lost = line.score_kept + line.score_lost, 0.0
