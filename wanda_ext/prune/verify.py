"""Whether the weights of a model are what pruning left: patterns, NaN, counts, metadata."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from wanda_ext import ops
from wanda_ext.checkpoint import follows, pattern_of
from wanda_ext.models import ExpertSlice, expert_slices, is_transposed, weight_of, weight_shape
from wanda_ext.packed import PackedLinear
from wanda_ext.report import LinearReport, PruneReport

SHOWN = 5  # problems in a verdict


@dataclass(frozen=True)
class VerifiedLinear:
    """One linear of a model: its dense shape [n, k], what was found in it, and what is wrong."""

    name: str
    shape: tuple[int, int]
    packed: bool
    pattern: str  # as of inspection.pattern_of
    zeros: int  # how many of the n * k weights
    problems: tuple[str, ...]


@dataclass(frozen=True)
class VerifyReport:
    """Every linear of a model, checked; str() is a table whose last lines are the problems."""

    linears: tuple[VerifiedLinear, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def raise_if_bad(self) -> None:
        """Raises ValueError with all the problems, if there are any."""
        if self.problems:
            raise ValueError("verify: " + "; ".join(self.problems))

    def __str__(self) -> str:
        rows = [("linear", "shape", "stored", "pattern", "zeros"), *map(_cells, self.linears)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*table, *self._told(self.problems)])

    def verdict(self) -> str:
        """Without the table, and with the first problems only."""
        told = self._told(self.problems[:SHOWN])
        more = len(self.problems) - SHOWN
        return "\n".join(
            [f"{len(self.linears)} linears checked", *told, *([f"and {more} more"] * (more > 0))]
        )

    def _told(self, problems: Iterable[str]) -> list[str]:
        return [f"bad: {problem}" for problem in problems] or ["ok"]


def verify(model: nn.Module, report: PruneReport | None = None) -> VerifyReport:
    """Checks every linear of a model, and every expert's part of a fused one; packed ones too.

    Wrong is: NaN or infinite weights, weights that are not in memory, metadata that is not of its
    format (2:4: two ascending columns of four; bitmap: 16 of 32). With a report also: a pruned
    linear that the model lacks, one that has fewer zeros than were counted, one that left its
    keep:group pattern. Raises nothing.
    """
    expected = {} if report is None else {linear.name: linear for linear in report.pruned}
    linears = tuple(
        _verified(name, module, expected.pop(name, None))
        for name, module in (*model.named_modules(), *expert_slices(model).items())
        if isinstance(module, (nn.Linear, Conv1D, PackedLinear, ExpertSlice))
    )
    problems = [f"{linear.name} {problem}" for linear in linears for problem in linear.problems]
    problems += [f"{name} is in the report, but not in the model" for name in expected]
    return VerifyReport(linears, tuple(problems))


def _verified(name: str, module: Any, expected: LinearReport | None) -> VerifiedLinear:
    packed = isinstance(module, PackedLinear)
    shape = (module.out_features, module.in_features) if packed else weight_shape(module)

    def found(pattern: str, zeros: int, *problems: str) -> VerifiedLinear:
        return VerifiedLinear(name, shape, packed, pattern, zeros, problems)

    if module.weight.is_meta:
        return found("-", 0, "is not in memory (meta device)")
    if packed and module.weight.dtype not in ops.FLOATS:
        return found("-", 0, f"is {module.weight.dtype}, which no kernel reads")
    if packed:
        problem = module.problem()
        if problem:
            return found("-", 0, problem)
        weight = module.dense_weight()
    else:
        weight = weight_of(module)
        weight = weight.T if is_transposed(module) else weight
    problems = []
    finite = weight.isfinite()
    if not finite.all():
        problems.append(f"has {int((~finite).sum())} NaN or infinite weights")
    zeros = int((weight == 0).sum())
    if expected is not None:
        counted = round(expected.reached * expected.weights)
        if zeros < counted:
            problems.append(f"has {zeros} zeros, {counted} when it was pruned")
        nm = (expected.asked or "").split(":")
        if len(nm) == 2 and not follows(weight, int(nm[0]), int(nm[1])):
            problems.append(f"is not {expected.asked}, which it was pruned to")
    return found(pattern_of(weight), zeros, *problems)


def _cells(linear: VerifiedLinear) -> tuple[str, ...]:
    n, k = linear.shape
    stored = "packed" if linear.packed else "dense"
    return linear.name, f"{n}x{k}", stored, linear.pattern, f"{linear.zeros / max(n * k, 1):.2%}"
