"""Prunes the linears of one block: all of them, or none where anything goes wrong."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from wanda_ext.interrupt import step
from wanda_ext.methods import InputStatistic, Method, Updated
from wanda_ext.models import dense_weight, is_transposed, weight_of, weight_shape
from wanda_ext.prune.plan import PlannedBlock, PlannedLinear, targets_of
from wanda_ext.report import LinearReport
from wanda_ext.runner import kernel_device

UNSEEN = "read without being called, so that its inputs are not seen"
SCORED_AT_ONCE = 1 << 18  # weights, so that the temporary stays in the cache


@dataclass
class _Pruned:
    """What one linear's prune left, still on its device: no read before the whole stage is done."""

    bad: Tensor  # [1] int32
    numbers: Tensor  # [3] float64: score kept, score before, zeros
    seconds: float
    path: str
    tokens: int
    note: str


@contextmanager
def pruned_block(
    block: PlannedBlock,
    method: Method,
    stages: Iterable[Mapping[str, InputStatistic | None]],
    unseen: Container[str] = (),
) -> Iterator[list[LinearReport]]:
    """Prunes on entry and gives a report line for every linear; restores where the body raises.

    Each stage has the input statistics of some linears by name in the block, in running order (None
    where the method reads nothing); they are pruned before the next stage is asked for. A linear
    that is in none was never called and stays; `unseen` has, when the stages are done, those whose
    weights are read all the same. Raises ValueError, naming the linear, for NaN or
    infinity in its weight or inputs, and for what the method refuses.
    """
    targets = block.targets
    saved = {name: weight_of(linear.module).clone() for name, linear in targets.items()}
    pruned: dict[str, _Pruned] = {}
    try:
        for stage in stages:
            _check_finite(targets, stage)
            now = {
                name: _prune(targets[name], method, statistic, saved[name])
                for name, statistic in stage.items()
            }
            _check_scored(targets, now)
            pruned |= now
        idle = {name: UNSEEN if name in unseen else "never called" for name in block.linears}
        yield [_line(one, pruned.get(name), idle[name]) for name, one in block.linears.items()]
    except BaseException:
        for name, copy in saved.items():
            weight_of(targets[name].module).copy_(copy)
        raise


def check_method(method: Method, plan: Iterable[PlannedBlock]) -> None:
    """Raises ValueError, naming the linear, where the method cannot prune to what is planned."""
    for linear in targets_of(plan):
        if linear.sparsity is not None:
            method.check(linear.name, linear.sparsity)


def _prune(
    linear: PlannedLinear, method: Method, inputs: InputStatistic | None, before: Tensor
) -> _Pruned:
    """before: a copy of the weight as the module stores it."""
    assert linear.sparsity is not None
    step()
    home = weight_of(linear.module).device
    device = home
    for op in method.kernels:
        device = kernel_device(op, device)
    with dense_weight(linear.module, device) as weight:
        bad = torch.full((1,), -1, dtype=torch.int32, device=device)
        _synchronize(device)
        start = perf_counter()
        try:
            method.prune_(weight, linear.sparsity, inputs, bad)
        except ValueError as error:
            raise ValueError(f"{linear.name}: {error}") from error
        _synchronize(device)
        seconds = perf_counter() - start
        zeros = (weight.numel() - _bits(weight).count_nonzero()).double()
        before = before.t() if is_transposed(linear.module) else before
        norm = None if inputs is None else inputs.norm
        numbers = torch.stack([*_scores(before, weight, norm), zeros])
    path = device.type if device == home else f"{home.type} via {device.type}"
    tokens = 0 if inputs is None else inputs.tokens
    return _Pruned(bad, numbers, seconds, path, tokens, _note(method, inputs))


def _note(method: Method, inputs: InputStatistic | None) -> str:
    notes = []
    if inputs is not None and inputs.of_layer:
        notes.append("few tokens: norms of all experts")
    if isinstance(method, Updated) and inputs is not None and inputs.drift is None:
        notes.append("target not corrected: not called with every token")
    return "; ".join(notes)


def _scores(before: Tensor, after: Tensor, norm: Tensor | None) -> Tensor:
    """The sums of S = |W| * input_norm before the prune: where weights stay, and everywhere.

    A method may change what stays, so that S afterwards would not tell what was lost.

    Shapes: before, after [n, k]; input_norm [k] float32 -> [2] float64.
    """
    ones = after.new_ones(after.shape[1], dtype=torch.float32)
    norm = ones if norm is None else norm.to(after.device)
    at_once = max(1, SCORED_AT_ONCE // after.shape[1])
    sums = after.new_zeros(2, dtype=torch.float64)
    for was, now in zip(torch.split(before, at_once), torch.split(after, at_once), strict=True):
        score = was.to(after.device, torch.float32, copy=True).abs_()
        every = (score @ norm).sum(dtype=torch.float64)
        score *= _bits(now) != 0
        sums += torch.stack([(score @ norm).sum(dtype=torch.float64), every])
    return sums


def _bits(weight: Tensor) -> Tensor:
    """A pruned weight as integers, which are 0 where it is (no op leaves a -0.0): many times faster
    to count and compare than 16-bit floats."""
    return weight.view({2: torch.int16, 4: torch.int32}[weight.itemsize])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(linear: PlannedLinear, pruned: _Pruned | None, idle: str) -> LinearReport:
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
        line.seconds, line.tokens, line.note = pruned.seconds, pruned.tokens, pruned.note
    else:
        zeros = int(weight.numel() - weight.count_nonzero())
        if linear.sparsity is not None:
            line.status = idle
    line.reached = zeros / line.weights
    return line


# --- NaN and infinity ----------------------------------------------------------------------------


def _check_finite(
    targets: Mapping[str, PlannedLinear], stage: Mapping[str, InputStatistic | None]
) -> None:
    """Tells the first linear whose inputs are not finite from one whose weights made them so."""
    finite = {n: one.sumsq.isfinite().all() for n, one in stage.items() if one is not None}
    if not finite or bool(torch.stack(list(finite.values())).all()):
        return
    for name, inputs_finite in finite.items():
        linear = targets[name]
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
