"""The tables of report.html, and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from wanda_ext.report.plots import percent, place_of
from wanda_ext.report.report import LinearReport, PruneReport

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
UNMEASURED = "not measured"


def blocks_table(report: PruneReport) -> str:
    grouped: dict[str, list[LinearReport]] = {}
    for line in report.linears:
        grouped.setdefault(place_of(line.name)[0], []).append(line)
    errors = {index_of(block["name"]): block for block in report.gate.get("blocks", ())}
    repairs = {index_of(block["name"]): block for block in report.repair.get("blocks", ())}
    heads = ["block", "linears pruned", "zeros", "score lost"]
    heads += ["own error", "grown error"] if errors else []
    heads += ["before repair", "after repair"] if repairs else []
    rows = []
    for index, lines in grouped.items():
        part = PruneReport(lines)
        kept, lost = (sum(getattr(x, f"score_{what}") for x in lines) for what in ("kept", "lost"))
        share = lost / (kept + lost) if kept + lost else 0.0
        row = [index, f"{len(part.pruned)} of {len(lines)}", percent(part.sparsity), percent(share)]
        for found, keys in ((errors, ("own", "grown")), (repairs, ("error_before", "error_after"))):
            if found:
                block = found.get(index, {})
                row += [percent(block[key]) if key in block else "-" for key in keys]
        rows.append(row)
    return _table(heads, rows, {1, 2, 3, 4, 5, 6, 7})


def linears_table(report: PruneReport) -> str:
    heads = ("linear", "shape", "dtype", "asked", "zeros", "score lost", "tokens", "ms", "status")
    rows = [
        (
            line.name,
            "x".join(map(str, line.shape)),
            line.dtype,
            line.asked or "-",
            percent(line.reached),
            percent(line.lost) if line.status == "pruned" else "-",
            f"{line.tokens:,}" if line.tokens else "-",
            f"{line.seconds * 1e3:.1f}" if line.status == "pruned" else "-",
            f"{line.status} {line.note}".strip(),
        )
        for line in report.linears
    ]
    table = _table(heads, rows, {1, 4, 5, 6, 7}, "linears")
    return f"<details open><summary>All {len(rows)} linears</summary>{table}</details>"


def kernels_table(report: PruneReport) -> str:
    told = f"<p>{escape(report.swap)}.</p>"
    if not report.kernels:
        return (
            told + "<p>What a linear runs, and why: <code>wanda_ext.explain(linear, m)</code>.</p>"
        )
    heads = ("shape", "dtype", "linears", "rows a call", "runs", "packed µs", "dense µs", "why")
    rows = [
        (
            "x".join(map(str, row["shape"])),
            row["dtype"],
            str(row["linears"]),
            "any" if row["m"] is None else str(row["m"]),
            row["path"],
            _microseconds(row["packed_us"]),
            _microseconds(row["dense_us"]),
            row["why"],
        )
        for row in report.kernels
    ]
    return told + _table(heads, rows, {0, 2, 3, 5, 6})


def times_table(report: PruneReport) -> str:
    selection = sum(line.seconds for line in report.linears)
    rows = [(phase, seconds(time)) for phase, time in report.timings.items()]
    rows.append(("choosing and zeroing weights, in all", seconds(selection)))
    return _table(("phase", "time"), rows, {1})


def pairs_table(values: dict[str, Any]) -> str:
    return _table(("name", "value"), [(k, str(v)) for k, v in values.items()], set(), wrap=True)


def _table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: set[int],
    name: str = "",
    wrap: bool = False,
) -> str:
    """numbers: columns that are aligned on the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = ["n" if i in numbers else "wrap" if wrap and i else "" for i in range(len(row))]
        shown = (
            f"<{tag}{f' class={kind}' if kind else ''}>{escape(cell)}</{tag}>"
            for kind, cell in zip(kinds, row, strict=True)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "\n".join(cells("td", row) for row in rows)
    tag = f' id="{name}"' if name else ""
    return (
        f'<div class="box scroll" tabindex="0"><table{tag}><thead>{cells("th", heads)}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def index_of(block: str) -> str:
    return place_of(f"{block}.-")[0]


def dense_bytes(line: LinearReport) -> int:
    return line.weights * BYTES.get(line.dtype, 4)


def written_bytes(report: PruneReport) -> int:
    """Bytes of the linears as saved."""
    return sum(
        dense_bytes(line) if line.stored_bytes is None else line.stored_bytes
        for line in report.linears
    )


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def seconds(time: float) -> str:
    if time < 60:
        return f"{time:.2f} s"
    minutes, rest = divmod(round(time), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _microseconds(time: float | None) -> str:
    return UNMEASURED if time is None else f"{time:.1f}"


def number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "∞"
