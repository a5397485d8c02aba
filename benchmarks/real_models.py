"""What pruning costs real language models: perplexity by pattern, method and update.

Two models (real_sources.py tells what they are), or one of your own with --model. Calibration:
32 windows of 512 tokens of a book of political prose ("faq"), or of both kinds, half of each
("mixed": with "manual", a system administrator's handbook). Judged on 32 held-out windows of 512
of both, some also on a kind that no calibration has ("code"); windows start as the model expects.

A cell is one prune. It is stored in results/real_models.json when it is done, and not done again;
`--list` shows the cells, `--cells GLOB` picks some. `--small`: two patterns on eight windows, in
memory only, and an error where the order of the methods is not what it should be.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import fnmatch
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

import harness
import real_sources
import wanda_ext
from demo_runs import plot
from wanda_ext.checkpoint import load_pretrained, load_tokenizer
from wanda_ext.packed import pack
from wanda_ext.quality import evaluate_text, evaluation_text, repair

RESULTS = "real_models.json"
SEQLEN, WINDOWS = 512, 32
PATTERNS = ("50%", "60%", "70%", "16:32", "8:16", "4:8", "2:4")
METHODS = {  # name: (method, update)
    "magnitude": ("magnitude", None),
    "wanda": ("wanda", None),
    "wanda-variant": ("wanda-variant", None),
    "sparsegpt": ("sparsegpt", None),
    "corrected": ("sparsegpt", "corrected"),
    "wanda, corrected": ("wanda", "corrected"),
}
MIXED = {"faq": 1, "manual": 1}


@dataclass(frozen=True)
class Cell:
    """One prune of one model."""

    model: str
    method: str = "dense"
    pattern: str = "dense"
    calib: str = "faq"
    seed: int = 0
    repaired: bool = False
    protocol: str = "model"

    @property
    def texts(self) -> tuple[str, ...]:
        """What it is judged on; a kind that no calibration has only where that tells something."""
        shown = self.method in ("dense", "wanda", "corrected") and not self.seed
        with_code = shown and self.pattern in ("dense", "2:4", "16:32")
        return ("faq", "manual", "code") if with_code else ("faq", "manual")

    @property
    def name(self) -> str:
        words = [self.model, self.pattern, self.method]
        words += [self.calib] * (self.calib != "faq") + ["repaired"] * self.repaired
        words += [f"seed {self.seed}"] * (self.seed != 0)
        words += [f"protocol {self.protocol}"] * (self.protocol != "model")
        return ", ".join(words)


def cells() -> list[Cell]:
    """All of them, those first that say most."""
    every = ("magnitude", "wanda", "sparsegpt", "corrected")
    found = [Cell(model) for model in real_sources.MODELS]
    found += [
        Cell(m, name, p) for p in ("2:4", "16:32") for m in ("gemma", "qwen") for name in every
    ]
    found += [Cell(m, name, p) for p in ("50%", "4:8") for m in ("gemma", "qwen") for name in every]
    found += [Cell("gemma", name, p) for p in ("60%", "70%", "8:16") for name in every]
    for pattern in ("2:4", "16:32"):
        for name in ("wanda", "corrected"):
            found += [Cell(m, name, pattern, "mixed") for m in ("gemma", "qwen")]
            found += [Cell("gemma", name, pattern, seed=seed) for seed in (1, 2)]
        found.append(Cell("gemma", "wanda-variant", pattern))
        found.append(Cell("gemma", "wanda, corrected", pattern))
        found += [Cell("gemma", name, pattern, repaired=True) for name in ("wanda", "corrected")]
    found += [
        Cell("gemma", "dense", protocol="paper"),
        Cell("gemma", "wanda", "2:4", protocol="paper"),
    ]
    return found


class Bench:
    """One model, its texts, and what a dense forward of the calibration windows costs."""

    def __init__(self, model: str, windows: int, texts: dict[str, Any]) -> None:
        self.folder = real_sources.model_folder(model)
        self.windows = windows
        self.texts = texts  # to be judged on
        self.tokenizer = load_tokenizer(self.folder)

    def load(self) -> Any:
        model, _ = load_pretrained(self.folder, dtype=torch.bfloat16)
        return model.eval()

    def run(self, cell: Cell) -> dict[str, Any]:
        """Prunes and measures."""
        model = self.load()
        row: dict[str, Any] = {
            "name": cell.name,
            **asdict(cell),
            "threads": torch.get_num_threads(),
        }
        if cell.method != "dense":
            row |= self._prune(model, cell)
        protocol = cell.protocol if cell.method == "dense" else "model"
        row["perplexity"] = {
            name: evaluate_text(
                model,
                self.tokenizer,
                self.texts[name],
                SEQLEN,
                windows=self.windows,
                protocol=protocol,
            ).perplexity
            for name in cell.texts
            if name in self.texts
        }
        return row

    def _prune(self, model: Any, cell: Cell) -> dict[str, Any]:
        dense = copy.deepcopy(model) if cell.repaired else None
        forward = self._forward(model)
        method, update = METHODS[cell.method]
        data = {
            "tokenizer": self.tokenizer,
            "nsamples": self.windows,
            "seqlen": SEQLEN,
            "seed": cell.seed,
            "protocol": cell.protocol,
        }
        calib: Any = str(real_sources.text_file("faq", "calib"))
        if cell.calib == "mixed":
            calib = {str(real_sources.text_file(name, "calib")): n for name, n in MIXED.items()}
        clock = Clock()
        report = wanda_ext.prune_model(
            model, calib, cell.pattern, method=method, update=update, swap=False, **data
        )
        row = clock.read("prune")
        if dense is not None:
            clock = Clock()
            repair(model, dense, calib, **data)
            row |= clock.read("repair")
        row["prune_forwards"] = row["prune_cpu_seconds"] / forward["cpu_seconds"]
        row |= {"dense_forward": forward, "zeros": report.sparsity, **bytes_of(model, report)}
        return row

    @torch.inference_mode()
    def _forward(self, model: Any) -> dict[str, float]:
        """Of the dense blocks, on as many tokens as calibration has."""
        ids = torch.randint(10, 1000, (2, SEQLEN))
        model.base_model(ids, use_cache=False)
        clock = Clock()
        for _ in range(self.windows // 2):
            model.base_model(ids, use_cache=False)
        return clock.read("")


class Clock:
    """Seconds on the wall and of the processor, from its making on."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self, what: str) -> dict[str, float]:
        prefix = f"{what}_" if what else ""
        return {
            f"{prefix}seconds": time.perf_counter() - self._wall,
            f"{prefix}cpu_seconds": time.process_time() - self._cpu,
        }


def bytes_of(model: Any, report: Any) -> dict[str, int]:
    """Of the pruned linears, dense and packed, and of the whole model."""
    dense = packed = 0
    for line in report.pruned:
        weight = model.get_submodule(line.name).weight
        dense += weight.nbytes
        try:
            packed += sum(tensor.nbytes for tensor in pack(weight)[1].values())
        except ValueError:
            packed += weight.nbytes
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return {"linears": dense, "linears_packed": packed, "whole_model": whole}


# --- Results --------------------------------------------------------------------------------------


@contextmanager
def stored() -> Iterator[dict[str, Any]]:
    """The results file's cells by name, locked; what is put in is written."""
    path = harness.RESULTS / RESULTS
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = json.loads(path.read_text())["cells"] if path.exists() else []
        rows = {row["name"]: row for row in found}
        before = dict(rows)
        yield rows
        if rows != before:
            order = {cell.name: i for i, cell in enumerate(cells())}
            kept = sorted(rows.values(), key=lambda row: order.get(row["name"], len(order)))
            harness.save(RESULTS, {"about": real_sources.ABOUT, "cells": kept}, show=False)
    path.with_suffix(".lock").unlink(missing_ok=True)


def told(row: dict[str, Any]) -> str:
    found = ", ".join(f"{name} {value:.2f}" for name, value in row["perplexity"].items())
    cost = f"; {row['prune_forwards']:.1f} forwards" if "prune_forwards" in row else ""
    return f"{row['name']}: {found}{cost}"


def draw(rows: list[dict[str, Any]], axes: Any) -> None:
    """Perplexity on held-out text of the calibration's kind, over the bytes of the linears."""
    lines: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for row in rows:
        plain = row["calib"] == "faq" and not row["seed"] and not row["repaired"]
        if plain and row["method"] in ("wanda", "sparsegpt", "corrected"):
            point = row["linears_packed"] / row["linears"], row["perplexity"]["faq"], row["pattern"]
            lines.setdefault((row["model"], row["method"]), []).append(point)
    for (model, method), points in lines.items():
        style = "o-" if model == "gemma" else "s--"
        ordered = sorted(points)
        axes.plot(
            [p[0] for p in ordered], [p[1] for p in ordered], style, label=f"{model} {method}"
        )
        for x, y, pattern in points:
            axes.annotate(pattern, (x, y), fontsize=6)
    axes.set_yscale("log")


# --- The small form -------------------------------------------------------------------------------


def small(windows: int = 8) -> None:
    """Raises AssertionError where the methods do not order as they should."""
    texts = {"faq": evaluation_text(str(real_sources.text_file("faq", "eval")))}
    bench = Bench("gemma", windows, texts)
    found = {}
    for cell in (
        Cell("gemma"),
        *(Cell("gemma", name, p) for p in ("2:4", "16:32") for name in ("wanda", "corrected")),
    ):
        row = bench.run(cell)
        print(told(row), flush=True)
        found[cell.pattern, cell.method] = row["perplexity"]["faq"]
    dense = found["dense", "dense"]
    for pattern in ("2:4", "16:32"):
        assert dense < found[pattern, "corrected"] < found[pattern, "wanda"], found
    assert found["16:32", "wanda"] < found["2:4", "wanda"], found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="the cells, and what is known of them")
    parser.add_argument("--cells", default="*", metavar="GLOB", help="those of such a name")
    parser.add_argument("--again", action="store_true", help="cells that are stored, too")
    parser.add_argument("--model", help="a directory or a Hub id, in the place of gemma")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.small:
        return small()
    chosen = [cell for cell in cells() if fnmatch.fnmatch(cell.name, arguments.cells)]
    with stored() as rows:
        known = dict(rows)
    if arguments.list:
        for cell in chosen:
            print(told(known[cell.name]) if cell.name in known else f"{cell.name}: not measured")
        return None
    texts = {
        name: evaluation_text(str(real_sources.text_file(name, "eval")))
        for name in real_sources.TEXTS
    }
    benches: dict[str, Bench] = {}
    for cell in chosen:
        if cell.name in known and not arguments.again:
            continue
        if cell.model not in benches:
            benches[cell.model] = Bench(arguments.model or cell.model, WINDOWS, texts)
        row = benches[cell.model].run(cell)
        with stored() as rows:
            rows[cell.name] = row
            known = dict(rows)
        print(told(row), flush=True)
    pruned = [row for row in known.values() if "linears" in row]
    if pruned:
        labels = ("bytes of the pruned linears, of dense", "perplexity, held-out prose")
        plot(
            "real_models.svg",
            known["gemma, dense, dense"]["perplexity"]["faq"],
            labels,
            partial(draw, pruned),
        )
    return None


if __name__ == "__main__":
    main()
