"""The demo's Llama and its text, for benchmarks that prune it, and plots of its perplexity."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

import wanda_ext
from harness import RESULTS
from wanda_ext.cli.demo_model import DemoSettings, cached_model, split_text


class Demo:
    """The trained model, the text that it was trained on, and the tokens that judge a prune."""

    def __init__(self, settings: DemoSettings) -> None:
        self.settings = settings
        self.dense, self.tokenizer = cached_model(settings)
        self.text, held_out = split_text()
        self.held_out = self.ids_of(held_out)

    def ids_of(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text).input_ids)

    def perplexity_of(self, model: Any) -> float:
        """On the held-out tokens."""
        return wanda_ext.perplexity(model, self.held_out, self.settings.seqlen)

    def data(self, **changes: Any) -> dict[str, Any]:
        """How calibration data is drawn from the text."""
        plain = {name: getattr(self.settings, name) for name in ("nsamples", "seqlen", "seed")}
        return {"tokenizer": self.tokenizer, "progress": False, **plain, **changes}

    def pruned_perplexity(self, sparsity: Any, method: Any, **changes: Any) -> float:
        """Of a pruned copy; changes: of `data`."""
        model = copy.deepcopy(self.dense)
        wanda_ext.prune_model(
            model, [self.text], sparsity, method=method, swap=False, **self.data(**changes)
        )
        return self.perplexity_of(model)


def plot(
    file_name: str, dense: float, labels: tuple[str, str], draw: Callable[[Any], object]
) -> None:
    """benchmarks/results/<file_name>: what `draw` draws on the axes, beside dense.

    labels: of x and y.
    """
    if find_spec("matplotlib") is None:
        print("no plot: it takes matplotlib (pip install 'wanda_ext[plot]')")
        return
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "wanda_ext"  # the same figures give the same file
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.axhline(dense, color="gray", linestyle="--", label="dense")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.legend()
    figure.savefig(RESULTS / file_name, metadata={"Date": None})
