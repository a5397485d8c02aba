"""prune_model: statistics, scores, zeros, block by block, and every block committed whole."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from wanda_ext.calibration import Batch, Protocol, calib_told, calibration_batches, read_by
from wanda_ext.interrupt import held_back, step
from wanda_ext.methods import (
    Corrected,
    Method,
    SparsitySpec,
    Updated,
    as_globs,
    get_method,
    get_update,
    spec_text,
    with_update,
)
from wanda_ext.models import check_prunable, copies_to, preserved, usable_device, visits
from wanda_ext.packed import check_tokens
from wanda_ext.prune.commit import check_method, pruned_block
from wanda_ext.prune.owl import has_owl, resolve_owl
from wanda_ext.prune.plan import (
    PlannedBlock,
    check_packable,
    check_unshared,
    plan_blocks,
    report_of,
)
from wanda_ext.prune.swap import check_runnable, swap_pruned
from wanda_ext.report import LinearReport, PruneReport
from wanda_ext.runner import TwoStreams, Walk, started, two_streams, walking
from wanda_ext.stopped import StoppedError, stopping


class PruneError(StoppedError):
    """A prune that stopped. `report` tells which blocks are pruned; the others are untouched."""


def prune_model(
    model: nn.Module,
    calib: Any = None,
    sparsity: SparsitySpec = "2:4",
    *,
    method: str | Method = "wanda",
    update: str | Corrected | None = None,
    tokenizer: Any = None,
    nsamples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    ignore: str | Iterable[str] = (),
    blocks: str | nn.ModuleList | None = None,
    swap: bool | Literal["auto"] = "auto",
    tokens: Sequence[int] = (1, 8, 2048),
    protocol: Protocol = "model",
    progress: bool = True,
) -> PruneReport:
    """Prunes the linears of a causal language model's decoder blocks in place.

    model: fp32, bf16 or fp16, in memory. calib: texts, tokens, a dataset, a file, "builtin", "c4",
    "wikitext2" or a Hub id (see wanda_ext.calibration); unused by methods that need no inputs.
    sparsity: 0.5, "50%", "2:4", any "keep:group", Owl(...), a mapping glob -> sparsity, or a
    callable (name, module). update: "corrected" or Corrected(...) lets the weights that a method
    keeps make up for what pruning did to the outputs; costs a second stream of hidden states.
    tokenizer: for text; default: the model's own. seqlen: default min(2048, the model's context).
    device: where one block at a time is moved to; default: where the model is. ignore: globs of
    modules to leave alone. blocks: the path of the block list where it is not found. swap: put
    packed linears in always, never, or ("auto") where they are faster at `tokens` rows a call.

    A block is scored on what the pruned blocks before it pass on: S = |W| * input_norm within each
    row or group (Wanda, arXiv:2306.11695, section 3 and algorithm 1).

    Raises ValueError or TypeError before any work where the arguments and the model do not fit, and
    PruneError where a block fails: earlier blocks are pruned then, that one and later ones are as
    they were, bit for bit. KeyboardInterrupt leaves the same state, and has a `report` too.
    """
    check_prunable(model)
    method, update = get_method(method), get_update(update)
    ignore = as_globs(ignore, "ignore")
    plan = plan_blocks(model, sparsity, ignore, blocks)
    at = None if device is None else usable_device(device)
    check_method(method, plan)
    if update is not None:
        check_unshared(plan)
    _check_options(model, plan, swap, tokens, at)
    report = report_of(model, plan)
    report.arguments = {
        "model": getattr(model, "name_or_path", "") or type(model).__name__,
        "calib": calib_told(calib),
        "sparsity": spec_text(sparsity),
        "method": repr(method),
        "update": None if update is None else repr(update),
        "nsamples": nsamples,
        "seqlen": seqlen,
        "seed": seed,
        "batch_size": batch_size,
        "protocol": protocol,
        "device": None if at is None else str(at),
        "ignore": ignore,
        "swap": swap,
        "tokens": list(tokens),
    }
    method = with_update(method, update)
    with _reported(report, model, at):
        batches = None
        if method.reads != "nothing" or has_owl(plan):
            report.status = "calibration"
            with preserved(model), report.timed("calibration"):
                batches = calibration_batches(
                    calib,
                    nsamples=nsamples,
                    seqlen=seqlen,
                    seed=seed,
                    batch_size=batch_size,
                    protocol=protocol,
                    progress=progress,
                    **read_by(model, tokenizer),
                )
        with held_back(), preserved(model):
            _prune_blocks(model, plan, method, batches, at, report, progress)
            report.status = "swap"
            with report.timed("swap"):
                swap_pruned(model, plan, report, swap, tokens)
    return report


def _prune_blocks(
    model: nn.Module,
    plan: list[PlannedBlock],
    method: Method,
    batches: list[Batch] | None,
    at: torch.device | None,
    report: PruneReport,
    progress: bool,
) -> None:
    """Every block: on the device, statistics, zeros, what it passes on now, a line a linear."""
    blocks = [(block.name, block.module) for block in plan]
    whole = [block.module for block in plan]
    with ExitStack() as stack:
        if batches is not None and has_owl(plan):
            report.status = "capture"
            with walking(model, blocks, batches, at) as (dense, visit):
                plan = resolve_owl(plan, dense, visit)
        copies = stack.enter_context(copies_to(whole, at))
        walk: Walk | TwoStreams | None = None
        if batches is not None and method.reads != "nothing":
            report.status = "capture"
            with report.timed("capture"):
                if isinstance(method, Updated):
                    walk = stack.enter_context(two_streams(model, blocks, batches, copies))
                else:
                    walk = stack.enter_context(started(model, blocks, batches, copies))
            report.runner = walk.runner
        visit = visits(whole, copies)
        last = max(i for i, block in enumerate(plan) if block.targets)
        for i, block in enumerate(tqdm(plan, "pruning", unit="block", disable=not progress)):
            report.status = block.name
            with visit(i), report.timed("blocks"):
                lines = prune_block(block, i, method, walk, advance=i < last)
            report.linears += lines
            step()


def prune_block(
    block: PlannedBlock, index: int, method: Method, walk: Walk | TwoStreams | None, advance: bool
) -> list[LinearReport]:
    """Prunes block `index` of the walk (None: the method needs none); a report line a linear.

    With `advance`, what leaves it now enters the next block.
    """
    targets = {name: linear.module for name, linear in block.targets.items()}
    if isinstance(walk, TwoStreams):
        with (
            closing(walk.stages(index, targets, advance)) as stages,
            pruned_block(block, method, stages, walk.pruned.unseen) as lines,
        ):
            return lines
    found = walk.statistics(index, targets, method.reads == "gram") if walk else None
    whole = [dict.fromkeys(targets) if found is None else found]
    with pruned_block(block, method, whole, walk.unseen if walk else ()) as lines:
        if walk and advance:
            walk.advance(index)
    return lines


def _check_options(
    model: nn.Module,
    plan: list[PlannedBlock],
    swap: bool | str,
    tokens: Sequence[int],
    device: torch.device | None,
) -> None:
    if not isinstance(swap, bool) and swap != "auto":
        raise ValueError(f"swap must be 'auto', True or False, not {swap!r}")
    check_tokens(tokens)
    if swap is True:
        check_packable(model, plan)
        check_runnable(plan)
    spread = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if device is not None and len(spread) > 1:
        raise ValueError(
            f"device={str(device)!r} moves blocks that a device_map has spread over "
            f"{', '.join(sorted(spread))}: leave device out"
        )


@contextmanager
def _reported(report: PruneReport, model: nn.Module, at: torch.device | None) -> Iterator[None]:
    """Completes the report, and hands it out with whatever stops the body."""
    devices = {parameter.device for parameter in model.parameters()} | ({at} if at else set())
    cuda = [device for device in devices if device.type == "cuda"]
    for device in cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def left(where: str) -> str:
        done = f"{len(report.pruned)} linears of the blocks before are pruned"
        state = {"capture": "no block is changed", "swap": "all blocks are pruned"}
        return f"stopped; {state.get(where, f'{done}, this block and later ones are unchanged')}"

    start = perf_counter()
    try:
        with stopping(report, PruneError, left, bad_input=("calibration",)):
            yield
        report.status = "complete"
    finally:
        report.seconds = perf_counter() - start
        report.peak_memory = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        for device in cuda:
            report.peak_memory[str(device)] = torch.cuda.max_memory_allocated(device)
