"""report.html: a prune's report as one page that needs nothing beside it, and asks for nothing.

Everything comes from the PruneReport, so that a page can be made again from report.json. All text
is escaped, there is no script, and the page's own policy forbids every request.
"""

from __future__ import annotations

import shlex
from html import escape
from pathlib import Path

from wanda_ext.methods import METHODS, UPDATES, get_method, get_update, parse_sparsity
from wanda_ext.report.plots import heat_map, line_plot
from wanda_ext.report.report import PruneReport
from wanda_ext.report.tables import (
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

PAGE = "report.html"  # beside the model's files, with
REPORT = "report.json"  # what it is made from
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
    update = report.arguments.get("update")
    method = method if update is None else f"{method}, {update}"
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


# --- Its commands ---------------------------------------------------------------------------------


OPTIONS = (*("nsamples", "seqlen", "seed", "batch_size", "device", "blocks", "states", "protocol"),)


def reproduce_command(report: PruneReport) -> str:
    """The shell command, or why there is none: data or options that only Python can name."""
    asked = report.arguments
    methods = {repr(get_method(name)): name for name in METHODS}
    updates = {repr(get_update(name)): name for name in UPDATES}
    missing = [
        f"{word}={asked.get(word)}"
        for word, named in (
            ("calib", _is_named(asked.get("calib"))),
            ("sparsity", _is_sparsity(asked.get("sparsity"))),
            ("method", asked.get("method") in methods),
            ("update", asked.get("update") in (None, *updates)),
        )
        if not named
    ]
    if missing:
        return f"# No command can name {', '.join(missing)}: call Python with the arguments below."
    words = ["wanda-ext", "prune", asked["model"], "--out", report.saved.get("directory", "pruned")]
    for source in _sources(asked["calib"]):
        words += ["--calib", source]
    words += ["--sparsity", asked["sparsity"], "--method", methods[asked["method"]]]
    if asked.get("update") is not None:
        words += ["--update", updates[asked["update"]]]
    for option in OPTIONS:
        if asked.get(option) is not None:
            words += [f"--{option.replace('_', '-')}", str(asked[option])]
    for glob in asked.get("ignore", ()):
        words += ["--ignore", glob]
    if "states" not in asked and not report.repair and not report.gate:
        words.append("--in-memory")
    if report.saved.get("packed"):
        words.append("--packed")
    if report.repair:
        words.append("--repair")
    if report.gate:
        words += ["--gate", f"{report.gate['max_ratio']:g}"]
        if report.gate["restored"]:
            words.append("--fallback")
    return shlex.join(words)


def _sources(calib: str | list[tuple[str, float]]) -> list[str]:
    """As --calib takes them: one, or several with their shares."""
    return [calib] if isinstance(calib, str) else [f"{name}={share:g}" for name, share in calib]


def load_command(report: PruneReport) -> str:
    """Python that loads the saved model."""
    use = "import wanda_ext  # which loads packed linears\n" if report.saved.get("packed") else ""
    return (
        f"import transformers\n{use}\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({_where(report)!r})"
    )


def measure_command(report: PruneReport) -> str:
    """The perplexity of the saved model and of the one it was made from."""
    names = (str(report.arguments.get("model", "MODEL")), _where(report))
    return "\n".join(shlex.join(["wanda-ext", "eval", name]) for name in names)


def _where(report: PruneReport) -> str:
    return str(report.saved.get("directory", "pruned"))


def _is_named(calib: object) -> bool:
    """Whether it is what a user wrote; the report has the type's name of anything else."""
    if isinstance(calib, list):
        return all(_is_named(source) for source, _ in calib)
    types = ("NoneType", "list", "tuple", "Tensor", "DataLoader", "Dataset", "IterableDataset")
    return isinstance(calib, str) and calib not in types


def _is_sparsity(text: object) -> bool:
    try:
        parse_sparsity(str(text))
    except ValueError:
        return False
    return True


# --- Its style: one column on a phone, light and dark, no file beside it --------------------------


STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f7f8fa; --card: #ffffff; --ink: #16202c; --soft: #586575; --edge: #dce1e8;
  --good: #1a7f4b; --bad: #c0392b; --code: #eef1f5; --l0: #2563eb; --l1: #d9730d;
  --h0: #eef4fb; --h1: #d6e6f5; --h2: #b5d3ec; --h3: #8fbce0; --h4: #67a2d2; --h5: #4486c1;
  --h6: #2a69a9; --h7: #194e8a; --h8: #0f3566;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #10151c; --card: #19212b; --ink: #e6ebf1; --soft: #9aa8b8; --edge: #2d3947;
    --good: #4cc38a; --bad: #ff7b6b; --code: #11171f; --l0: #6ea8ff; --l1: #f5a254;
    --h0: #1e2a38; --h1: #20394f; --h2: #234b69; --h3: #285f86; --h4: #3276a4; --h5: #4690bf;
    --h6: #68abd5; --h7: #94c7e8; --h8: #c6e4f8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 36px 0 12px; } h3 { font-size: 1rem; margin: 16px 0 8px; }
p { margin: 8px 0; overflow-wrap: anywhere; }
.lead, .about, dt, th, .unit { color: var(--soft); }
.about { font-size: .875rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr));
  margin: 20px 0 0; }
.cards div, figure, .box {
  background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 14px 16px;
}
.cards dt { font-size: .8rem; } .cards dd { margin: 0; }
.cards .big { font-size: 1.45rem; font-weight: 650; line-height: 1.3; overflow-wrap: anywhere; }
.cards .unit { font-size: .85rem; }
figure { margin: 0 0 14px; } figcaption { font-weight: 600; margin-bottom: 8px; }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 2px solid var(--l0); }
.box { margin: 0 0 14px; } .box.scroll { padding: 4px 0; }
svg { display: block; width: 100%; min-width: 800px; height: auto; }
svg text { font-size: 12px; fill: var(--soft); } .end { text-anchor: end; }
.mid { text-anchor: middle; } .grid { stroke: var(--edge); }
polyline { fill: none; stroke-width: 2; } polyline.l0 { stroke: var(--l0); }
polyline.l1 { stroke: var(--l1); stroke-dasharray: 6 4; }
circle.l0, .k0 { fill: var(--l0); } circle.l1, .k1 { fill: var(--l1); }
.h0 { fill: var(--h0); } .h1 { fill: var(--h1); } .h2 { fill: var(--h2); } .h3 { fill: var(--h3); }
.h4 { fill: var(--h4); } .h5 { fill: var(--h5); } .h6 { fill: var(--h6); } .h7 { fill: var(--h7); }
.h8 { fill: var(--h8); }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px; border-bottom: 1px solid var(--edge);
  white-space: nowrap; }
tr:last-child > * { border-bottom: 0; } th { font-weight: 600; }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
.n { text-align: right; } summary { cursor: pointer; padding: 8px 0; }
pre { background: var(--code); border: 1px solid var(--edge); border-radius: 8px;
  margin: 0; padding: 12px 14px; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .85rem; user-select: all; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, monospace; }
@media (max-width: 600px) {
  main { padding: 20px 12px 40px; } .cards { grid-template-columns: 1fr 1fr; gap: 8px; }
  .cards .big { font-size: 1.15rem; } h1 { font-size: 1.3rem; }
  .cards div, figure, .box { padding: 10px 12px; } .box.scroll { padding: 2px 0; }
  th, td { padding: 5px 10px; }
}
@media print { .scroll { overflow: visible; } body { background: #fff; } }
"""
