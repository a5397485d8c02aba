"""report.html: a prune's report as one page that needs nothing beside it, and asks for nothing.

Everything comes from the PruneReport, so that a page can be made again from report.json. All text
is escaped, there is no script, and the page's own policy forbids every request.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from wanda_ext.report.commands import load_command, measure_command, reproduce_command
from wanda_ext.report.plots import heat_map, line_plot
from wanda_ext.report.report import PruneReport
from wanda_ext.report.sizes import dense_bytes, whole_bytes, written_bytes
from wanda_ext.report.style import STYLE
from wanda_ext.report.tables import (
    UNMEASURED,
    blocks_table,
    index_of,
    kernels_table,
    linears_table,
    number,
    pairs_table,
    seconds,
    size,
    sizes_table,
    times_table,
)
from wanda_ext.report.words import about_update, asked_for, lead, sentence

PAGE = "report.html"  # beside the model's files, with
REPORT = "report.json"  # what it is made from
SHOWN = 3  # weights that are shared
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write(report: PruneReport, path: str | Path) -> None:
    """Writes the page of a report, finished or not."""
    Path(path).write_text(html(report), encoding="utf-8")


def html(report: PruneReport) -> str:
    """The page's text."""
    name = str(report.arguments.get("model", "model"))
    title = f"{name.rstrip('/').rpartition('/')[2] or name}, pruned"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(sentence(lead(report)))}</p>',
        _paragraph(about_update(report)),
        _cards(report),
        _gate(report),
        _continuations(report.continuations),
        _section("Sparsity and error", _plots(report)),
        _section("Size", _sizes(report)),
        _section("Blocks", blocks_table(report)),
        _section("Linears", linears_table(report)),
        _section("What runs", kernels_table(report)),
        _section("Time", _runner(report) + times_table(report)),
        _left(report.left),
        _section("Commands", _commands(report)),
        _section("Arguments", pairs_table(asked_for(report), "argument", "value")),
        _section("Versions", pairs_table(report.versions, "package", "version")),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _cards(report: PruneReport) -> str:
    gate, whole = report.gate, whole_bytes(report)
    perplexity, ratio = UNMEASURED, "the last command below measures it"
    if gate:
        perplexity = f"{number(gate['dense'])} → {number(gate['final'])}"
        ratio = (
            f"{number(gate['ratio'])} times the dense one, on {gate['tokens']:,} held-out tokens"
        )
    linears = size(written_bytes(report.linears)), size(dense_bytes(report.linears))
    big, unit = linears[0], f"of {linears[1]} dense, in linears; not saved by this prune"
    if whole is not None:
        big = size(whole[1])
        unit = f"of {size(whole[0])} dense, the whole model; linears {linears[0]} of {linears[1]}"
    weights = f"{report.block_weights / 1e6:,.1f} M weights in the blocks"
    memory = ", ".join(f"{where} {size(peak)}" for where, peak in report.peak_memory.items())
    cards = (
        ("Zeros", f"{report.sparsity:.2%}", "of the pruned linears' weights"),
        ("Linears", f"{len(report.pruned)} of {len(report.linears)}", f"pruned; {weights}"),
        ("Perplexity", perplexity, ratio),
        ("Size", big, unit),
        ("Time", seconds(report.seconds), f"peak memory {memory}" if memory else "of the prune"),
    )
    shown = (
        f'<div><dt>{escape(head)}</dt><dd class="big">{escape(big)}</dd>'
        f'<dd class="unit">{escape(unit)}</dd></div>'
        for head, big, unit in cards
    )
    return f'<dl class="cards">{"".join(shown)}</dl>'


def _gate(report: PruneReport) -> str:
    gate = report.gate
    if not gate:
        return ""
    verdict = "holds" if gate["passed"] else "fails"
    told = (
        f'<p><strong class="{"good" if gate["passed"] else "bad"}">The gate {verdict}.</strong> '
        f"Perplexity is {number(gate['ratio'])} times the dense model's; "
        f"{number(gate['max_ratio'])} is allowed.</p>"
    )
    if gate["restored"]:
        names = "".join(f"<li><code>{escape(name)}</code></li>" for name in gate["restored"])
        told += (
            f"<p>Pruned throughout, perplexity was {number(gate['pruned'])}. These linears have "
            f"their dense weights again, the worst first:</p><ul>{names}</ul>"
        )
    return _section("Quality gate", f'<div class="box">{told}</div>')


def _continuations(found: Mapping[str, Any]) -> str:
    """Of each prompt, what the dense and the pruned model make of it, side by side."""
    if not found:
        return ""
    if "left_out" in found:
        body = _paragraph(f"Left out: {found['left_out']}.")
    else:
        texts = "".join(
            f'<div class="box"><p class="about">{model}</p><p class="text"><strong>'
            f"{escape(one['prompt'])}</strong>{escape(one[model])}</p></div>"
            for one in found["texts"]
            for model in ("dense", "pruned")
        )
        body = f'<div class="pair">{texts}</div>'
    return _section("What it writes", body)


def _plots(report: PruneReport) -> str:
    lost = {line.name: line.lost for line in report.linears}
    plots = (
        [
            heat_map(
                "Share of zeros",
                "Each cell is a linear: rows are kinds, columns are blocks in the order they run.",
                {line.name: line.reached for line in report.linears},
            ),
            heat_map(
                "Share of the score lost",
                "|W| * input norm, summed over the pruned weights, beside that of all weights.",
                lost,
            ),
        ]
        if report.linears
        else ["<p>No linear was reached.</p>"]
    )
    if report.gate:
        blocks = report.gate["blocks"]
        alone = {name: error for block in blocks for name, error in block["linears"].items()}
        if alone:
            plots.append(
                heat_map(
                    "Error that each linear makes alone",
                    "Relative error of its block's output where no other linear is pruned, before "
                    "any was restored.",
                    alone,
                )
            )
        plots.append(
            line_plot(
                "Error of each block",
                "Mean over tokens of |pruned - dense| / |dense| of what leaves a block: on the "
                "dense model's inputs, and grown along the pruned model. Before any linear was "
                "restored.",
                [index_of(block["name"]) for block in blocks],
                {
                    "own, on dense inputs": [block["own"] for block in blocks],
                    "grown along the model": [block["grown"] for block in blocks],
                },
            )
        )
    if report.repair.get("blocks"):
        blocks = report.repair["blocks"]
        plots.append(
            line_plot(
                "Error of each block, before and after its repair",
                "Relative error of what leaves a block, over the calibration data.",
                [index_of(block["name"]) for block in blocks],
                {
                    "before": [block["error_before"] for block in blocks],
                    "after": [block["error_after"] for block in blocks],
                },
            )
        )
    return "\n".join(plots)


def _commands(report: PruneReport) -> str:
    parts = (
        ("Do it again", reproduce_command(report)),
        ("Load it", load_command(report)),
        ("Measure its perplexity", measure_command(report)),
    )
    return "".join(
        f'<h3>{head}</h3><pre tabindex="0"><code>{escape(command)}</code></pre>'
        for head, command in parts
    )


def _sizes(report: PruneReport) -> str:
    told = ""
    if report.saved:
        told = "All else is embeddings, norms, and what was not pruned."
        if not report.saved["packed"]:
            told += " Saved dense, zeros take as much space as other numbers."
    shared = [f"{', '.join(others)} is {first}" for first, *others in report.shared]
    if shared:
        shown = "; ".join(shared[:SHOWN])
        more = f"; and {len(shared) - SHOWN} more" if len(shared) > SHOWN else ""
        told += f" Counted once: {shown}{more}."
    return sizes_table(report) + _paragraph(told)


def _runner(report: PruneReport) -> str:
    return _paragraph(sentence(report.runner)) if report.runner else ""


def _left(left: Mapping[str, str]) -> str:
    """What the source holds, and the pruned model does not."""
    return _section("Not taken along", pairs_table(left, "file", "why")) if left else ""


def _paragraph(text: str) -> str:
    return text and f"<p>{escape(text)}</p>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"
