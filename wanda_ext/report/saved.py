"""What a report says of a saved model: its files, its formats, and what each shape will run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wanda_ext.checkpoint import WandaExtConfig
from wanda_ext.packed import explain, named_format
from wanda_ext.report.page import PAGE, REPORT, write
from wanda_ext.report.report import PruneReport

TOKENS = (1, 8, 2048)  # rows a call: decoding, a small batch of it, a prompt


def note_saved(report: PruneReport, folder: Path, final: Path, packed: bool) -> None:
    """Enters what was saved in the report, and writes it and its page beside the model's files.

    folder: where the files are now. final: what it will be called. packed: as what they were asked.
    """
    files = folder.glob("*.safetensors")
    saved = sum(file.stat().st_size for file in files)
    report.saved = {"directory": str(final), "packed": packed, "bytes": saved}
    _note_formats(report, folder)
    report.kernels = what_runs(report)
    report.save(folder / REPORT)
    write(report, folder / PAGE)


def _note_formats(report: PruneReport, folder: Path) -> None:
    """Enters which linears were saved packed, and their bytes, as config.json tells."""
    entry = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = entry.get("quantization_config")
    packed = {} if found is None else WandaExtConfig(**found).packed
    for line in report.linears:
        if line.name in packed:
            line.stored, options = packed[line.name]
            kind, itemsize = named_format(line.stored), getattr(torch, line.dtype).itemsize
            line.stored_bytes = kind.nbytes_of(*line.shape, itemsize, **options)


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
