"""What patterns of one half cost: held-out perplexity of small Llamas, by pattern and method.

    python benchmarks/bench_quality_patterns.py [--threads 2] [--small]

The demo's Llama, but 192 features wide, for groups of 64 divide that; three of them, trained from
different seeds, each pruned with three draws of calibration data. 32:64, for which no kernel is
built, is chosen by the reference in plain PyTorch. Writes benchmarks/results/quality_patterns.json
and, where matplotlib is, quality_patterns.svg.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import harness
import wanda_ext
from wanda_ext import reference
from wanda_ext.demo_model import DemoSettings, cached_model, split_text
from wanda_ext.methods import Method, get_method
from wanda_ext.sparsity import NM, Sparsity, Unstructured
from wanda_ext.statistic import InputStatistic, Reads

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
    dense, tokenizer = cached_model(settings)
    text, held_out = split_text()
    ids = torch.tensor(tokenizer(held_out).input_ids)
    found: dict[str, dict[str, list[float]]] = {}
    for pattern, sparsity in PATTERNS.items():
        for name in METHODS:
            values = found.setdefault(pattern, {}).setdefault(name, [])
            for draw in range(draws if name != "magnitude" else 1):  # which reads no data
                model = copy.deepcopy(dense)
                wanda_ext.prune_model(
                    model, [text], sparsity, method=method_for(name, sparsity), seed=draw,
                    tokenizer=tokenizer, nsamples=settings.nsamples, seqlen=settings.seqlen,
                    swap=False, progress=False,
                )  # fmt: skip
                values.append(wanda_ext.perplexity(model, ids, settings.seqlen))
        told = ", ".join(f"{name} {statistics.mean(v):.2f}" for name, v in found[pattern].items())
        print(f"seed {settings.seed}, {pattern:6} {told}", flush=True)
    return wanda_ext.perplexity(dense, ids, settings.seqlen), found


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


def plot(dense: float, rows: list[dict[str, Any]]) -> None:
    """quality_patterns.svg: mean perplexity by pattern, a line a method."""
    if find_spec("matplotlib") is None:
        print("no plot: it takes matplotlib (pip install 'wanda_ext[plot]')")
        return
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "wanda_ext"  # the same figures give the same file
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in zip(METHODS, ("magnitude", "Wanda", "SparseGPT"), strict=True):
        axes.plot([r["name"] for r in rows], [r[name]["mean"] for r in rows], "o-", label=label)
    axes.axhline(dense, color="gray", linestyle="--", label="dense")
    axes.set_xlabel("kept columns : group")
    axes.set_ylabel("held-out perplexity")
    axes.legend()
    figure.savefig(harness.RESULTS / "quality_patterns.svg", metadata={"Date": None})


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
        plot(dense, rows)
        results = {"dense": {"mean": dense, "by model": [value for value, _ in found]}}
        results |= {"patterns": rows, "16:32 between 4:8 and 50%": between}  # type: ignore[dict-item]
        harness.save("quality_patterns.json", results)


if __name__ == "__main__":
    main()
