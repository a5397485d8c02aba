"""Work that stops half-way hands out an error with the report of what is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StoppedError(RuntimeError):
    """`report` tells which blocks are done; the others are untouched."""

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[type[StoppedError], tuple[str, Any]]:
        return type(self), (str(self), self.report)  # pickle would pass on the message alone


@contextmanager
def stopping(
    report: Any,
    kind: type[StoppedError],
    left: Callable[[str], str],
    bad_input: tuple[str, ...] = (),
) -> Iterator[None]:
    """What stops the body goes out as an error of this kind, and the report's `status` tells where.

    left: what it left behind, from where it stopped. Ctrl-C, and any error while the status is one
    of `bad_input`, stay what they are and get a `report` too.
    """
    try:
        yield
    except BaseException as error:
        where = report.status
        report.status = f"stopped at {where}"
        if where in bad_input or not isinstance(error, Exception):
            error.report = report  # type: ignore[attr-defined]
            raise
        raise kind(f"{where}: {error} ({left(where)})", report) from error
