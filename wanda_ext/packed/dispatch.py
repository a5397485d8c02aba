"""Which kernel linear_24 runs on a GPU: rules from the dispatch table, else the default in C++.

A GPU's rules are installed when it is first used. A bucket that was not measured, below one that
was, gets a rule that says so, for C++ knows no lower end of a rule. All rules are replaced in one
step: a call of another thread meets those of before or those of after, and runs the same kernel by
either where nothing new is known of its shape.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

import wanda_ext._C as _C
from wanda_ext.packed.dispatch_table import BUCKETS, DTYPES, Gpu, Row, Table, load_table

FASTER = 0.98  # packed is faster where it takes at most this share of dense: above a timing's noise
BITMAP_ARCH = 80  # the oldest that linear_bitmap runs on
NO_CUDA = "this build has no CUDA kernels; `python -m wanda_ext.info` says how to get them"
Choice = tuple[str, int]  # a kernel and its splits of k

_BEYOND = 2**63 - 1
_DEFAULT = -1  # kLinear24Default in ops.h, in place of a kernel
_Rule = tuple[int, int, str, int, int, int, int, int]  # as _C.set_linear_24_rules takes them

_lock = threading.RLock()
_tables: dict[Gpu, Table] = {}  # of the GPUs in use
_forced: list[_Rule] = []  # by `forced`, the innermost last


def gpu_of(device: torch.device) -> Gpu | None:
    """The model of a CUDA device; None for another device."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.name, 10 * found.major + found.minor, found.multi_processor_count)


def kernels() -> list[str]:
    """The names of linear_24's kernels; none in a build without CUDA."""
    return list(_C.linear_24_kernels()) if hasattr(_C, "linear_24_kernels") else []


def use(device: torch.device) -> None:
    """Installs a device's rules, once."""
    gpu = gpu_of(device)
    if gpu is not None and kernels():
        table_of(gpu)


def table_of(gpu: Gpu) -> Table:
    """What is known of a GPU model; its rules are installed from then on."""
    with _lock:
        if gpu not in _tables:
            _tables[gpu] = load_table(gpu, _refusal)
            _install()
        return _tables[gpu]


def add(rows: Iterable[Row]) -> None:
    """Takes rows into the rules of this process, in place of those for the same."""
    with _lock:
        added = list(rows)
        for gpu in {row.gpu: None for row in added}:
            _tables[gpu] = Table([*table_of(gpu), *(row for row in added if row.gpu == gpu)])
        _install()


def cannot_run(
    device: torch.device, dtype: torch.dtype, n: int, k: int, packed: str = "2:4"
) -> str:
    """Why W[n, k] of this dtype does not run there, packed in this format; "" where it does."""
    gpu = gpu_of(device)
    if gpu is None:
        return ""
    if not kernels():
        return NO_CUDA
    if name_of(dtype) not in DTYPES:
        return f"{name_of(dtype)} has no CUDA kernel; cast the model to {' or '.join(DTYPES)}"
    if packed != "2:4":
        old = f"sm_{gpu.arch}: linear_bitmap's kernels need sm_{BITMAP_ARCH} or newer"
        return old if gpu.arch < BITMAP_ARCH else ""
    try:
        choose(gpu, name_of(dtype), n, k, 1)
    except RuntimeError as error:
        return str(error)
    return ""


def not_faster(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    k: int,
    tokens: Sequence[int],
    packed: str = "2:4",
) -> str:
    """Why packed is not known to be faster there, summed over calls of `tokens` rows; "": it is."""
    gpu = gpu_of(device)
    if gpu is None:
        return f"packed linears save memory on the {device.type.upper()}, not time"
    why = cannot_run(device, dtype, n, k, packed)
    if why:
        return why
    if packed != "2:4":
        return f"linear_bitmap was not measured on {gpu.name}; swap_linears(model) swaps it in"
    times = table_of(gpu).times(name_of(dtype), n, k, tokens)
    if times is None:
        return (
            f"not measured on {gpu.name} in {name_of(dtype)}: run wanda_ext.bench.tune(model), "
            f"then wanda_ext.swap_linears(model, tokens={tuple(tokens)})"
        )
    ours, dense = times
    if ours > FASTER * dense:
        return f"packed {ours:.1f} us, dense {dense:.1f} us at tokens={tuple(tokens)}"
    return ""


def check_tokens(tokens: Sequence[int]) -> None:
    """Raises ValueError unless these are numbers of rows."""
    counts = tokens if isinstance(tokens, Sequence) else ()
    if not counts or not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError(f"tokens must be row counts such as (1, 8, 2048), not {tokens!r}")


def times_of(
    device: torch.device, dtype: torch.dtype, n: int, k: int, tokens: Sequence[int]
) -> tuple[float, float] | None:
    """Microseconds (packed, dense) summed over calls of `tokens` rows; None: not measured."""
    gpu = gpu_of(device)
    if gpu is None or not kernels():
        return None
    return table_of(gpu).times(name_of(dtype), n, k, tokens)


def choose(gpu: Gpu, dtype: str, n: int, k: int, m: int) -> Choice:
    """The kernel and the splits of k that run m rows. Raises RuntimeError where nothing can."""
    kernel, splits, _ = _C.linear_24_choose(gpu.arch, gpu.sms, m, n, k, dtype, order_of(gpu.arch))
    return kernels()[kernel], splits


def admits(gpu: Gpu, dtype: str, n: int, k: int, m: int, kernel: str, splits: int) -> str:
    """Why a kernel cannot run m rows with that many splits; "" where it can."""
    if kernel not in kernels():
        return f"there is no kernel {kernel}"
    index, order = kernels().index(kernel), order_of(gpu.arch)
    why: str = _C.linear_24_check(index, splits, gpu.arch, gpu.sms, m, n, k, dtype, order)
    return why


@contextmanager
def forced(gpu: Gpu, dtype: str, n: int, k: int, kernel: str, splits: int) -> Iterator[None]:
    """Inside, this kernel runs all calls with W[n, k] of this dtype on such GPUs."""
    index = kernels().index(kernel)
    with _lock:
        _forced.append((gpu.arch, gpu.sms, dtype, n, k, _BEYOND, index, splits))
        try:
            _install()
            yield
        finally:
            _forced.pop()
            _install()


def order_of(arch: int) -> int:
    """The metadata order that a GPU's kernels read fastest: 90, 80, or 0 where it has none."""
    return 90 if arch // 10 == 9 else 80 if arch >= 80 else 0


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refusal(row: Row) -> str:
    return admits(row.gpu, row.dtype, row.n, row.k, row.m, row.kernel, row.splits)


def _install() -> None:
    instead = {rule[:5]: rule for rule in _forced}
    known = [rule for gpu, table in _tables.items() for rule in _rules(gpu, table)]
    _C.set_linear_24_rules([*(r for r in known if r[:5] not in instead), *instead.values()])


def _rules(gpu: Gpu, table: Table) -> Iterator[_Rule]:
    for dtype, n, k in {(row.dtype, row.n, row.k): None for row in table}:
        rows = {m: table.row(dtype, n, k, m) for m in BUCKETS}
        measured = [m for m in BUCKETS if rows[m] is not None]
        for m in BUCKETS[: BUCKETS.index(measured[-1]) + 1]:
            row = rows[m]
            kernel, splits = (kernels().index(row.kernel), row.splits) if row else (_DEFAULT, 1)
            last_m = _BEYOND if m == BUCKETS[-1] else m
            yield gpu.arch, gpu.sms, dtype, n, k, last_m, kernel, splits
