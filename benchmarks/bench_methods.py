"""What magnitude, Wanda and SparseGPT cost on the CPU, and what calibration data they need.

    python benchmarks/bench_methods.py [--threads 2] [--only layers|model|quality]

Layers of Llama-7B in fp32 without any forward pass, SparseGPT with its own factorisation each time
and the sum of its Hessian apart; the whole prune of a Llama with hidden 512, each time in a fresh
process, with the memory it takes; and the demo model's held-out perplexity after calibration on 1
to 128 samples. Writes benchmarks/results/methods.json and, where matplotlib is, methods.svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

import harness
import shapes
import wanda_ext
from demo_runs import Demo, plot
from harness import Case, Entrant, ratio, time_case, timing_of
from wanda_ext import ops
from wanda_ext.cli.demo_model import DemoSettings
from wanda_ext.methods import Method, get_method
from wanda_ext.methods.sparsity import Sparsity, parse_sparsity
from wanda_ext.methods.statistic import InputStatistic, gram_of

METHODS = ("magnitude", "wanda", "sparsegpt")
TOKENS = 2048
SAMPLES = (1, 4, 16, 64, 128)
SEEDS = range(5)


# --- One linear, without forward passes -----------------------------------------------------------


def _inputs(k: int) -> Tensor:
    """[TOKENS, k]: features that share factors and differ in size, as those of a model do."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(TOKENS, 64, generator=g) @ torch.randn(64, k, generator=g) / 8
    return (shared + torch.randn(TOKENS, k, generator=g)) * torch.randn(k, generator=g).exp()


def bench_statistics(k: int) -> tuple[Case, InputStatistic]:
    """What the methods sum over 2048 tokens: squares, or SparseGPT's Hessian."""
    x, sumsq = _inputs(k), torch.zeros(k, dtype=torch.float64)
    grams: list[Tensor] = []
    case = time_case(
        f"statistics {TOKENS}x{k} fp32",
        [
            Entrant("wanda", lambda _: ops.input_sumsq_(torch.zeros_like(sumsq), x)),
            Entrant("sparsegpt", lambda _: grams.append(gram_of(x)), grams.clear, 2),
        ],
        9,
    )
    ratio(case, "sparsegpt", "wanda")
    ops.input_sumsq_(sumsq, x)
    return case, InputStatistic(sumsq, TOKENS, gram=grams[-1])


def bench_layer(n: int, k: int, sparsity: str, inputs: InputStatistic, repeats: int) -> Case:
    """Metric and selection, for SparseGPT its updates too; each on a fresh copy of the weight."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) / k**0.5
    target, bad = torch.empty_like(weight), torch.zeros(1, dtype=torch.int32)
    asked: Sparsity = parse_sparsity(sparsity)

    def prune(method: Method) -> None:
        method.prune_(target, asked, inputs, bad)
        assert int(bad) == -1

    def fresh(name: str) -> Method:
        target.copy_(weight)
        return get_method(name)

    case = time_case(
        f"{sparsity} of {n}x{k} fp32",
        [Entrant(name, prune, partial(fresh, name)) for name in METHODS if name != "sparsegpt"],
        9,
    )
    seconds = []
    for _ in range(repeats):  # no warm-up: it takes seconds to minutes
        method = fresh("sparsegpt")
        start = time.perf_counter()
        prune(method)
        seconds.append(time.perf_counter() - start)
    case.timings["sparsegpt"] = timing_of([1e3 * value for value in seconds])
    ratio(case, "sparsegpt", "wanda")
    ratio(case, "magnitude", "wanda")
    return case


def bench_layers(sizes: tuple[tuple[int, int], ...]) -> list[Case]:
    cases = []
    for k in sorted({k for _, k in sizes}):
        case, inputs = bench_statistics(k)
        cases.append(case)
        for n in [n for n, columns in sizes if columns == k]:
            wide = k > 4096  # its factorisation takes a minute or more
            for sparsity in ("50%",) if wide else ("50%", "2:4"):
                cases.append(bench_layer(n, k, sparsity, inputs, 1 if wide else 2))
    return cases


# --- A whole model --------------------------------------------------------------------------------


def prune_once(method: str, hidden: int) -> dict[str, float]:
    """Seconds and extra bytes of one prune of a Llama with 4 blocks on 16 x 256 tokens, to 50 %."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1000,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 1000, (16, 256), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens[:1])  # code pages and thread stacks are not the prune's memory
    seconds: list[float] = []

    def prune() -> None:
        start = time.perf_counter()
        wanda_ext.prune_model(model, tokens, 0.5, method=method, swap=False, progress=False)
        seconds.append(time.perf_counter() - start)

    extra = harness.peak_extra_bytes(prune)
    return {"seconds": seconds[0], "extra_bytes": extra}


def bench_model(threads: int, hidden: int, repeats: int) -> list[dict[str, Any]]:
    """The methods in turn, each prune in a process of its own."""
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for _ in range(repeats):
        for method in METHODS:
            command = [sys.executable, __file__, "--threads", str(threads), "--once", method]
            command += ["--hidden", str(hidden)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs[method].append(json.loads(output.splitlines()[-1]))
    rows = []
    for method, found in runs.items():
        row = {"name": method, "hidden": hidden, "repeats": repeats}
        for key in ("seconds", "extra_bytes"):
            row[key] = statistics.median(run[key] for run in found)
        rows.append(row)
        print(f"{method:10} {row['seconds']:6.1f} s, {row['extra_bytes'] / 2**20:6.0f} MiB extra")
    return rows


# --- Quality against calibration size -------------------------------------------------------------


def bench_quality(settings: DemoSettings, samples: tuple[int, ...]) -> dict[str, Any]:
    """Held-out perplexity of the demo model at 50 %: mean and extremes over the seeds."""
    demo = Demo(settings)
    rows = []
    for count in samples:
        row: dict[str, Any] = {"name": str(count)}
        for method in ("wanda", "sparsegpt"):
            found = [
                demo.pruned_perplexity(0.5, method, nsamples=count, seed=seed) for seed in SEEDS
            ]
            row[method] = {
                "mean": statistics.mean(found),
                "low": min(found),
                "high": max(found),
                "seeds": found,
            }
        rows.append(row)
        told = ", ".join(f"{m} {row[m]['mean']:.2f}" for m in ("wanda", "sparsegpt"))
        print(f"{count:4} samples of {settings.seqlen} tokens: {told}")
    return {"dense": demo.perplexity_of(demo.dense), "samples": rows}


def draw(rows: list[dict[str, Any]], axes: Any) -> None:
    """Mean perplexity over samples, and the seeds' range."""
    counts = [int(row["name"]) for row in rows]
    for method, label in (("wanda", "Wanda"), ("sparsegpt", "SparseGPT")):
        axes.plot(counts, [row[method]["mean"] for row in rows], marker="o", label=label)
        lows, highs = ([row[method][key] for row in rows] for key in ("low", "high"))
        axes.fill_between(counts, lows, highs, alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["layers", "model", "quality"])
    parser.add_argument("--small", action="store_true", help="try it out: nothing is saved")
    parser.add_argument("--once", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--hidden", type=int, default=512, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.once:
        print(json.dumps(prune_once(args.once, args.hidden)))
        return
    sizes = ((256, 256), (512, 256)) if args.small else tuple(shapes.CPU)
    results: dict[str, Any] = {}
    if args.only in (None, "layers"):
        results["layers"] = bench_layers(sizes)
        harness.show(results["layers"])
    if args.only in (None, "model"):
        hidden, repeats = (128, 1) if args.small else (args.hidden, 3)
        results["model"] = bench_model(args.threads, hidden, repeats)
    if args.only in (None, "quality"):
        samples = SAMPLES[:2] if args.small else SAMPLES
        results["quality"] = bench_quality(DemoSettings(), samples)
    if args.only is None and not args.small:
        quality = results["quality"]
        labels = ("calibration samples of 128 tokens", "held-out perplexity at 50 %")
        plot("methods.svg", quality["dense"], labels, partial(draw, quality["samples"]))
        harness.save("methods.json", results)


if __name__ == "__main__":
    main()
