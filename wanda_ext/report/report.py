"""What a prune did: one line a linear, totals, and what to know before trusting it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

from wanda_ext._version import __version__
from wanda_ext.checkpoint import told_left

HEADS = (  # of the table; `ms` is the selection's time, `us` what one call of each kind takes
    *("linear", "shape", "dtype", "asked", "zeros", "score lost", "tokens", "ms"),
    *("packed us", "dense us", "path"),
)


@dataclass
class LinearReport:
    """One linear of one block. Scores are sums of S (csrc/include/wanda_ext/ops.h)."""

    name: str
    shape: tuple[int, int]  # n (out), k (in) features
    dtype: str
    asked: str | None  # "50%", "2:4"; None: leave it dense
    reached: float  # share of zeros after the prune
    status: str = "pruned"  # or why not
    score_kept: float = 0.0
    score_lost: float = 0.0
    tokens: int = 0  # that its input statistic saw
    seconds: float = 0.0  # of the selection, not of the forward passes
    path: str = ""  # what ran: "cpu", "cuda", "cuda via cpu"
    packed_us: float | None = None  # of one call for each of `tokens`, summed, where it is; None:
    dense_us: float | None = None  # not measured, or not 2:4
    stored: str = ""  # the packed format that it was saved in: "2:4", "bitmap"; "": dense
    stored_bytes: int | None = None  # of its weight, where it was saved packed
    note: str = ""  # what to know about it: "few tokens: norms of all experts"

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def lost(self) -> float:
        """The share of the score that was pruned."""
        total = self.score_kept + self.score_lost
        return self.score_lost / total if total else 0.0


@dataclass
class PruneReport:
    """Everything about one prune_model call. str() is a table whose first line tells the swap."""

    linears: list[LinearReport] = field(default_factory=list)
    block_weights: int = 0  # all that the blocks hold, in linears or not (experts, convolutions)
    swap: str = "swapped nothing"
    runner: str = ""  # how the blocks ran: each by itself, or in lock-step, and why
    status: str = "running"  # "complete", or where it stopped
    seconds: float = 0.0
    peak_memory: dict[str, int] = field(default_factory=dict)  # device -> bytes
    arguments: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)  # phase -> seconds
    saved: dict[str, Any] = field(default_factory=dict)  # how and where: see saved.py
    left: dict[str, str] = field(default_factory=dict)  # file of the source -> why it stayed there
    kernels: list[dict[str, Any]] = field(default_factory=list)  # see saved.py
    repair: dict[str, Any] = field(default_factory=dict)  # a RepairReport, if there was a repair
    gate: dict[str, Any] = field(default_factory=dict)  # a GateReport, if there was a gate
    model_weights: int = 0  # all that the model holds; a weight that several share counts once
    shared: list[list[str]] = field(default_factory=list)  # the names of each such weight
    # "texts": of each "prompt", what the "dense" and the "pruned" model write; or "left_out": why
    continuations: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """What happens inside is a part of this phase."""
        start = perf_counter()
        try:
            yield
        finally:
            self.timings[phase] = self.timings.get(phase, 0.0) + perf_counter() - start

    @property
    def pruned(self) -> list[LinearReport]:
        return [linear for linear in self.linears if linear.status == "pruned"]

    @property
    def sparsity(self) -> float:
        """The share of zeros over the pruned linears; 0 where there is none."""
        weights = sum(linear.weights for linear in self.pruned)
        zeros = sum(linear.reached * linear.weights for linear in self.pruned)
        return zeros / weights if weights else 0.0

    def save(self, path: str | Path) -> None:
        """Writes JSON that `load` reads back."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PruneReport:
        """Reads what `save` wrote. Raises ValueError where the file is something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            linears = [
                LinearReport(**{**linear, "shape": tuple(linear["shape"])})
                for linear in data.pop("linears")
            ]
            return cls(linears=linears, **data)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a prune report: {error!r}") from error

    def __str__(self) -> str:
        rows = [HEADS, *(_cells(linear) for linear in self.linears)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        left = told_left(self.left)
        return "\n".join([self.swap, *table, *([left] if left else []), self._totals()])

    def _totals(self) -> str:
        memory = ", ".join(f"{d} {size / 2**30:.2f} GiB" for d, size in self.peak_memory.items())
        weights = sum(linear.weights for linear in self.pruned)
        return (
            f"{self.status}: {len(self.pruned)} of {len(self.linears)} linears pruned, "
            f"{weights / 1e6:.1f} of the blocks' {self.block_weights / 1e6:.1f} M weights, "
            f"{self.sparsity:.2%} zeros, {self.seconds:.1f} s"
            + (f", peak memory {memory}" if memory else "")
            + (f", {self.runner}" if self.runner else "")
        )


def _cells(linear: LinearReport) -> tuple[str, ...]:
    pruned = linear.status == "pruned"
    return (
        linear.name,
        "x".join(map(str, linear.shape)),
        linear.dtype,
        linear.asked or "-",
        f"{linear.reached:.2%}",
        f"{linear.lost:.2%}" if pruned else "-",
        str(linear.tokens) if linear.tokens else "-",
        f"{linear.seconds * 1e3:.1f}" if pruned else "-",
        _microseconds(linear.packed_us),
        _microseconds(linear.dense_us),
        f"{linear.path} {linear.note}".rstrip() if pruned else linear.status,
    )


def _microseconds(time: float | None) -> str:
    return "-" if time is None else f"{time:.1f}"


def versions() -> dict[str, str]:
    """Of what the result depends on."""
    return {
        "wanda_ext": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
