"""What a prune costs, and what repair, masked LoRA and fine-tuning under masks win back.

    python benchmarks/bench_recovery.py [--threads 2] [--small]

The demo's Llama, pruned to 60 %, 70 % and 2:4 by Wanda and SparseGPT; each repaired on the very
calibration data that it was pruned with; Wanda's also trained on the training text, by adapters
that are merged then, and in full with the zeros held. Held-out perplexity of each, its seconds, how
many pruned weights are zero no more, and how far merging moves the logits. Writes
benchmarks/results/recovery.json.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

import harness
import wanda_ext
from demo_runs import Demo
from wanda_ext.cli.demo_model import DemoSettings

SPARSITIES = ("60%", "70%", "2:4")
METHODS = ("wanda", "sparsegpt")
EPOCHS = 2  # over the training text; the dense model has seen it about four times
BATCH = 16
LORA = LoraConfig(target_modules="all-linear", r=16, lora_alpha=32)
LORA_RATE, FULL_RATE = 2e-3, 1e-3


class Bench(Demo):
    """What is measured of the dense model's copies."""

    def __init__(self, small: bool) -> None:
        super().__init__(DemoSettings())
        self.train_ids = self.ids_of(self.text)
        if small:
            self.train_ids, self.held_out = self.train_ids[:4096], self.held_out[:1024]
        self.drawn = self.data(**({"nsamples": 8} if small else {}))
        self.perplexity = self.perplexity_of(self.dense)

    def measured(
        self, model: Any, work: Callable[[Any], Any], pruned: Any = None
    ) -> tuple[Any, dict[str, float]]:
        """What `work` makes of a copy of `model`, and its figures; beside `pruned`, its zeros."""
        model = copy.deepcopy(model)
        start = time.perf_counter()
        work(model)
        seconds = time.perf_counter() - start
        figures = {"perplexity": self.perplexity_of(model), "seconds": round(seconds, 1)}
        if pruned is not None:
            figures["zeros changed"] = zeros_changed(pruned, model)
        return model, figures

    def prune(self, method: str, sparsity: str) -> Callable[[Any], Any]:
        return lambda model: wanda_ext.prune_model(
            model, [self.text], sparsity, method=method, swap=False, **self.drawn
        )

    def repair(self, model: Any) -> None:
        wanda_ext.repair(model, self.dense, [self.text], **self.drawn)

    def fine_tune(self, model: Any) -> None:
        """All weights, the zeros held."""
        self._train(model, FULL_RATE, lambda optimizer: wanda_ext.hold_masks(optimizer, model))

    def lora(self, model: Any) -> float:
        """Masked adapters at all linears, trained and merged; how far that moved the logits, as a
        share of the largest."""
        ids = self.held_out[: 8 * self.settings.seqlen].view(-1, self.settings.seqlen)
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            adapted = wanda_ext.add_adapters(model, LORA)
        self._train(adapted, LORA_RATE, lambda optimizer: None)
        with torch.no_grad():
            before = adapted(input_ids=ids).logits
            merged = wanda_ext.merge_adapters(adapted)
            moved = (merged(input_ids=ids).logits - before).abs().max()
            return float(moved / before.abs().max())

    def _train(
        self, model: Any, rate: float, prepare: Callable[[torch.optim.Optimizer], object]
    ) -> None:
        """EPOCHS over the windows of the training text, shuffled."""
        length = self.settings.seqlen
        windows = self.train_ids[: len(self.train_ids) // length * length].view(-1, length)
        steps = EPOCHS * -(-len(windows) // BATCH)
        optimizer = torch.optim.AdamW(_trained(model), betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=steps, pct_start=0.1
        )
        prepare(optimizer)
        with torch.random.fork_rng():  # dropout and the order of the windows
            torch.manual_seed(self.settings.seed)
            model.train()
            for _ in range(EPOCHS):
                for rows in torch.split(torch.randperm(len(windows)), BATCH):
                    batch = windows[rows]
                    loss = model(input_ids=batch, labels=batch).loss
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(_trained(model), 1.0)
                    optimizer.step()
                    schedule.step()
            model.eval()

    def left(self, repaired: dict[str, float], pruned: dict[str, float]) -> float:
        """The share of a prune's loss over dense that a repair leaves."""
        loss = pruned["perplexity"] - self.perplexity
        return (repaired["perplexity"] - self.perplexity) / loss


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def zeros_changed(pruned: nn.Module, model: nn.Module) -> int:
    """How many zeros of `pruned`'s matrices are no zeros in `model`."""
    pairs: Iterable[tuple[Tensor, Tensor]] = zip(
        pruned.parameters(), model.parameters(), strict=True
    )
    return sum(int(((p == 0) & (q != 0)).sum()) for p, q in pairs if p.dim() == 2)


def recovered(bench: Bench, sparsity: str) -> dict[str, Any]:
    """One sparsity: the figures of every way."""
    row: dict[str, Any] = {"name": sparsity}

    def entered(name: str, figures: dict[str, float]) -> None:
        row[name] = figures
        print(sparsity, name, figures, flush=True)

    models = {}
    for method in METHODS:
        pruned, figures = bench.measured(bench.dense, bench.prune(method, sparsity))
        models[method] = pruned
        entered(method, figures)
        _, repaired = bench.measured(pruned, bench.repair, pruned)
        repaired["share of the loss left"] = bench.left(repaired, figures)
        entered(f"{method} + repair", repaired)
    moved = []
    pruned = models["wanda"]
    _, figures = bench.measured(pruned, lambda model: moved.append(bench.lora(model)), pruned)
    entered("wanda + lora", figures | {"logits moved by merging": moved[0]})
    entered("wanda + fine-tuning", bench.measured(pruned, bench.fine_tune, pruned)[1])
    return row


def shows(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What is to hold at every sparsity."""
    trained = [value for row in rows for value in row.values() if "zeros changed" in value]
    return {
        "sparsegpt below wanda": all(
            row["sparsegpt"]["perplexity"] < row["wanda"]["perplexity"] for row in rows
        ),
        "repair leaves at most half of the loss": all(
            row[f"{method} + repair"]["share of the loss left"] <= 0.5
            for row in rows
            for method in METHODS
        ),
        "no zero is changed": all(figures["zeros changed"] == 0 for figures in trained),
        "merging moves logits by at most 1e-5": all(
            row["wanda + lora"]["logits moved by merging"] <= 1e-5 for row in rows
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="little data; nothing is saved")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.small)
    rows = [recovered(bench, sparsity) for sparsity in SPARSITIES]
    holds = shows(rows)
    print(holds)
    if not args.small:
        training = {"epochs": EPOCHS, "batch": BATCH, "r": LORA.r, "lora_alpha": LORA.lora_alpha}
        training |= {"lora learning rate": LORA_RATE, "full learning rate": FULL_RATE}
        results: dict[str, Any] = {"settings": asdict(bench.settings), "training": training}
        results |= {"dense": {"perplexity": bench.perplexity}, "patterns": rows, "shows": holds}
        harness.save("recovery.json", results)


if __name__ == "__main__":
    main()
