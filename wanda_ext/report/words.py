"""What a report keeps as Python writes it, in words for a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from wanda_ext.methods import METHODS, UPDATES
from wanda_ext.report.report import PruneReport

Table = Mapping[str, Callable[[], object]]
METHOD_WORDS = {
    "wanda": "Wanda",
    "wanda-variant": "Wanda's variant",
    "magnitude": "Magnitude",
    "sparsegpt": "SparseGPT",
}


def name_of(written: object, table: Table) -> str | None:
    """The name in a table, METHODS or UPDATES, of what has this repr; None: it is not in there."""
    return next((name for name, make in table.items() if repr(make()) == written), None)


def lead(report: PruneReport) -> str:
    """What was done, and how far it came: "Wanda at 2:4, then corrected: complete"."""
    asked = report.arguments
    method, update = asked.get("method", "?"), asked.get("update")
    name = name_of(method, METHODS)
    told = f"{method if name is None else METHOD_WORDS[name]} at {asked.get('sparsity', '?')}"
    if update is not None:
        told += f", then {name_of(update, UPDATES) or update}"
    return f"{told}: {report.status}"


def about_update(report: PruneReport) -> str:
    """What the update of a prune did; "" where there was none."""
    if report.arguments.get("update") is None:
        return ""
    return (
        "Corrected: the weights that stay were solved for anew, so that they make up for what "
        "pruning did to the outputs."
    )


def asked_for(report: PruneReport) -> dict[str, str]:
    """The arguments of a prune, as one would write them."""
    tables: dict[str, Table] = {"method": METHODS, "update": UPDATES}
    asked = dict(report.arguments)
    if "calib" in asked:
        asked["calib"] = sources(asked["calib"])
    return {
        word: name_of(value, tables.get(word, {})) or _plain(value) for word, value in asked.items()
    }


def sources(calib: str | list[tuple[str, float]]) -> list[str]:
    """As --calib takes them: one, or several with their shares."""
    return [calib] if isinstance(calib, str) else [f"{name}={share:g}" for name, share in calib]


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _plain(value: Any) -> str:
    if value is None or value == []:
        return "not given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
