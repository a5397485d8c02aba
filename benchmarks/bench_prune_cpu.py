"""Pruning on the CPU beside the original's torch code: each op, a whole model, and the memory.

    python benchmarks/bench_prune_cpu.py [--threads 2] [--only ops|model|memory]

Linears of Llama-7B in fp32 and bf16; 2048-token statistics; a Llama with hidden 1024 and 4 blocks
on 16 x 256 tokens. Writes benchmarks/results/prune_cpu.json; checks results against the original
before it times them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import harness
import original
import shapes
import wanda_ext
from harness import Case, Entrant, ratio, time_case
from wanda_ext import ops

LABELS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
TOKENS = 2048


def _topk_and_scatter(weight: Tensor, scaler_row: Tensor, ratio: float) -> None:
    """The shortest torch code for the same rows: topk instead of a full sort."""
    metric = weight.abs() * scaler_row.sqrt()
    lowest = metric.topk(int(metric.shape[1] * ratio), dim=1, largest=False, sorted=False)[1]
    weight.scatter_(1, lowest, 0)


def _check(weight: Tensor, scaler_row: Tensor) -> None:
    """Our masks are the original's, but for equal scores in a group."""
    norm = scaler_row.sqrt()
    ours, theirs = weight.clone(), weight.clone()
    ops.prune_rows_(ours, norm, int(weight.shape[1] * 0.5))
    original.prune_unstructured_(theirs, scaler_row, 0.5)
    assert torch.equal(ours, theirs), "row selection differs from the original's"
    ours, theirs = weight.clone(), weight.clone()
    ops.prune_nm_(ours, norm, 2, 4)
    original.prune_group_(theirs, scaler_row, 2, 4)
    equal = (ours == theirs).float().mean().item()
    assert equal > 0.9999 if weight.dtype == torch.float32 else equal > 0.98, equal


def bench_selection(n: int, k: int, dtype: torch.dtype, repeats: int) -> list[Case]:
    """Row selection at 50 % and 2:4, every entrant on a fresh copy of the weight."""
    torch.manual_seed(0)
    weight, scaler_row = torch.randn(n, k).to(dtype), torch.rand(k).add_(0.1)
    norm, target = scaler_row.sqrt(), torch.empty_like(weight)
    _check(weight[:64].clone(), scaler_row)
    label = f"{n}x{k} {LABELS[dtype]}"

    def entrant(name: str, run: Callable[[Tensor], object], most: int | None = None) -> Entrant:
        return Entrant(name, run, lambda: target.copy_(weight), most)

    multiply = entrant("in-place multiply", lambda w: w.mul_(1.5))
    rows = time_case(
        f"prune_rows 50% {label}",
        [
            entrant("wanda_ext", lambda w: ops.prune_rows_(w, norm, int(k * 0.5))),
            multiply,
            entrant("topk and scatter", lambda w: _topk_and_scatter(w, scaler_row, 0.5), 5),
            entrant(
                "sort and scatter", lambda w: original.prune_unstructured_(w, scaler_row, 0.5), 3
            ),
        ],
        repeats,
    )
    ratio(rows, "sort and scatter", "wanda_ext")
    ratio(rows, "topk and scatter", "wanda_ext")
    groups = time_case(
        f"prune_nm 2:4 {label}",
        [
            entrant("wanda_ext", lambda w: ops.prune_nm_(w, norm, 2, 4)),
            multiply,
            entrant("topk per group", lambda w: original.prune_group_(w, scaler_row, 2, 4), 3),
        ],
        repeats,
    )
    ratio(groups, "topk per group", "wanda_ext")
    ratio(groups, "wanda_ext", "in-place multiply")
    return [rows, groups]


def bench_statistics(k: int, dtype: torch.dtype, repeats: int) -> Case:
    """One batch of 2048 tokens added to a running statistic."""
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, k).to(dtype)
    acc, theirs = torch.zeros(k, dtype=torch.float64), original.Statistic(k)
    ops.input_sumsq_(acc, x)
    theirs.add_batch(x)
    torch.testing.assert_close(acc.float(), theirs.scaler_row, rtol=1e-5, atol=0)
    case = time_case(
        f"input_sumsq {TOKENS}x{k} {LABELS[dtype]}",
        [
            Entrant("wanda_ext", lambda _: ops.input_sumsq_(acc, x)),
            Entrant("add_batch", lambda _: theirs.add_batch(x), repeats=15),
            Entrant("float().pow(2).sum(0)", lambda _: x[0].float().pow(2).sum(0)),
            Entrant("read (max)", lambda _: x.view(torch.int32).max()),
        ],
        repeats,
    )
    ratio(case, "add_batch", "wanda_ext")
    return case


def bench_ops() -> list[Case]:
    cases = []
    for dtype in LABELS:
        for n, k in shapes.CPU:
            cases += bench_selection(n, k, dtype, 25)
        cases += [bench_statistics(k, dtype, 60) for k in sorted({k for _, k in shapes.CPU})]
    return cases


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=1000,
        max_position_embeddings=512,
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    return model


def bench_model(repeats: int) -> list[Case]:
    """A whole prune against dense forward passes over the same tokens, fp32, 2:4 and 50 %."""
    model = _llama()
    weights = copy.deepcopy(model.state_dict())
    tokens = torch.randint(0, 1000, (16, 256), generator=torch.Generator().manual_seed(0))
    sequences = [{"input_ids": row[None]} for row in tokens]

    def restore() -> None:
        model.load_state_dict(weights)

    @torch.no_grad()
    def forward(rows: int) -> None:
        for part in tokens.split(rows):
            model(input_ids=part, use_cache=False)

    def prune(sparsity: str | float) -> None:
        wanda_ext.prune_model(model, tokens, sparsity, swap=False, progress=False)

    case = time_case(
        "whole prune, Llama hidden 1024, 4 blocks, 16x256 tokens, fp32",
        [
            Entrant("dense forward, 16 sequences one by one", lambda _: forward(1), restore),
            Entrant("dense forward, one batch of 16", lambda _: forward(16), restore),
            Entrant("wanda_ext 50%", lambda _: prune(0.5), restore),
            Entrant("wanda_ext 2:4", lambda _: prune("2:4"), restore),
            Entrant("original 50%", lambda _: original.prune(model, sequences, 0.5), restore, 2),
        ],
        repeats,
    )
    # The fair unit is the quicker dense forward.
    dense = min(
        (name for name in case.timings if name.startswith("dense")),
        key=lambda name: case.timings[name].median_ms,
    )
    for name in ("wanda_ext 50%", "wanda_ext 2:4", "original 50%"):
        ratio(case, name, dense)
    return [case]


def bench_memory() -> list[dict[str, Any]]:
    """The most memory each in-place op holds beyond its arguments."""
    rows = []
    n, k = 11008, 4096
    weight, scaler_row = torch.randn(n, k), torch.rand(k).add_(0.1)
    norm, bad = scaler_row.sqrt(), torch.zeros(1, dtype=torch.int32)
    wide, wide_norm = torch.randn(64, 131072), torch.rand(131072)
    x, acc = torch.randn(TOKENS, k), torch.zeros(k, dtype=torch.float64)
    calls = {
        f"prune_rows_ {n}x{k}": (lambda: ops.prune_rows_(weight, norm, k // 2, bad), k),
        "prune_rows_ 64x131072": (lambda: ops.prune_rows_(wide, wide_norm, 65536, bad), 131072),
        f"prune_nm_ 2:4 {n}x{k}": (lambda: ops.prune_nm_(weight, norm, 2, 4, bad), k),
        f"input_sumsq_ {TOKENS}x{k}": (lambda: ops.input_sumsq_(acc, x), k),
        f"sort and scatter {n}x{k}": (
            lambda: original.prune_unstructured_(weight, scaler_row, 0.5),
            k,
        ),
    }
    for name, (call, columns) in calls.items():
        if not name.startswith("sort"):
            call()  # code pages and thread stacks are not the op's memory
        extra = harness.peak_extra_bytes(call)
        bound = 4 * columns * torch.get_num_threads()
        rows.append({"op": name, "extra_bytes": extra, "one_fp32_row_a_thread_bytes": bound})
        print(f"{name:32} extra {extra / 1024:10.0f} KiB, a row a thread {bound / 1024:.0f} KiB")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["ops", "model", "memory"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    if args.only in (None, "memory"):
        results["memory"] = bench_memory()
    if args.only in (None, "ops"):
        results["ops"] = bench_ops()
    if args.only in (None, "model"):
        results["model"] = bench_model(7)
    harness.show([*results.get("ops", []), *results.get("model", [])])
    if args.only is None:
        harness.save("prune_cpu.json", results)


if __name__ == "__main__":
    main()
