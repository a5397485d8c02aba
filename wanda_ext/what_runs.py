"""Which kernel each shape of a pruned model's linears will run on this machine, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from wanda_ext.explain import explain
from wanda_ext.formats import named_format
from wanda_ext.report import PruneReport

TOKENS = (1, 8, 2048)  # rows a call: decoding, a small batch of it, a prompt


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
