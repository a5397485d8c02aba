"""What a run on a GPU is to show: claims, the figures that results.jsonl has for them, what holds.

Also the dispatch table that its times make.
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from goals import BITMAP_TOKENS, COPY, CUSPARSELT, DENSE, LEAST_BITMAP_RATIO, LINEAR_24

HOLDS, FAILS, OPEN, FIGURE = "holds", "does NOT hold", "not measured", ""
# Of what --check runs: the word for one of them, and how many cells there are.
CHECKS = {
    "linear_24": ("kernel", 30),
    "linear_bitmap": ("kernel", 72),
    "bitmap": ("packing", 6),
    "pruning": ("op", 8),
}
SANITIZERS = ("memcheck", "racecheck")
PROGRAMS = ("linear_24", "linear_bitmap", "pruning")

Cell = dict[str, Any]


class Claim(NamedTuple):
    """A line of the table."""

    text: str
    figure: str
    verdict: str  # HOLDS, FAILS, OPEN or, of a figure that nothing is claimed of, FIGURE


def cells_of(results: Path) -> dict[str, Cell]:
    """The last result of each name; a check that another step runs has a name of its own."""
    found: dict[str, Cell] = {}
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    for line in map(json.loads, filter(None, lines)):
        name = line.get("cell", "")
        again = name.startswith("check ") and line["step"] != "check"
        found[f"{line['step']}: {name}" if again else name] = line
    found.pop("", None)
    return found


def claims(out: Path) -> list[Claim]:
    """All of them, in the order of the steps."""
    cells = cells_of(out / "results.jsonl")
    return [
        *_ceilings(cells),
        *_checks(cells),
        _tests(cells, out / "junit.xml"),
        *_pruning(cells),
        *_linear_24(cells),
        *_bitmaps(cells),
        *_sanitizers(cells),
    ]


def table(found: Iterable[Claim]) -> str:
    """The claims in columns."""
    rows = [("claim", "figure", "verdict"), *((c.text, c.figure, c.verdict) for c in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# --- The claims of each step ----------------------------------------------------------------------


def _ceilings(cells: dict[str, Cell]) -> Iterator[Claim]:
    for unit in ("TB/s", "TFLOP/s"):
        name = "copy" if unit == "TB/s" else "dense 8192^3 bf16"
        cell = cells.get(f"ceiling: {name}")
        figure = f"{cell[unit]} {unit}" if cell else ""
        yield Claim(f"ceiling: {name}", figure, FIGURE if cell else OPEN)


def _checks(cells: dict[str, Cell]) -> Iterator[Claim]:
    """One wrong kernel is enough; that none is wrong takes every cell that was to be there."""
    for what, (one, expected) in CHECKS.items():
        of_it = [c for name, c in cells.items() if re.match(rf"check {what}\b", name)]
        runs, wrong = sum(c.get("tried", 0) for c in of_it), _wrong(of_it)
        figure = f"{runs} runs in {len(of_it)} of {expected} cells, {len(wrong)} wrong"
        verdict = FAILS if wrong else HOLDS if len(of_it) >= expected else OPEN
        text = f"{what}: every {one} is right"
        yield Claim(text, f"{figure} {_first(wrong)}".rstrip() if of_it else "", verdict)


def _tests(cells: dict[str, Cell], junit: Path) -> Claim:
    text = "the GPU tests pass"
    cell = cells.get("tests", {})
    failed, passed = cell.get("failed", 0), cell.get("passed", 0)
    if passed + failed == 0:
        return Claim(text, "", OPEN)
    finished = junit.exists() and _junit_tests(junit) >= passed + failed
    figure = f"{passed} passed, {failed} failed {_first(cell.get('failures', []))}".rstrip()
    return Claim(text, figure, FAILS if failed else HOLDS if finished else OPEN)


def _junit_tests(junit: Path) -> int:
    try:
        suites = ElementTree.parse(junit).getroot().iter("testsuite")
    except ElementTree.ParseError:
        return 0
    return sum(int(suite.get("tests", 0)) for suite in suites)


def _pruning(cells: dict[str, Cell]) -> Iterator[Claim]:
    for op, goal in COPY.items():
        of_it = [c for name, c in cells.items() if name.startswith(f"{op} ")]
        ratios = [c["ratios"].get("copy / wanda_ext") for c in of_it if "ratios" in c]
        yield _ratio(f"{op}: {goal:.0%} of a copy's speed", min, ratios, goal, of_it)


def _linear_24(cells: dict[str, Cell]) -> Iterator[Claim]:
    timed = [c for name, c in cells.items() if name.startswith("linear_24 ")]
    for tokens, (m, goals) in LINEAR_24.items():
        here = [c for c in timed if c["m"] in m]
        every = [c for c in here if "us" in c]  # with every kernel, beside cuBLAS
        least = goals[DENSE]
        best = [dense / us for _, us, dense in filter(None, map(times_of, every))]
        name = f"linear_24, {tokens}"
        yield _ratio(f"{name}: its fastest kernel {least} times cuBLAS", _mean, best, least, here)
        chosen = [_ratio_of_chosen(cell) for cell in every]
        yield _ratio(f"{name}: its default {least} times cuBLAS", _mean, chosen, least, here)
        for rival in goals.keys() & {CUSPARSELT}:
            theirs = [c["ratios"].get(f"{rival} / wanda_ext") for c in here if "ratios" in c]
            text = f"{name}: its default {goals[rival]} times {rival}"
            yield _ratio(text, _mean, theirs, goals[rival], here)


def _bitmaps(cells: dict[str, Cell]) -> Iterator[Claim]:
    timed = [c for name, c in cells.items() if name.startswith("linear_bitmap ")]
    few, last = [c for c in timed if c["m"] in BITMAP_TOKENS], BITMAP_TOKENS[-1]
    ratios = [c["ratios"].get(f"{DENSE} / linear_bitmap") for c in few]
    text = (
        f"linear_bitmap 16:32, m <= {BITMAP_TOKENS[-1]}: at least {LEAST_BITMAP_RATIO} times dense"
    )
    yield _ratio(text, min, ratios, LEAST_BITMAP_RATIO, few)
    exact = []
    for cell in few:
        times = cell.get("timings", {})
        if DENSE in times and "exact 50 %" in times:
            exact.append(times[DENSE]["median_ms"] / times["exact 50 %"]["median_ms"])
    text = f"linear_bitmap exact 50 %, m <= {last}: not slower than dense"
    yield _ratio(text, min, exact, 1.0, few)


def _sanitizers(cells: dict[str, Cell]) -> Iterator[Claim]:
    for tool in SANITIZERS:
        said = {p: c["summary"] for p in PROGRAMS if (c := cells.get(f"{tool} of {p}"))}
        bad = {p: text for p, text in said.items() if not re.match(r"0 (errors|hazards)", text)}
        figure = "; ".join(f"{program}: {text}" for program, text in said.items())
        verdict = FAILS if bad else HOLDS if len(said) == len(PROGRAMS) else OPEN
        yield Claim(f"{tool} finds nothing", figure, verdict)


def _ratio(
    text: str, over: Any, ratios: Iterable[float | None], goal: float, cells: list[Cell]
) -> Claim:
    """`over` (min, a mean) of what is known, beside the goal; a wrong kernel has no ratio."""
    known = [ratio for ratio in ratios if ratio is not None]
    wrong = _wrong(cells)
    if not known:
        return Claim(text, _first(wrong), FAILS if wrong else OPEN)
    figure = f"{over(known):.2f} ({min(known):.2f} to {max(known):.2f}, {len(known)} cells)"
    return Claim(text, figure, HOLDS if over(known) >= goal else FAILS)


def _mean(ratios: list[float]) -> float:
    """The geometric one."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _wrong(cells: Iterable[Cell]) -> list[str]:
    return [f"{c['cell']}: {name}" for c in cells for name in c.get("wrong", {})]


def _first(wrong: list[str]) -> str:
    return f"({wrong[0]})" if wrong else ""


# --- The dispatch table ---------------------------------------------------------------------------


def times_of(cell: Cell) -> tuple[str, float, float] | None:
    """The fastest kernel with its splits; us a call of it and of cuBLAS; None: one is missing."""
    times = cell["us"]
    if "cuBLAS" not in times:
        return None
    dense = times["cuBLAS"]
    # The others left after a few rounds.
    finals = {name for name in times if times[name]["rounds"] >= dense["rounds"]} - {"cuBLAS"}
    if not finals:
        return None
    best = min(finals, key=lambda name: times[name]["median"])
    return best, times[best]["median"], dense["median"]


def _ratio_of_chosen(cell: Cell) -> float | None:
    times = cell["us"]
    if "cuBLAS" not in times or cell.get("chosen") not in times:
        return None
    ratio: float = times["cuBLAS"]["median"] / times[cell["chosen"]]["median"]
    return ratio


def dispatch_table(cells: Iterable[Cell]) -> dict[str, Any]:
    """As wanda_ext reads it: a row for each cell in which every kernel of linear_24 was timed."""
    rows = []
    for cell in cells:
        found = times_of(cell) if cell["cell"].startswith("linear_24 ") and "us" in cell else None
        if found is None:
            continue
        kernel, splits = found[0].split("/")
        row = {"device": cell["gpu"], "arch": cell["arch"], "sms": cell["sms"]}
        row |= {key: cell[key] for key in ("dtype", "n", "k", "m")}
        row |= {"kernel": kernel, "splits": int(splits)}
        rows.append({**row, "packed_us": found[1], "dense_us": found[2]})
    return {"format_version": 1, "rows": rows}
