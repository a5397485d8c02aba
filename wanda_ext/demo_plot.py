"""The demo's plot: held-out perplexity by sparsity and method, for the two models side by side."""

from __future__ import annotations

from pathlib import Path

TITLES = {"trained": "as trained", "scaled": "with outlier channels (constructed)"}
COLOURS = {"magnitude": "#b8b8b8", "wanda": "#2a6f97"}
BAR_WIDTH = 0.38


def draw(
    dense: dict[str, float], pruned: dict[str, dict[str, dict[str, float]]], path: Path
) -> str:
    """Writes the plot as PNG and says where; without matplotlib, says how to get it.

    dense: perplexity by model; pruned: by model, sparsity and method (see `demo.DemoResult`).
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        return "No plot: matplotlib is not installed (pip install matplotlib, then run this again)."
    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, len(dense), sharey=True)
    for axes, (model, baseline) in zip(panels, dense.items(), strict=True):
        sparsities = list(pruned[model])
        for i, (method, colour) in enumerate(COLOURS.items()):
            values = [pruned[model][sparsity][method] for sparsity in sparsities]
            places = [x + (i - 0.5) * BAR_WIDTH for x in range(len(sparsities))]
            bars = axes.bar(places, values, BAR_WIDTH, color=colour, label=method)
            axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        axes.axhline(baseline, color="black", linewidth=1, linestyle="--", label="dense")
        axes.set_title(TITLES[model])
        axes.set_xticks(range(len(sparsities)), sparsities)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out perplexity (lower is better)")
    panels[0].legend(loc="upper left", ncols=3, frameon=False)
    top = max(
        v for by_sparsity in pruned.values() for by in by_sparsity.values() for v in by.values()
    )
    panels[0].set_ylim(0, 1.15 * max(top, *dense.values()))
    figure.savefig(path, dpi=150)
    return f"Plot: {path}"
