"""What a report says of a saved model: its files, its formats, and what each shape will run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wanda_ext.checkpoint import PACKED, WandaExtConfig, open_checkpoint, told_packed
from wanda_ext.packed import explain, named_format
from wanda_ext.report.page import PAGE, REPORT, write
from wanda_ext.report.report import PruneReport

TOKENS = (1, 8, 2048)  # rows a call: decoding, a small batch of it, a prompt


def note_saved(report: PruneReport, folder: Path, final: Path, packed: bool) -> None:
    """Enters what was saved in the report, and writes it and its page beside the model's files.

    folder: where the files are now. final: what it will be called. packed: as what they were asked.
    """
    checkpoint = open_checkpoint(folder)
    files = {header.file for header in checkpoint.headers.values()}
    saved = sum(file.stat().st_size for file in files)
    report.saved = {"directory": str(final), "packed": packed, "bytes": saved}
    report.swap = "saved dense, with zeros: it loads anywhere"
    if checkpoint.packed is not None:
        _note_formats(report, checkpoint.packed)
    report.kernels = what_runs(report)
    write_both(report, folder)


def write_both(report: PruneReport, folder: Path) -> None:
    """Writes the report and its page into a directory, each whole or not at all."""
    for name, save in ((REPORT, report.save), (PAGE, partial(write, report))):
        fresh = folder / f".{name}.partial"
        save(fresh)
        fresh.replace(folder / name)


def _note_formats(report: PruneReport, config: WandaExtConfig) -> None:
    """Enters which linears were saved packed, and their bytes."""
    outcome = {}
    for line in report.linears:
        if line.name in config.packed:
            line.stored, options = config.packed[line.name]
            kind, itemsize = named_format(line.stored), getattr(torch, line.dtype).itemsize
            line.stored_bytes = kind.nbytes_of(*line.shape, itemsize, **options)
        if line.status == "pruned":
            why = config.dense.get(line.name, "a part of a fused weight, which stays dense")
            outcome[line.name] = PACKED if line.stored else why
    report.swap = told_packed(outcome, "saved {} of {} pruned linears packed")


def what_runs(report: PruneReport, tokens: Sequence[int] = TOKENS) -> list[dict[str, Any]]:
    """A row a shape and number of rows: what runs, why, and the dispatch table's times (or None).

    For the linears as they were saved, on the GPU that torch would use, else on the CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts: dict[tuple[tuple[int, int], str, str], int] = {}
    for line in report.linears:
        key = (line.shape, line.dtype, line.stored)
        counts[key] = counts.get(key, 0) + 1
    rows: list[dict[str, Any]] = []
    for (shape, dtype, stored), count in counts.items():
        about = {"shape": list(shape), "dtype": dtype, "linears": count}
        if not stored:
            dense = {"path": "dense", "why": "torch's dense product: it is not packed"}
            rows.append({**about, "m": None, **dense, "packed_us": None, "dense_us": None})
            continue
        n, k = shape
        kind = named_format(stored)
        empty = kind(k, n, False, device=device, dtype=getattr(torch, dtype))
        for m in tokens:
            told = explain(empty, m)
            times = {"packed_us": told.packed_us, "dense_us": told.dense_us}
            rows.append({**about, "m": m, "path": told.path, "why": told.why, **times})
    return rows
