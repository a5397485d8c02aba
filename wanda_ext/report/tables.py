"""The tables of report.html, and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from wanda_ext.report.plots import percent, place_of
from wanda_ext.report.report import LinearReport, PruneReport
from wanda_ext.report.sizes import dense_bytes, whole_bytes, written_bytes
from wanda_ext.report.words import sentence

UNMEASURED = "not measured"
LONG = 20  # rows; a longer table is closed until it is asked for


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
    return _table(heads, rows, {1, 2, 3, 4, 5, 6, 7}, "blocks")


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
    return _table(heads, rows, {1, 4, 5, 6, 7}, "linears")


def sizes_table(report: PruneReport) -> str:
    """Of what was pruned, of all else, and of the whole model."""
    lines = report.pruned
    weights = sum(line.weights for line in lines)
    zeros = sum(line.reached * line.weights for line in lines)
    dense, saved = dense_bytes(lines), written_bytes(lines)
    rows = [_sizes("pruned linears", weights, percent(report.sparsity), dense, saved)]
    whole = whole_bytes(report)
    if whole is not None:
        total, all_dense, all_saved = report.model_weights, *whole
        share = percent(zeros / total) if total else "-"
        rows += [
            _sizes(
                "all else", total and total - weights, "-", all_dense - dense, all_saved - saved
            ),
            _sizes("whole model", total, share, all_dense, all_saved),
        ]
    heads = ("part", "weights", "set to zero", "dense", "as saved", "of dense")
    return _table(heads, rows, {1, 2, 3, 4, 5}, "parts")


def kernels_table(report: PruneReport) -> str:
    told = f"<p>{escape(sentence(report.swap))}</p>"
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
    return told + _table(heads, rows, {0, 2, 3, 5, 6}, "products")


def times_table(report: PruneReport) -> str:
    selection = sum(line.seconds for line in report.linears)
    rows = [(phase, seconds(time)) for phase, time in report.timings.items()]
    rows.append(("choosing and zeroing weights, in all", seconds(selection)))
    return _table(("phase", "time"), rows, {1}, "phases")


def pairs_table(values: Mapping[str, str], *heads: str) -> str:
    return _table(heads, [*values.items()], set(), f"{heads[0]}s", wrap=True)


def _sizes(part: str, weights: int, zeros: str, dense: int, saved: int) -> tuple[str, ...]:
    count = f"{weights / 1e6:,.1f} M" if weights else "-"
    share = percent(saved / dense) if dense else "-"
    return (part, count, zeros, size(dense), size(saved), share)


def _table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: set[int],
    what: str,
    wrap: bool = False,
) -> str:
    """numbers: columns that are aligned on the right. what: the rows, in one word."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = ["n" if i in numbers else "wrap" if wrap and i else "" for i in range(len(row))]
        shown = (
            f"<{tag}{f' class={kind}' if kind else ''}>{escape(cell)}</{tag}>"
            for kind, cell in zip(kinds, row, strict=True)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "\n".join(cells("td", row) for row in rows)
    table = (
        f'<div class="box scroll" tabindex="0"><table id="{what}"><thead>{cells("th", heads)}'
        f"</thead><tbody>{body}</tbody></table></div>"
    )
    if len(rows) <= LONG:
        return table
    return f"<details><summary>All {len(rows)} {what}</summary>{table}</details>"


def index_of(block: str) -> str:
    return place_of(f"{block}.-")[0]


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
