"""Two prompts, continued by the dense and by the pruned model, for the page of a prune.

They are a look, not a measure: made where they cost little beside the prune, which never fails for
them. The pruned model is written before it continues anything.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from wanda_ext.calibration import MAX_SEQLEN
from wanda_ext.cli.arguments import load
from wanda_ext.methods import get_method, get_update, with_update
from wanda_ext.models import context_of
from wanda_ext.quality import PROMPTS, continuations
from wanda_ext.report import PruneReport, write_both

ENOUGH = 1 << 17  # tokens of calibration text, beside which these take little

Loaded = tuple[Any, Any]  # a model and its tokenizer


def add_continuations(parser: argparse.ArgumentParser) -> None:
    """Adds the word that asks for them, or leaves them out."""
    parser.add_argument(
        "--continuations",
        action=argparse.BooleanOptionalAction,
        help="let the dense and the pruned model continue two prompts, for report.html (where they "
        "are in memory, and that takes little beside the prune)",
    )


class Continuations:
    """What both models write, or why it is left out."""

    def __init__(self, arguments: argparse.Namespace, why_not: str) -> None:
        """why_not: why they are left out unless they are asked for; "": they are not."""
        self._left_out = why_not and f"{why_not}; --continuations asks for it"
        if arguments.continuations is not None:
            self._left_out = "" if arguments.continuations else "--no-continuations"
        self._texts = [{"prompt": prompt} for prompt in PROMPTS]
        self._seconds = 0.0

    def add(self, name: str, loaded: Callable[[], Loaded]) -> None:
        """name: "dense" or "pruned". loaded: gives that model."""
        if self._left_out:
            return
        start = perf_counter()
        try:
            found = continuations(*loaded())
        except Exception as error:  # whatever a model's own code raises
            self._left_out = f"{type(error).__name__}: {error}"
        else:
            for text, written in zip(self._texts, found, strict=True):
                text[name] = written
        self._seconds += perf_counter() - start

    def finish(
        self, models: Mapping[str, Callable[[], Loaded]], report: PruneReport, out: str
    ) -> None:
        """Adds the models that are still missing, when the pruned one is in the directory `out`.
        The report and its page there are written again."""
        try:
            for name, loaded in models.items():
                self.add(name, loaded)
        except KeyboardInterrupt as stop:
            stop.left = f"the pruned model is in {out}"  # type: ignore[attr-defined]
            raise
        report.continuations = {"left_out": self._left_out}
        if not self._left_out:
            report.continuations = {"texts": self._texts}
            report.timings["continuations"] = self._seconds
        write_both(report, Path(out))


def started(arguments: argparse.Namespace, model: Any) -> Continuations:
    """Of a model in memory, which is not pruned yet."""
    method = with_update(get_method(arguments.method), get_update(arguments.update))
    window = arguments.seqlen or min(MAX_SEQLEN, context_of(model) or MAX_SEQLEN)
    tokens = arguments.nsamples * window
    why_not = ""
    if method.reads == "nothing":
        why_not = "the method runs no text through the model"
    elif tokens < ENOUGH:
        why_not = f"they would take long beside a prune that reads {tokens:,} tokens"
    elif arguments.device is not None:
        why_not = f"they would run where the model is, and not on {arguments.device}"
    return Continuations(arguments, why_not)


def continue_files(arguments: argparse.Namespace, report: PruneReport) -> None:
    """Of a model that was pruned block by block, and is written; where asked, for both are loaded
    for it."""

    def loaded(**changes: str) -> Loaded:
        model, tokenizer, _ = load(argparse.Namespace(**{**vars(arguments), **changes}))
        return model, tokenizer

    pruned = partial(loaded, model=arguments.out, dtype="auto")
    made = Continuations(arguments, "the model was pruned block by block, and never loaded whole")
    made.finish({"dense": loaded, "pruned": pruned}, report, arguments.out)
