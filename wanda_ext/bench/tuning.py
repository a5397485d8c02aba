"""tune: which kernel of linear_24 is the fastest on this GPU, and how long dense takes beside it.

What it finds goes into the user's dispatch table (dispatch_table.py): from then on linear_24 runs
by it, and swap="auto" decides by it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from wanda_ext.bench.stopwatch import Stopwatch, Weights, race
from wanda_ext.checkpoint import stay_dense
from wanda_ext.models import weight_of, weight_shape
from wanda_ext.packed import FusedLinear24, Product24, dispatch
from wanda_ext.packed.dispatch import Choice, name_of
from wanda_ext.packed.dispatch_table import BUCKETS, DTYPES, Gpu, Row, bucket_of, cache_path, store

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
SPLIT_UP_TO = 256  # m: above, a GPU has work enough without
SPLIT_K = 256  # columns that a part of k holds at least

Problem = tuple[torch.dtype, int, int]  # dtype, n, k


@dataclass(frozen=True)
class Tuning:
    """What `tune` found; str() is a table. problems: what was left out of it, and why."""

    rows: tuple[Row, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        heads = ("dtype", "n", "k", "m", "kernel", "splits", "packed us", "dense us", "x dense")
        cells = [heads, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        title = [f"{self.rows[0].device}, microseconds a call"] if self.rows else []
        return "\n".join([*title, *table, *(f"left out: {what}" for what in self.problems)])


def tune(
    model_or_shapes: nn.Module | Iterable[tuple[int, int]],
    tokens: Iterable[int] = BUCKETS,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seconds: float = 0.2,
    progress: bool = True,
) -> Tuning:
    """Measures every weight shape at every m, and keeps the results for this user and GPU.

    model_or_shapes: a model, of which the linears that could be packed count (their values do not:
    it may be on the meta device), or pairs (n, k). tokens: rows a call; each stands for its bucket.
    dtype: default the model's own; bfloat16 for shapes. device: a CUDA device; default the current
    one. seconds: how long each n, k, m is measured, beside at least 30 rounds.

    Every kernel that can run, with several splits of k, is compared with torch's dense product,
    result and time, in turns. Takes up to 1 GB of the GPU's memory, more where two copies of a
    weight do. Ctrl-C keeps what was measured.

    Raises RuntimeError without a GPU or kernels for it, ValueError for arguments that do not fit.
    """
    asked = list(tokens)
    dispatch.check_tokens(asked)
    buckets = sorted({bucket_of(m) for m in asked})
    problems = _problems(model_or_shapes, dtype)
    at = _usable_device(device, model_or_shapes)
    gpu = dispatch.gpu_of(at)
    assert gpu is not None
    reasons = {problem: dispatch.cannot_run(at, *problem) for problem in problems}
    if all(reasons.values()):
        raise RuntimeError(f"wanda_ext.bench.tune: {next(iter(reasons.values()))}")
    rows: list[Row] = []
    left_out = [f"{_name(problem)}: {why}" for problem, why in reasons.items() if why]
    todo = [problem for problem in problems if not reasons[problem]]
    with tqdm(total=len(todo) * len(buckets), desc="tuning", disable=not progress) as bar:
        for problem in todo:
            found: list[Row] = []
            try:
                for row, problems_met in _tuned(problem, buckets, at, gpu, seconds):
                    found += [row] if row else []
                    left_out += problems_met
                    bar.update()
            finally:
                _keep(found)
            rows += found
    if left_out:
        warnings.warn(f"wanda_ext.bench.tune left out: {'; '.join(left_out)}", stacklevel=2)
    return Tuning(tuple(rows), tuple(left_out))


def candidates(gpu: Gpu, dtype: str, n: int, k: int, m: int) -> list[Choice]:
    """Every kernel that can run it, with the splits of k that may pay; the default first."""
    splits = [s for s in SPLITS if s == 1 or (m <= SPLIT_UP_TO and k >= s * SPLIT_K)]
    able = [
        (kernel, s)
        for kernel in dispatch.kernels()
        for s in splits
        if not dispatch.admits(gpu, dtype, n, k, m, kernel, s)
    ]
    return list(dict.fromkeys([dispatch.choose(gpu, dtype, n, k, m), *able]))


def _tuned(
    problem: Problem, buckets: Sequence[int], at: torch.device, gpu: Gpu, seconds: float
) -> Iterator[tuple[Row | None, list[str]]]:
    """For each bucket its row, or None, and what was left out."""
    weights = None
    for m in buckets:
        refused: dict[str, str] = {}
        row = None
        try:
            weights = weights or Weights(*problem, at)
            row = _row(weights, m, gpu, seconds, refused)
        except torch.OutOfMemoryError:
            refused["all"] = "the GPU's memory does not hold it"
        yield row, [f"{_name(problem)} m={m}, {what}: {why}" for what, why in refused.items()]


def _row(weights: Weights, m: int, gpu: Gpu, seconds: float, refused: dict[str, str]) -> Row | None:
    """The fastest choice for m rows; `refused` gets those that must not run, and why."""
    dtype, n, k = name_of(weights.dtype), weights.n, weights.k
    watch = Stopwatch(weights, m)
    able = []
    for choice in (None, *candidates(gpu, dtype, n, k, m)):
        why = watch.ready(choice)
        if why:
            refused[f"{choice[0]} in {choice[1]} splits" if choice else "torch's dense"] = why
        else:
            able.append(choice)
    kernels = [choice for choice in able if choice is not None]
    if not kernels or len(kernels) == len(able):
        return None
    (kernel, splits), packed, dense = race(kernels, watch.time_us, seconds)
    times = (round(packed, 3), round(dense, 3))
    return Row(gpu.name, gpu.arch, gpu.sms, dtype, n, k, m, kernel, splits, *times)


def _keep(rows: Sequence[Row]) -> None:
    if not rows:
        return
    dispatch.add(rows)
    try:
        store(rows)
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"wanda_ext.bench.tune: what was measured holds for this process alone, for "
            f"{cache_path()} cannot be written ({error})",
            stacklevel=3,
        )


# --- Arguments ------------------------------------------------------------------------------------


def _problems(
    model_or_shapes: nn.Module | Iterable[tuple[int, int]], dtype: torch.dtype | None
) -> list[Problem]:
    if isinstance(model_or_shapes, nn.Module):
        found = list(_linears(model_or_shapes))
    else:
        found = [(torch.bfloat16, *_shape(pair)) for pair in model_or_shapes]
    if not found:
        raise ValueError(
            "tune: nothing to measure: no linear that is 2:4 or dense, no shape; bitmaps have one "
            "kernel, which is not timed"
        )
    problems = list(dict.fromkeys((dtype or own, n, k) for own, n, k in found))
    able = [problem for problem in problems if name_of(problem[0]) in DTYPES]
    if not able:
        raise ValueError(
            f"tune: {name_of(problems[0][0])} has no CUDA kernel; pass dtype=torch.bfloat16 or "
            "dtype=torch.float16, whichever the model is to run in"
        )
    return able


def _linears(model: nn.Module) -> Iterator[Problem]:
    """Dtype, n and k of the products of a model that are packed, or could be."""
    reasons = stay_dense(model)
    for name, module in model.named_modules():
        if isinstance(module, Product24) and not isinstance(module, FusedLinear24):
            yield module.weight.dtype, module.out_features, module.in_features
        elif isinstance(module, (nn.Linear, Conv1D)) and name not in reasons:
            n, k = weight_shape(module)
            if k % 16 == 0:
                yield weight_of(module).dtype, n, k


def _shape(pair: Sequence[int]) -> tuple[int, int]:
    if len(pair) != 2 or not all(isinstance(d, int) and d > 0 for d in pair) or pair[1] % 16:
        raise ValueError(f"tune: expected (n, k) above 0 with k divisible by 16, got {pair!r}")
    return pair[0], pair[1]


def _usable_device(device: torch.device | str | None, model: object) -> torch.device:
    if not torch.cuda.is_available():
        raise RuntimeError(
            "wanda_ext.bench.tune: needs a CUDA GPU, and torch sees none; `python -m "
            "wanda_ext.info` says what is here"
        )
    if device is None and isinstance(model, nn.Module):
        device = next((p.device for p in model.parameters() if p.is_cuda), None)
    at = torch.device(device or "cuda")
    if at.type != "cuda":
        raise ValueError(f"tune: device must be a CUDA device, not {at}")
    return at if at.index is not None else torch.device("cuda", torch.cuda.current_device())


def _name(problem: Problem) -> str:
    dtype, n, k = problem
    return f"{n}x{k} {name_of(dtype)}"


def _cells(row: Row) -> tuple[str, ...]:
    numbers = (str(row.n), str(row.k), str(row.m), row.kernel, str(row.splits))
    times = (f"{row.packed_us:.2f}", f"{row.dense_us:.2f}")
    return (row.dtype, *numbers, *times, f"{row.dense_us / row.packed_us:.2f}")
