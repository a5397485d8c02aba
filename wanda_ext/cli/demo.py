"""The demo: train a small Llama offline, prune it every way, print a table, draw a plot."""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from wanda_ext.checkpoint import load_pretrained, save_pretrained, swap_linears
from wanda_ext.cli.demo_model import DemoSettings, cached_model, scale_channels_, split_text
from wanda_ext.prune import prune_model, verify
from wanda_ext.quality import perplexity
from wanda_ext.report import PruneReport

SPARSITIES = ("50%", "60%", "4:8", "2:4")
METHODS = ("magnitude", "wanda")
PACKED = "wanda-2of4-packed"  # the directory of the packed model under --out

EXPLANATION = """\
Trained this small, all channels are about equally loud, so Wanda has no advantage over magnitude.
Large models have outlier channels; the scaled model imitates them (random powers of two, multiplied
into the norm gains and divided out of the next weights, leave its function alone), and there
magnitude drops the small weights of the loud channels, while Wanda, which multiplies weights by
loudness, keeps exactly the same ones as before."""


@dataclass(frozen=True)
class DemoResult:
    """Held-out perplexities, keyed by model ("trained", "scaled"), then sparsity and method."""

    parameters: int
    dense: dict[str, float]
    pruned: dict[str, dict[str, dict[str, float]]]
    masks_changed: dict[str, int]  # by method: mask bits that differ between the two models
    linear_bytes: tuple[int, int]  # dense, packed
    largest_difference: float  # between logits before saving and after reloading, packed

    def __str__(self) -> str:
        lines = [f"{'held-out perplexity':<22}{'as trained':^22}{'with scaled channels':^22}"]
        lines.append(" " * 22 + f"{'magnitude':>11}{'wanda':>11}" * 2)
        lines.append(f"{'dense':<22}" + "".join(f"{p:^22.2f}" for p in self.dense.values()))
        for sparsity in SPARSITIES:
            values = (self.pruned[m][sparsity][method] for m in self.dense for method in METHODS)
            lines.append(f"{sparsity:<22}" + "".join(f"{p:>11.2f}" for p in values))
        changed = (f"{self.masks_changed[method]:>11}" for method in METHODS)
        return "\n".join([*lines, f"{'mask bits changed':<44}" + "".join(changed)])


def run(
    out: Path,
    settings: DemoSettings = DemoSettings(),  # noqa: B008 - it is frozen
    *,
    retrain: bool = False,
    say: Callable[[str], None] = print,
) -> DemoResult:
    """The whole demo; writes results.json, perplexity.png and the packed model under `out`."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    trained, tokenizer = cached_model(settings, retrain)
    scaled = copy.deepcopy(trained)
    scale_channels_(scaled, settings.seed)
    models = {"trained": trained, "scaled": scaled}
    text, held_out_text = split_text()
    held_out = torch.tensor(tokenizer(held_out_text).input_ids)
    parameters = sum(p.numel() for p in trained.parameters())
    say(f"A Llama of {parameters / 1e6:.1f} M parameters; {held_out.numel()} held-out tokens.")

    def pruned_copy(model: Any, sparsity: str, method: str) -> tuple[Any, PruneReport]:
        model = copy.deepcopy(model)
        report = prune_model(
            model,
            [text],
            sparsity,
            method=method,
            tokenizer=tokenizer,
            nsamples=settings.nsamples,
            seqlen=settings.seqlen,
            seed=settings.seed,
            swap=False,
            progress=False,
        )
        return model, report

    def measure(model: Any) -> float:
        return perplexity(model, held_out, settings.seqlen)

    dense = {name: measure(model) for name, model in models.items()}
    pruned: dict[str, dict[str, dict[str, float]]] = {name: {} for name in models}
    changed = dict.fromkeys(METHODS, 0)
    for sparsity in tqdm(SPARSITIES, desc="pruning", unit="pattern"):
        for method in METHODS:
            victims = {name: pruned_copy(m, sparsity, method)[0] for name, m in models.items()}
            for name, victim in victims.items():
                pruned[name].setdefault(sparsity, {})[method] = measure(victim)
            changed[method] += _masks_changed(*victims.values())

    model, report = pruned_copy(trained, "2:4", "wanda")
    verify(model, report).raise_if_bad()
    nbytes, difference = _pack(model, tokenizer, out / PACKED, held_out[: settings.seqlen])
    result = DemoResult(parameters, dense, pruned, changed, nbytes, difference)
    written = {"environment": _environment(), "settings": asdict(settings), **asdict(result)}
    (out / "results.json").write_text(json.dumps(written, indent=1) + "\n")
    say(f"\n{result}\n\n{EXPLANATION}\n")
    say(_packed_line(result, out / PACKED))
    say(draw(dense, pruned, out / "perplexity.png"))
    say(f"Done in {time.monotonic() - started:.0f} s.")
    return result


def _environment() -> dict[str, str | int]:
    """What the figures depend on beside the settings: the text comes with Python."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def _masks_changed(a: Any, b: Any) -> int:
    """In how many weights of the blocks one model keeps what the other prunes."""
    pairs = zip(a.model.layers.parameters(), b.model.layers.parameters(), strict=True)
    return sum(int(((p != 0) ^ (q != 0)).sum()) for p, q in pairs)


def _pack(
    model: Any, tokenizer: Any, directory: Path, ids: Tensor
) -> tuple[tuple[int, int], float]:
    """Packs, saves and reloads: bytes of the linears before and after, difference of the logits."""
    linears = {n for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}
    dense_bytes = _linear_bytes(model, linears)
    swap_linears(model)
    save_pretrained(model, directory, packed=True, tokenizer=tokenizer)
    reloaded, _ = load_pretrained(directory)
    with torch.inference_mode():
        difference = (model(ids[None]).logits - reloaded(ids[None]).logits).abs().max().item()
    return (dense_bytes, _linear_bytes(reloaded, linears)), difference


def _linear_bytes(model: Any, names: set[str]) -> int:
    tensors = model.model.layers.state_dict()
    return sum(t.nbytes for name, t in tensors.items() if name.rpartition(".")[0] in names)


def _packed_line(result: DemoResult, directory: Path) -> str:
    dense, packed = result.linear_bytes
    return (
        f"2:4 by Wanda, verified, packed and reloaded from {directory}: {dense / 1e6:.2f} MB of "
        f"linears became {packed / 1e6:.2f} MB ({packed / dense:.2f}); the largest difference "
        f"between logits before saving and after reloading is {result.largest_difference:g}."
    )


# --- The plot -------------------------------------------------------------------------------------


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
