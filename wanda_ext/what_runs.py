"""Which kernel each shape of a pruned model's linears will run on this machine, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from wanda_ext.explain import explain
from wanda_ext.linear import SparseLinear24
from wanda_ext.report import LinearReport, PruneReport

TOKENS = (1, 8, 2048)  # rows a call: decoding, a small batch of it, a prompt


def what_runs(
    report: PruneReport, packed: bool, tokens: Sequence[int] = TOKENS
) -> list[dict[str, Any]]:
    """A row a shape and number of rows: what runs, why, and the dispatch table's times (or None).

    packed: whether 2:4 linears are saved packed. For the GPU that torch would use, else the CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts: dict[tuple[tuple[int, int], str, bool], int] = {}
    for line in report.linears:
        key = (line.shape, line.dtype, packed and becomes_packed(line))
        counts[key] = counts.get(key, 0) + 1
    rows: list[dict[str, Any]] = []
    for (shape, dtype, sparse), count in counts.items():
        about = {"shape": list(shape), "dtype": dtype, "linears": count}
        if not sparse:
            dense = {"path": "dense", "why": "torch's dense product: it is not packed"}
            rows.append({**about, "m": None, **dense, "packed_us": None, "dense_us": None})
            continue
        n, k = shape
        empty = SparseLinear24(k, n, False, device=device, dtype=getattr(torch, dtype))
        for m in tokens:
            told = explain(empty, m)
            times = {"packed_us": told.packed_us, "dense_us": told.dense_us}
            rows.append({**about, "m": m, "path": told.path, "why": told.why, **times})
    return rows


def becomes_packed(line: LinearReport) -> bool:
    """Whether a linear of the report has the pattern and the shape that can be packed."""
    return line.status == "pruned" and line.asked == "2:4" and line.shape[1] % 16 == 0
