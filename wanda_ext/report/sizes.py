"""How many bytes a model takes as it was saved, and would take dense: its linears, all of it."""

from __future__ import annotations

from collections.abc import Iterable

from wanda_ext.report.report import LinearReport, PruneReport

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def dense_bytes(lines: Iterable[LinearReport]) -> int:
    """Of the weights of linears."""
    return sum(line.weights * BYTES.get(line.dtype, 4) for line in lines)


def written_bytes(lines: Iterable[LinearReport]) -> int:
    """The same, as saved."""
    return sum(
        dense_bytes([line]) if line.stored_bytes is None else line.stored_bytes for line in lines
    )


def whole_bytes(report: PruneReport) -> tuple[int, int] | None:
    """Of all tensors, in files, embeddings included: dense, and as saved; None: nothing was saved.

    Dense is what the same files would take with every linear dense, in the same dtype.
    """
    if not report.saved:
        return None
    saved: int = report.saved["bytes"]
    lines = report.linears
    return saved - written_bytes(lines) + dense_bytes(lines), saved
