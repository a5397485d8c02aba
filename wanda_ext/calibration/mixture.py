"""Several sources of calibration text, each with its share of the windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shares_of(calib: Any) -> list[tuple[Any, float]] | None:
    """(source, share) pairs of a mapping source -> share, or of a list of such pairs; else None.

    Raises ValueError for shares that are no positive numbers.
    """
    if isinstance(calib, Mapping) and calib and all(map(_is_number, calib.values())):
        pairs = list(calib.items())
    elif isinstance(calib, (list, tuple)) and calib and all(map(_is_pair, calib)):
        pairs = [(source, share) for source, share in calib]
    else:
        return None
    bad = next((share for _, share in pairs if not 0 < share < float("inf")), None)
    if bad is not None:
        raise ValueError(f"calib: a share of {bad!r}: each must be a number over 0")
    return pairs


def split(pairs: list[tuple[Any, float]], windows: int) -> list[tuple[Any, int]]:
    """(source, windows) for each, together `windows`, by its share and at least one.

    What is left after rounding down goes to the largest remainders, earlier sources first. Raises
    ValueError where there are more sources than windows.
    """
    if len(pairs) > windows:
        raise ValueError(
            f"calib mixes {len(pairs)} sources, and only {windows} windows are drawn: pass a "
            "larger nsamples"
        )
    total = sum(share for _, share in pairs)
    wanted = [share / total * windows for _, share in pairs]
    counts = [max(1, int(count)) for count in wanted]
    by_need = sorted(range(len(pairs)), key=lambda i: counts[i] - wanted[i])
    for i in by_need[: max(0, windows - sum(counts))]:
        counts[i] += 1
    while sum(counts) > windows:  # those that were raised to one took from the others
        counts[max(range(len(counts)), key=counts.__getitem__)] -= 1
    return [(source, count) for (source, _), count in zip(pairs, counts, strict=True)]


def calib_told(calib: Any) -> str | list[list[Any]]:
    """What a report tells of calibration data: its name or kind; [name, share] of each source."""
    pairs = shares_of(calib)
    if pairs is None:
        return calib if isinstance(calib, str) else type(calib).__name__
    return [[calib_told(source), share] for source, share in pairs]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and _is_number(item[1])
