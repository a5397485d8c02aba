"""Prunes the linears of one block: all of them, or none where anything goes wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from wanda_ext.blocks import dense_weight, weight_of, weight_shape
from wanda_ext.inputs import InputStatistic, kernel_device
from wanda_ext.interrupt import step
from wanda_ext.methods import Method
from wanda_ext.plan import PlannedBlock, PlannedLinear
from wanda_ext.report import LinearReport

SCORED_AT_ONCE = 1 << 20  # weights, so that the temporary stays in the cache
PRUNING_OPS = ("prune_rows_", "prune_nm_")


@dataclass
class _Pruned:
    """What one linear's prune left, still on its device: no read before the whole block is done."""

    bad: Tensor  # [1] int32
    numbers: Tensor  # [3] float64: score kept, score before, zeros
    seconds: float
    path: str


@contextmanager
def pruned_block(
    block: PlannedBlock, method: Method, found: Mapping[str, InputStatistic] | None
) -> Iterator[list[LinearReport]]:
    """Prunes on entry and gives a report line for every linear; restores where the body raises.

    `found` has the input statistics by name in the block, in running order; None: the method needs
    none. A linear without one was never called and stays. Raises ValueError, naming the linear, for
    NaN or infinity in its weight or inputs.
    """
    targets = block.targets
    if found is not None:
        targets = {name: targets[name] for name in found}
        _check_finite(targets, found)
    weights = [weight_of(linear.module) for linear in targets.values()]
    saved = [weight.clone() for weight in weights]
    try:
        pruned = {
            name: _prune(linear, method, found[name].norm if found is not None else None)
            for name, linear in targets.items()
        }
        _check_scored(targets, pruned)
        yield [
            _line(linear, pruned.get(name), found.get(name) if found else None)
            for name, linear in block.linears.items()
        ]
    except BaseException:
        for weight, copy in zip(weights, saved, strict=True):
            weight.copy_(copy)
        raise


def _prune(linear: PlannedLinear, method: Method, norm: Tensor | None) -> _Pruned:
    assert linear.sparsity is not None
    step()
    home = weight_of(linear.module).device
    device = home
    for op in PRUNING_OPS:
        device = kernel_device(op, device)
    with dense_weight(linear.module, device) as weight:
        norm = None if norm is None else norm.to(device)
        bad = torch.full((1,), -1, dtype=torch.int32, device=device)
        before = _score(weight, norm)
        _synchronize(device)
        start = perf_counter()
        method.prune_(weight, linear.sparsity, norm, bad)
        _synchronize(device)
        seconds = perf_counter() - start
        zeros = (weight.numel() - weight.count_nonzero()).double()
        numbers = torch.stack([_score(weight, norm), before, zeros])
    path = device.type if device == home else f"{home.type} via {device.type}"
    return _Pruned(bad, numbers, seconds, path)


def _score(weight: Tensor, norm: Tensor | None) -> Tensor:
    """The sum of S = |W| * input_norm, float64.

    Shapes: weight [n, k]; input_norm [k] float32 -> [].
    """
    norm = weight.new_ones(weight.shape[1], dtype=torch.float32) if norm is None else norm
    parts = torch.split(weight, max(1, SCORED_AT_ONCE // weight.shape[1]))
    sums = [(rows.abs().float() @ norm).sum(dtype=torch.float64) for rows in parts]
    return torch.stack(sums).sum()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(
    linear: PlannedLinear, pruned: _Pruned | None, statistic: InputStatistic | None
) -> LinearReport:
    weight = weight_of(linear.module)
    line = LinearReport(
        name=linear.name,
        shape=weight_shape(linear.module),
        dtype=str(weight.dtype).removeprefix("torch."),
        asked=None if linear.sparsity is None else str(linear.sparsity),
        reached=0.0,
        status=linear.status,
    )
    if pruned is not None:
        kept, before, zeros = pruned.numbers.tolist()
        line.status, line.path = "pruned", pruned.path
        line.score_kept, line.score_lost = kept, before - kept
        line.seconds = pruned.seconds
        if statistic is not None:
            line.tokens = statistic.tokens
            line.note = "few tokens: norms of all experts" if statistic.of_layer else ""
    else:
        zeros = int(weight.numel() - weight.count_nonzero())
        if linear.sparsity is not None:
            line.status = "never called"
    line.reached = zeros / line.weights
    return line


# --- NaN and infinity ----------------------------------------------------------------------------


def _check_finite(
    targets: Mapping[str, PlannedLinear], found: Mapping[str, InputStatistic]
) -> None:
    """Tells the first linear whose inputs are not finite from one whose weights made them so."""
    finite = [statistic.sumsq.isfinite().all() for statistic in found.values()]
    if not finite or bool(torch.stack(finite).all()):
        return
    for linear, inputs_finite in zip(targets.values(), finite, strict=True):
        if not inputs_finite:
            raise ValueError(
                f"NaN or infinite activations enter {linear.name}: look for the layer before it "
                "that makes them (weights, dtype overflow), or for bad calibration tokens"
            )
        if not weight_of(linear.module).isfinite().all():
            raise ValueError(f"{linear.name}.weight holds NaN or infinity: load it anew")


def _check_scored(targets: Mapping[str, PlannedLinear], pruned: Mapping[str, _Pruned]) -> None:
    if not pruned:
        return
    device = next(iter(pruned.values())).bad.device
    rows = torch.cat([one.bad.to(device) for one in pruned.values()]).tolist()
    for name, row in zip(pruned, rows, strict=True):
        if row >= 0:
            raise ValueError(
                f"{targets[name].name}.weight has a NaN or infinite score in row {row}: its "
                "weights, or their products with the input norms, are not finite"
            )
