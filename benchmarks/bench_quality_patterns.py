"""What patterns of one half cost: held-out perplexity of small Llamas, by pattern and method.

    python benchmarks/bench_quality_patterns.py [--threads 2] [--small]

The demo's Llama, but 192 features wide, for groups of 64 divide that; three of them, trained from
different seeds, each pruned with three draws of calibration data. 32:64, for which no kernel is
built, is chosen by the reference in plain PyTorch. Writes benchmarks/results/quality_patterns.json
and, where matplotlib is, quality_patterns.svg.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import harness
import wanda_ext
from demo_runs import Demo, plot
from wanda_ext import reference
from wanda_ext.cli.demo_model import DemoSettings
from wanda_ext.methods import Method, get_method
from wanda_ext.methods.sparsity import NM, Sparsity, Unstructured
from wanda_ext.methods.statistic import InputStatistic, Reads

METHODS = ("magnitude", "wanda", "sparsegpt")
BETWEEN = ("4:8", "16:32", "50%")  # in this order of quality, on average


@dataclass(frozen=True)
class Wide(NM):
    """keep:group with a group that the kernels do not take."""

    def __post_init__(self) -> None:
        assert 0 < self.keep <= self.group


@dataclass(frozen=True)
class ByReference:
    """Wanda or magnitude by reference.prune_nm_, which takes any group."""

    name: str
    reads: Reads
    kernels: tuple[str, ...] = ()

    def check(self, name: str, sparsity: Sparsity) -> None:
        """Any will do."""

    def prune_(
        self, weight: Tensor, sparsity: Sparsity, inputs: InputStatistic | None, bad: Tensor
    ) -> None:
        """Shapes: weight [n, k]; bad [1] int32."""
        assert isinstance(sparsity, NM)
        norm = None if inputs is None else inputs.norm
        reference.prune_nm_(weight, norm, sparsity.keep, sparsity.group, bad)


PATTERNS: dict[str, Sparsity] = {
    "2:4": NM(2, 4),
    "4:8": NM(4, 8),
    "8:16": NM(8, 16),
    "16:32": NM(16, 32),
    "32:64": Wide(32, 64),
    "50%": Unstructured(0.5),
}


def method_for(name: str, sparsity: Sparsity) -> str | Method:
    """Magnitude compares within rows here, as the others do."""
    if isinstance(sparsity, Wide) and name != "sparsegpt":
        return ByReference(name, "norm" if name == "wanda" else "nothing")
    return wanda_ext.Magnitude(scope="row") if name == "magnitude" else get_method(name)


def measure(settings: DemoSettings, draws: int) -> tuple[float, dict[str, dict[str, list[float]]]]:
    """Perplexity of one trained model, dense and by pattern and method: one for each draw."""
    demo = Demo(settings)
    found: dict[str, dict[str, list[float]]] = {}
    for pattern, sparsity in PATTERNS.items():
        for name in METHODS:
            seeds = range(draws if name != "magnitude" else 1)  # which reads no data
            found.setdefault(pattern, {})[name] = [
                demo.pruned_perplexity(sparsity, method_for(name, sparsity), seed=seed)
                for seed in seeds
            ]
        told = ", ".join(f"{name} {statistics.mean(v):.2f}" for name, v in found[pattern].items())
        print(f"seed {settings.seed}, {pattern:6} {told}", flush=True)
    return demo.perplexity_of(demo.dense), found


def table(runs: list[dict[str, dict[str, list[float]]]]) -> list[dict[str, Any]]:
    """Per pattern: each method's mean over models and draws, and all of its values."""
    rows: list[dict[str, Any]] = []
    for pattern in PATTERNS:
        row: dict[str, Any] = {"name": pattern}
        for name in METHODS:
            values = [run[pattern][name] for run in runs]
            mean = statistics.mean(statistics.mean(one) for one in values)
            row[name] = {"mean": mean, "by model": values}
        rows.append(row)
    return rows


def is_between(rows: list[dict[str, Any]], method: str) -> bool:
    """Whether 16:32 lies between 4:8 and half of each row, on average."""
    means = {row["name"]: row[method]["mean"] for row in rows}
    worse, ours, better = (means[pattern] for pattern in BETWEEN)
    return bool(worse >= ours >= better)


def draw(rows: list[dict[str, Any]], axes: Any) -> None:
    """Mean perplexity by pattern, a line a method."""
    for name, label in zip(METHODS, ("magnitude", "Wanda", "SparseGPT"), strict=True):
        axes.plot([r["name"] for r in rows], [r[name]["mean"] for r in rows], "o-", label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="one seed, one draw; nothing is saved")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seeds, draws = (1, 1) if args.small else (3, 3)
    found = [measure(DemoSettings(hidden=192, seed=seed), draws) for seed in range(seeds)]
    dense = statistics.mean(value for value, _ in found)
    rows = table([run for _, run in found])
    between = {name: is_between(rows, name) for name in METHODS}
    print(f"16:32 between 4:8 and 50%: {between}")
    if not args.small:
        labels = ("kept columns : group", "held-out perplexity")
        plot("quality_patterns.svg", dense, labels, partial(draw, rows))
        results = {"dense": {"mean": dense, "by model": [value for value, _ in found]}}
        results |= {"patterns": rows, "16:32 between 4:8 and 50%": between}  # type: ignore[dict-item]
        harness.save("quality_patterns.json", results)


if __name__ == "__main__":
    main()
