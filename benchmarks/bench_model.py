"""A whole model, dense and packed: prefill and decode, what its linears take of it, and the memory.

    python benchmarks/bench_model.py [--model 7b|8b] [--work decode|prefill|all]
                                     [--compile blocks|none] [--out FILE] [--small]

A random Llama of the shape of Llama-7B or of Llama-3-8B (grouped queries), bf16, its blocks 2:4:
dense, packed, and "fused": packed with q, k, v and gate, up merged. Decoding runs greedily on a
static cache of 512 tokens that is half full. Blocks are compiled and everything is captured in CUDA
graphs, on all sides; entrants take turns. "linears" is the same model's linears alone, in a graph
of their own; "rest" is what remains. Logits are compared before anything is timed. Writes
benchmarks/results/model_24.json after every kind of work; those that it holds already, of the same
binary, GPU and torch, stay.

--small: a tiny model on the CPU, to try the program out; writes only where --out says.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import harness
from gpu_harness import GpuEntrant, device_state, resumed, store, time_gpu_case
from harness import Case, Entrant, time_case
from llama_24 import (
    STEPS,
    Decode,
    Linears,
    Prefill,
    bytes_of,
    compile_blocks,
    linears_of,
    packed_twin,
    random_llama,
    works,
)
from torch_24 import relative_error
from wanda_ext.packed import dispatch

DENSE, PACKED, FUSED = "dense", "packed", "fused"
ALLOWED = 0.1  # of logits, after the roundings of all blocks
GOALS = {  # times faster than dense; shares of its bytes
    "7b": {"decode, batch 1": 1.3, "prefill": 1.2, "linears": 0.57, "model": 0.59},
    "8b": {"decode, batch 1": 1.25, "prefill": 1.2, "linears": 0.57, "model": 0.63},
}
ROUNDS = 20


@torch.no_grad()
def variants(size: str, device: torch.device) -> dict[str, Any]:
    """The three models, after their logits were found to be the same."""
    dense = random_llama(size, device)
    models = {
        DENSE: dense,
        PACKED: packed_twin(dense, fuse=False),
        FUSED: packed_twin(dense, fuse=True),
    }
    logits = {name: Prefill(model, 2, 16).run()[:, 0] for name, model in models.items()}
    for name in (PACKED, FUSED):
        error = relative_error(logits[name], logits[DENSE])
        assert error <= ALLOWED, f"{name}: logits are {error} from those of dense"
    return models


def memory(models: dict[str, Any]) -> dict[str, Any]:
    """Bytes of the blocks' linears and of the whole model, and their shares of dense."""
    found: dict[str, Any] = {}
    for name, model in models.items():
        linears = bytes_of(linears_of(model))
        found[name] = {"linears": linears, "model": bytes_of([model], recurse=True)}
    for name in (PACKED, FUSED):
        for what in found[DENSE]:
            found[f"{name} / {DENSE}, {what}"] = round(found[name][what] / found[DENSE][what], 4)
    return found


def timed(name: str, runs: dict[str, Any], device: torch.device, seconds: float) -> Case:
    """Milliseconds of a run of each, by turns; each is restored before, untimed."""

    def warm(run: Any) -> None:  # compiles, twice: the second run may meet other strides
        for _ in range(2):
            run.restore()
            run.run()
        run.restore()

    for run in runs.values():
        warm(run)
    if dispatch.gpu_of(device) is None:
        plain = [Entrant(key, lambda _, r=run: r.run(), run.restore) for key, run in runs.items()]
        return time_case(name, plain, 3)

    def restore() -> None:
        for run in runs.values():
            run.restore()

    entrants = [GpuEntrant(key, lambda _, r=run: r.run()) for key, run in runs.items()]
    case = time_gpu_case(name, entrants, 1, restore, ROUNDS, seconds)
    if case.wrong:  # half of a comparison tells nothing
        raise RuntimeError(f"{name}: {case.wrong}")
    return case


@torch.no_grad()
def measure(
    models: dict[str, Any], name: str, kind: Any, batch: int, length: int, seconds: float
) -> dict[str, Any]:
    """One kind of work: all of it, its linears alone, and the rest."""
    device = models[DENSE].device
    runs = {key: kind(model, batch, length) for key, model in models.items()}
    times = STEPS if kind is Decode else 1
    tokens = batch if kind is Decode else batch * length
    linears = {key: Linears(model, tokens, times) for key, model in models.items()}
    whole = timed(name, runs, device, seconds)
    alone = timed(f"{name}, linears", linears, device, seconds)
    result: dict[str, Any] = {"ms": {}, "ratios": {}, "timings": whole.timings}
    for key in models:
        all_ms = whole.timings[key].median_ms / times
        linears_ms = alone.timings[key].median_ms / times
        parts = {"all": all_ms, "linears": linears_ms, "rest": all_ms - linears_ms}
        result["ms"][key] = {part: round(value, 6) for part, value in parts.items()}
    for key in (PACKED, FUSED):
        for part in ("all", "linears"):
            ratio = result["ms"][DENSE][part] / result["ms"][key][part]
            result["ratios"][f"{DENSE} / {key}, {part}"] = round(ratio, 4)
    return result


def kernels(models: dict[str, Any], m: int) -> dict[str, str]:
    """What linear_24 runs for each shape of the packed linears."""
    found: dict[str, str] = {}
    for linear in (linear for key in (PACKED, FUSED) for linear in linears_of(models[key])):
        gpu = dispatch.gpu_of(linear.weight.device)
        if gpu is not None:
            n, k, dtype = linear.out_features, linear.in_features, linear.weight.dtype
            kernel, splits = dispatch.choose(gpu, dispatch.name_of(dtype), n, k, m)
            found[f"{n}x{k}"] = f"{kernel}/{splits}"
    return found


def against_goals(size: str, result: dict[str, Any]) -> dict[str, Any]:
    """What the fused model reaches of what was measured so far."""
    reached: dict[str, Any] = {}
    for what, goal in GOALS.get(size, {}).items():
        if goal < 1:
            value = result["memory"][f"{FUSED} / {DENSE}, {what}"]
            reached[what] = {"value": value, "goal": goal, "reached": value <= goal}
            continue
        works = [work for name, work in result["work"].items() if name.startswith(what)]
        ratios = [work["ratios"][f"{DENSE} / {FUSED}, all"] for work in works]
        if ratios:
            reached[what] = {"value": min(ratios), "goal": goal, "reached": min(ratios) >= goal}
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=["7b", "8b"], default="7b")
    parser.add_argument("--work", choices=["decode", "prefill", "all"], default="all")
    parser.add_argument("--compile", choices=["blocks", "none"], default="blocks")
    parser.add_argument("--seconds", type=float, default=1.0, help="of every kind, at least")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    size, device = ("small", "cpu") if args.small else (args.model, "cuda")
    path = args.out or (None if args.small else harness.RESULTS / "model_24.json")
    results = resumed(path, {"device": [], "models": {}})
    result = results["models"].setdefault(size, {"compile": args.compile, "work": {}})
    if result["compile"] != args.compile:
        result = results["models"][size] = {"compile": args.compile, "work": {}}
    wanted = [
        work
        for work in works(size)
        if args.work in ("all", work[0].split()[0].rstrip(",")) and work[0] not in result["work"]
    ]
    if wanted:
        models = variants(size, torch.device(device))
        result["memory"] = memory(models)
        for model in models.values() if args.compile == "blocks" else ():
            compile_blocks(model)
        for name, kind, batch, length in wanted:
            result["work"][name] = measure(models, name, kind, batch, length, args.seconds)
            tokens = batch if kind is Decode else batch * length
            result["work"][name]["kernels"] = kernels(models, tokens)
            result["goals"] = against_goals(size, result)
            print(size, name, result["work"][name]["ms"], flush=True)
            results["device"].append(device_state())
            store(path, results)
            torch._dynamo.reset()
    print(json.dumps({what: result.get(what) for what in ("memory", "goals")}))


if __name__ == "__main__":
    main()
