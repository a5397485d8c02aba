"""report.html: a prune's report as one page that needs nothing beside it, and asks for nothing.

Everything comes from the PruneReport, so that a page can be made again from report.json. All text
is escaped, there is no script, and the page's own policy forbids every request.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import torch

from wanda_ext.formats import named_format
from wanda_ext.page_commands import load_command, measure_command, reproduce_command
from wanda_ext.page_plots import heat_map, line_plot
from wanda_ext.page_style import STYLE
from wanda_ext.page_tables import (
    UNMEASURED,
    blocks_table,
    dense_bytes,
    index_of,
    kernels_table,
    linears_table,
    number,
    pairs_table,
    seconds,
    size,
    times_table,
    written_bytes,
)
from wanda_ext.quantizer import WandaExtConfig
from wanda_ext.report import PruneReport
from wanda_ext.what_runs import what_runs

PAGE = "report.html"  # beside the model's files, with
REPORT = "report.json"  # what it is made from
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write(report: PruneReport, path: str | Path) -> None:
    """Writes the page of a report, finished or not."""
    Path(path).write_text(html(report), encoding="utf-8")


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


def html(report: PruneReport) -> str:
    """The page's text."""
    name = str(report.arguments.get("model", "model"))
    title = f"{name.rstrip('/').rpartition('/')[2] or name}, pruned"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_summary(report))}</p>',
        _cards(report),
        _gate(report),
        _section("Sparsity and error", _plots(report)),
        _section("Blocks", blocks_table(report)),
        _section("Linears", linears_table(report)),
        _section("What runs", kernels_table(report)),
        _section("Time", times_table(report)),
        _section("Commands", _commands(report)),
        _section("Arguments", pairs_table(report.arguments)),
        _section("Versions", pairs_table(report.versions)),
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


def _summary(report: PruneReport) -> str:
    asked = report.arguments.get("sparsity", "?")
    method = report.arguments.get("method", "?")
    return f"{method} at {asked}: {report.status}" + f", {report.runner}" * bool(report.runner)


def _cards(report: PruneReport) -> str:
    gate, saved = report.gate, report.saved
    dense = sum(dense_bytes(line) for line in report.linears)
    perplexity, ratio = UNMEASURED, "the last command below measures it"
    if gate:
        perplexity = f"{number(gate['dense'])} → {number(gate['final'])}"
        ratio = (
            f"{number(gate['ratio'])} times the dense one, on {gate['tokens']:,} held-out tokens"
        )
    files = f"{size(saved['bytes'])} on disk" if saved else "not saved by this prune"
    weights = f"{report.block_weights / 1e6:,.1f} M weights in the blocks"
    memory = ", ".join(f"{where} {size(peak)}" for where, peak in report.peak_memory.items())
    cards = (
        ("Zeros", f"{report.sparsity:.2%}", "of the pruned linears' weights"),
        ("Linears", f"{len(report.pruned)} of {len(report.linears)}", f"pruned; {weights}"),
        ("Perplexity", perplexity, ratio),
        ("Size", size(written_bytes(report)), f"of {size(dense)} dense, in linears; {files}"),
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


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"
