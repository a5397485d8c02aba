"""repair: the weights that a prune kept make good for those it took.

Block by block, in running order, the kept weights of the pruned linears, and their biases, are
trained on calibration data without labels: block B of the pruned model shall put out what block B0
of the dense model does,

    minimize  |B(x) - B0(x0)|^2  over the weights of B that are not zero,

where x comes through the repaired blocks before B, and x0 through the dense ones before B0: so each
block makes good for what is left of the errors before it, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wanda_ext.calibration import Batch, Protocol, calib_told, calibration_batches, read_by
from wanda_ext.interrupt import held_back, step
from wanda_ext.models import Block, in_eval_mode, preserved, twin_blocks, usable_device
from wanda_ext.quality.reconstruct import PrunedWeight, Training, pruned_weights, reconstruct
from wanda_ext.runner import Walk, walking
from wanda_ext.stopped import StoppedError, stopping


@dataclass(frozen=True)
class BlockRepair:
    """One block. An error is |B(x) - B0(x0)| / |B0(x0)| over the calibration data."""

    name: str
    error_before: float  # with the blocks before it repaired
    error_after: float  # the same where training did not lower it: the block stays as it was
    seconds: float


@dataclass
class RepairReport:
    """What a repair did. str() is a table, a line a block."""

    blocks: list[BlockRepair] = field(default_factory=list)
    status: str = "running"  # "complete", or where it stopped
    seconds: float = 0.0
    arguments: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        width = max((len(block.name) for block in self.blocks), default=0)
        lines = [
            f"{block.name:<{width}}  error {block.error_before:.4f} -> {block.error_after:.4f}"
            f"  {block.seconds:.1f} s"
            for block in self.blocks
        ]
        done = f"{self.status}: {len(self.blocks)} blocks repaired in {self.seconds:.1f} s"
        return "\n".join([*lines, done])


class RepairError(StoppedError):
    """A repair that stopped. `report` tells which blocks are repaired; the others are untouched."""


def repair(
    model: nn.Module,
    dense: nn.Module,
    calib: Any,
    *,
    tokenizer: Any = None,
    nsamples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    blocks: str | nn.ModuleList | None = None,
    epochs: int = 10,
    learning_rate: float = 0.02,
    protocol: Protocol = "model",
    progress: bool = True,
) -> RepairReport:
    """Trains what is left of each pruned block in place until it does what it did in `dense`.

    model: pruned, in memory, not packed; its zeros stay exact zeros, its other modules as they are.
    dense: the same model before the prune, on any device; it is not changed. calib, tokenizer,
    nsamples, seqlen, seed, batch_size, device, blocks: as in prune_model. epochs: how often each
    block sees the data, with a step a batch. learning_rate: the largest step of a weight, relative
    to the root mean square of those that its matrix kept.

    A block whose error training would not lower stays as it was. The same arguments on the same
    machine give the same bits. Memory: the hidden states of the calibration data three times, and
    fp32 copies of one block: a weight four times.

    Raises ValueError or TypeError before any work where the arguments and the models do not fit, or
    nothing is pruned, and RepairError where a block fails: earlier blocks are repaired then, that
    one and later ones are as they were, bit for bit. KeyboardInterrupt leaves the same state, and
    has a `report` too.
    """
    pairs = twin_blocks(model, dense, blocks)
    pruned = _pruned(pairs)
    training = _training(epochs, learning_rate, seed)
    at = None if device is None else usable_device(device)
    with preserved(model), in_eval_mode(dense):
        batches = calibration_batches(
            calib,
            nsamples=nsamples,
            seqlen=seqlen,
            seed=seed,
            batch_size=batch_size,
            protocol=protocol,
            progress=progress,
            **read_by(model, tokenizer),
        )
        report = RepairReport()
        report.arguments = {
            "calib": calib_told(calib),
            "sequences": sum(len(batch["input_ids"]) for batch in batches),
            "batches": len(batches),
            **asdict(training),
            "device": None if at is None else str(at),
        }
        with _reported(report), held_back():
            _repair_blocks(model, dense, pairs, pruned, batches, at, training, report, progress)
    return report


def _repair_blocks(
    model: nn.Module,
    dense: nn.Module,
    pairs: Sequence[tuple[Block, Block]],
    pruned: Sequence[Sequence[PrunedWeight]],
    batches: list[Batch],
    at: torch.device | None,
    training: Training,
    report: RepairReport,
    progress: bool,
) -> None:
    last = max(i for i, weights in enumerate(pruned) if weights)
    both = [[pair[side] for pair in pairs] for side in (0, 1)]
    with (
        walking(model, both[0], batches, at) as (ours, visit),
        walking(dense, both[1], batches, at) as (theirs, visit_dense),
    ):
        bar = tqdm(pairs[: last + 1], "repairing", unit="block", disable=not progress)
        for i, ((name, _), _) in enumerate(bar):
            report.status = name
            start = perf_counter()
            with visit_dense(i):
                targets = _outputs(theirs, i) if pruned[i] else []
                theirs.advance(i)
            with visit(i):
                if any(target is not None for target in targets):
                    errors = reconstruct(ours, i, pruned[i], targets, training)
                    report.blocks.append(BlockRepair(name, *errors, perf_counter() - start))
                if i < last:
                    ours.advance(i)
            step()


def _outputs(walk: Walk, index: int) -> list[Tensor | None]:
    """What leaves block `index` for each batch, kept where the hidden states are."""
    outputs = []
    for j, hidden in enumerate(walk.hidden):
        out = walk.output(index, j)
        outputs.append(None if out is None else out.to(hidden.device))
    return outputs


@contextmanager
def _reported(report: RepairReport) -> Iterator[None]:
    """Completes the report, and hands it out with whatever stops the body."""

    def left(where: str) -> str:
        done = f"{len(report.blocks)} blocks before are repaired"
        return f"stopped; {done}, this one and later ones are unchanged"

    report.status = "capture"
    start = perf_counter()
    try:
        with stopping(report, RepairError, left):
            yield
        report.status = "complete"
    finally:
        report.seconds = perf_counter() - start


# --- What is checked before any work -------------------------------------------------------------


def _pruned(pairs: Sequence[tuple[Block, Block]]) -> list[list[PrunedWeight]]:
    """What to train in each block; a weight that several blocks share in the first of them."""
    pruned, seen = [], set()
    for (_, block), (_, twin) in pairs:
        weights = [w for w in pruned_weights(block, twin) if id(w.weight) not in seen]
        seen |= {id(w.weight) for w in weights}
        pruned.append(weights)
    if not any(pruned):
        raise ValueError(
            "nothing is pruned: no linear of model has a zero that dense has not. Prune a copy, "
            "and pass it first and the dense model second"
        )
    return pruned


def _training(epochs: int, learning_rate: float, seed: int) -> Training:
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be a positive whole number, not {epochs!r}")
    if not 0 < learning_rate < 1:
        raise ValueError(
            f"learning_rate must be between 0 and 1, not {learning_rate!r}: it is relative to the "
            "size of the weights"
        )
    return Training(epochs, learning_rate, seed)
