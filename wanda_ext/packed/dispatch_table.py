"""Measured times of linear_24 and of its dense twin: rows on disk, and what they tell.

Two files hold rows: `dispatch.json` of this package, and the user's own, which `bench.tune` writes
and which wins. A row is for one GPU model, dtype and weight [n, k], and for every m from above the
bucket before its own up to its own (BUCKETS); that of the last bucket is for everything beyond too.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # of m
DTYPES = ("bfloat16", "float16")
COMMITTED = Path(__file__).with_name("dispatch.json")


@dataclass(frozen=True)
class Gpu:
    """A model of GPU: what times hold for."""

    name: str
    arch: int  # compute capability: 90 for 9.0
    sms: int  # streaming multiprocessors


@dataclass(frozen=True)
class Row:
    """The fastest way found for one bucket of m, and how long a call took; microseconds."""

    device: str  # Gpu.name
    arch: int
    sms: int
    dtype: str
    n: int
    k: int
    m: int
    kernel: str
    splits: int  # of k
    packed_us: float
    dense_us: float

    @property
    def gpu(self) -> Gpu:
        return Gpu(self.device, self.arch, self.sms)

    @property
    def key(self) -> tuple[Gpu, str, int, int, int]:
        return (self.gpu, self.dtype, self.n, self.k, self.m)


class Table:
    """The rows of one GPU model by what they are for; of two for the same, the later one counts."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows = {(row.dtype, row.n, row.k, row.m): row for row in rows}

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def row(self, dtype: str, n: int, k: int, m: int) -> Row | None:
        """The row that is for calls of m rows."""
        return self._rows.get((dtype, n, k, bucket_of(m)))

    def times(
        self, dtype: str, n: int, k: int, tokens: Sequence[int]
    ) -> tuple[float, float] | None:
        """Microseconds (packed, dense) of one call with each of `tokens` rows, by their buckets.

        None where a bucket has not been measured.
        """
        rows = [self.row(dtype, n, k, m) for m in tokens]
        known = [row for row in rows if row is not None]
        if len(known) < len(rows):
            return None
        return sum(row.packed_us for row in known), sum(row.dense_us for row in known)


def bucket_of(m: int) -> int:
    """The bucket that calls of m rows fall into."""
    return next((bucket for bucket in BUCKETS if m <= bucket), BUCKETS[-1])


# --- Files ----------------------------------------------------------------------------------------


def cache_path() -> Path:
    """The user's rows: $XDG_CACHE_HOME/wanda_ext/dispatch.json, or under ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "wanda_ext" / "dispatch.json"


def load_table(gpu: Gpu, refusal: Callable[[Row], str]) -> Table:
    """What both files know of a GPU model, but for rows that cannot run; `refusal` says why, or "".

    A file that cannot be read, and the rows left out of one, make one warning, which says what to
    do.
    """
    found: list[Row] = []
    files: dict[Callable[[], Path], str] = {
        lambda: COMMITTED: "reinstall wanda_ext",
        cache_path: "delete it, or run wanda_ext.bench.tune again, which replaces it",
    }
    for locate, remedy in files.items():
        try:
            path = locate()
            rows = [row for row in read_rows(path) if row.gpu == gpu]
        except (ValueError, RuntimeError) as error:  # a user without a home is a RuntimeError
            _warn(f"{error}; it is ignored: {remedy}")
            continue
        refused = [why for why in map(refusal, rows) if why]
        if refused:
            _warn(
                f"{len(refused)} rows of {path} do not fit this build ({refused[0]}); they are "
                "ignored: run wanda_ext.bench.tune again on this GPU"
            )
        found += [row for row in rows if not refusal(row)]
    return Table(found)


def store(rows: Iterable[Row]) -> None:
    """Puts rows into the user's file, in place of those for the same; in one step, or not at all.

    A file that cannot be read is replaced.
    """
    path = cache_path()
    try:
        before = read_rows(path)
    except ValueError:
        before = []
    write_rows(path, {row.key: row for row in (*before, *rows)}.values())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none where there is no such file. ValueError says what is wrong in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a dispatch table ({error})") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION or not isinstance(content.get("rows"), list):
        raise ValueError(
            f"{path} is not a dispatch table of format_version {FORMAT_VERSION}, but of {version!r}"
        )
    return [_checked(path, i, row) for i, row in enumerate(content["rows"])]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes a file that `read_rows` reads, a line a row; readers see the old or the new one."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    text = f'{{\n"format_version": {FORMAT_VERSION},\n"rows": [\n{lines}\n]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


_TYPES: dict[str, type] = {"str": str, "int": int, "float": float}  # as annotations name them


def _checked(path: Path, index: int, stored: Any) -> Row:
    def refuse(why: str) -> ValueError:
        return ValueError(f"{path}, row {index}: {why}")

    expected = [field.name for field in fields(Row)]
    if not isinstance(stored, dict) or sorted(stored) != sorted(expected):
        raise refuse(f"expected {', '.join(expected)}, got {stored!r}")
    for field in fields(Row):
        value, kind = stored[field.name], _TYPES[str(field.type)]
        allowed = (int, float) if kind is float else kind
        if not isinstance(value, allowed) or isinstance(value, bool):
            raise refuse(f"{field.name} must be {kind.__name__}, not {value!r}")
        if kind is not str and not 0 < stored[field.name] < math.inf:
            raise refuse(f"{field.name} must be above 0 and finite, not {value!r}")
    row = Row(**stored)
    if row.m not in BUCKETS or row.dtype not in DTYPES or row.k % 16:
        raise refuse(
            f"expected m of {BUCKETS}, dtype of {DTYPES} and k divisible by 16, got m {row.m}, "
            f"dtype {row.dtype!r}, k {row.k}"
        )
    return row


def _warn(message: str) -> None:
    warnings.warn(f"wanda_ext: {message}", RuntimeWarning, stacklevel=2)
