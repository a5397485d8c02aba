"""Where the time of a whole prune goes, on a random model of Llama-7B's shape.

    python benchmarks/bench_model_cuda.py [--sparsity 2:4] [--blocks 32] [--hidden 4096]
                                          [--nsamples 128] [--seqlen 2048] [--device cuda]

Seconds of each phase (capture, statistics pass, propagation, the rest), device seconds inside our
statistics and selection kernels and their share of the whole, peak memory. bf16. Writes
benchmarks/results/model_<device>_<sparsity>.json.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import harness
import wanda_ext
from gpu_harness import device_state
from wanda_ext import ops
from wanda_ext.runner.walk import Walk

PHASES = {"capture": "__init__", "statistics pass": "statistics", "propagation": "advance"}
KERNELS = {
    "statistics": "input_sumsq_",
    "selection of rows": "prune_rows_",
    "selection of groups": "prune_nm_",
}


class Stopwatch:
    """Seconds by name: phases between two waits for the device, kernels between two events."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def now(self) -> float:
        if self.on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def of_phase(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            value = call(*args, **kwargs)
            self.seconds[name] += self.now() - start
            return value

        return timed

    def of_kernel(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        if not self.on_cuda:
            return self.of_phase(name, call)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            value = call(*args, **kwargs)
            end.record()
            self._events.append((name, start, end))
            return value

        return timed

    def read_events(self) -> None:
        self.now()
        for name, start, end in self._events:
            self.seconds[name] += start.elapsed_time(end) / 1e3
        self._events.clear()


def _llama(hidden: int, blocks: int, seqlen: int, device: torch.device) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=11008 * hidden // 4096,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=seqlen,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with device:
        model: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    return model


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    device = torch.device(arguments.device)
    model = _llama(arguments.hidden, arguments.blocks, arguments.seqlen, device)
    shape = (arguments.nsamples, arguments.seqlen)
    tokens = torch.randint(0, 32000, shape, generator=torch.Generator().manual_seed(0))
    watch = Stopwatch(device)
    for name, method in PHASES.items():
        setattr(Walk, method, watch.of_phase(name, getattr(Walk, method)))
    for name, op in KERNELS.items():
        setattr(ops, op, watch.of_kernel(name, getattr(ops, op)))
    before = 0
    if watch.on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = watch.now()
    wanda_ext.prune_model(model, tokens, arguments.sparsity, swap=False, progress=False)
    total = watch.now() - start
    watch.read_events()
    seconds = {name: round(value, 4) for name, value in watch.seconds.items()}
    kernels = sum(seconds.get(name, 0.0) for name in KERNELS)
    results: dict[str, object] = {
        "model": vars(arguments),
        "seconds": {**seconds, "total": round(total, 4)},
        "other": round(total - sum(seconds.get(name, 0.0) for name in PHASES), 4),
        "statistics and selection, share of the total": round(kernels / total, 4),
    }
    if watch.on_cuda:
        results["peak_bytes"] = torch.cuda.max_memory_allocated()
        results["model_bytes"] = before
        results["device"] = device_state()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sparsity", default="0.5")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    results = measure(arguments)
    name = f"model_{arguments.device}_{arguments.sparsity.replace(':', '_')}.json"
    harness.save(name, results)


if __name__ == "__main__":
    main()
