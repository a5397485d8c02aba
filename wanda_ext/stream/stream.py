"""prune_checkpoint: from one directory to another, block by block, whatever the model's size.

In memory are one block and, while it runs for the last time, the next one. A block that is pruned
is written and entered in the journal; a run that was stopped goes on behind the last such block.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from wanda_ext.calibration import Protocol, calib_told, calibration_batches, read_by
from wanda_ext.checkpoint import check_apart, check_links, open_checkpoint
from wanda_ext.interrupt import held_back
from wanda_ext.methods import (
    Corrected,
    Method,
    SparsitySpec,
    as_globs,
    get_method,
    get_update,
    spec_text,
    with_update,
)
from wanda_ext.models import preserved, usable_device
from wanda_ext.prune import (
    PruneError,
    check_method,
    check_packable,
    has_owl,
    plan_blocks,
    report_of,
)
from wanda_ext.report import PruneReport
from wanda_ext.stopped import stopping
from wanda_ext.stream.journal import Journal
from wanda_ext.stream.meta_model import IN_MEMORY
from wanda_ext.stream.ranks import device_of_rank, joined
from wanda_ext.stream.run import Run
from wanda_ext.stream.skeleton import Skeleton


def prune_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
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
    dtype: torch.dtype | None = None,
    ignore: str | Iterable[str] = (),
    blocks: str | None = None,
    packed: bool = False,
    states: Literal["memory", "files"] = "memory",
    resume: bool = True,
    trust_remote_code: bool = False,
    protocol: Protocol = "model",
    progress: bool = True,
) -> PruneReport:
    """Prunes the safetensors checkpoint in `src` into the new directory `dst`, block by block.

    Pruned tensors are those that prune_model would make, bit for bit. Every other tensor, known to
    the model's class or not, goes along as it is, under its name, and each lies in the file that
    has it in `src`. So does every other file go along except weights in another form, links that
    lead out of `src` and, without trust_remote_code, code; the report's `left` names them.
    config.json changes only in its quantization_config and dtype.

    Takes the memory of two blocks, the embeddings, and the hidden states of the calibration data:
    those lie in files beside `dst` with states="files". An update takes the states twice, and what
    one block holds of all batches in memory. On the disk it takes the checkpoint and, until it is
    complete, its largest file once more. dtype: of the weights; default: as stored. packed: pruned
    linears packed. tokenizer: default: the one in `src`. trust_remote_code: whether code that came
    with the checkpoint, or with the tokenizer, may run, and goes along. The rest is as in
    prune_model.

    A run that was stopped in any way, kill -9 included, is finished by the same call: its blocks
    are not pruned again, unless their files are missing or damaged: each is read once and its
    checksum compared. resume=False starts anew. Under torchrun the ranks share the batches, and
    all must see `src` and `dst`; the first one writes.

    Raises ValueError before any work for what prune_model refuses, Owl, an update under several
    ranks, too little memory or disk, an unfinished run that was asked something else, and a `dst`
    that holds other people's files or that another run writes to; NamesError for a checkpoint or
    model that cannot be taken block by block. What the checkpoint keeps in pieces (experts one by
    one) takes their size once more. Raises PruneError where a block fails; `dst` appears whole or
    not at all.
    """
    if states not in ("memory", "files"):
        raise ValueError(f"states must be 'memory' or 'files', not {states!r}")
    check_apart(src, dst)
    method, update = get_method(method), get_update(update)
    checkpoint = open_checkpoint(src)
    check_links(checkpoint.folder)
    folder = str(checkpoint.folder)
    skeleton = Skeleton(checkpoint, dtype, trust_remote_code)
    ignore = as_globs(ignore, "ignore")
    plan = plan_blocks(skeleton.model, sparsity, ignore, blocks)
    if has_owl(plan):
        raise ValueError(
            f"Owl measures the whole dense model before any of it is pruned; {IN_MEMORY}"
        )
    skeleton.check_own([block.name for block in plan])
    check_method(method, plan)
    if packed:
        check_packable(skeleton.model, plan)
    device = device_of_rank(device)
    at = None if device is None else usable_device(device)
    report = report_of(skeleton.model, plan)
    report.arguments = {
        "model": folder,
        "calib": calib_told(calib),
        "sparsity": spec_text(sparsity),
        "method": repr(method),
        "update": None if update is None else repr(update),
        "nsamples": nsamples,
        "seqlen": seqlen,
        "seed": seed,
        "batch_size": batch_size,
        "protocol": protocol,
        "device": None if at is None else at.type,
        "dtype": str(skeleton.model.dtype).removeprefix("torch."),
        "ignore": ignore,
        "packed": packed,
        "states": states,
    }
    method = with_update(method, update)
    batches = None
    if method.reads != "nothing":
        with preserved(skeleton.model), report.timed("calibration"):
            batches = calibration_batches(
                calib,
                nsamples=nsamples,
                seqlen=seqlen,
                seed=seed,
                batch_size=batch_size,
                trust_remote_code=trust_remote_code,
                protocol=protocol,
                progress=progress,
                **read_by(skeleton.model, folder if tokenizer is None else tokenizer),
            )
    journal = Journal(Path(dst).resolve())
    with joined() as ranks, ExitStack() as held:
        if update is not None and ranks.count > 1:
            raise ValueError(
                f"an update needs all batches in one process, and {ranks.count} share them: start "
                "one, or leave update out"
            )
        ranks.at_first(lambda: held.enter_context(journal.opened(resume)) and None)
        run = Run(skeleton, plan, method, batches, at, journal, ranks, packed, states == "files")
        done, first = ranks.at_first(lambda: run.begin(report.arguments, progress))
        with held_back(), preserved(skeleton.model), _told(report, journal):
            run.blocks(done, first, report, progress)
            report = ranks.at_first(lambda: run.finish(report, trust_remote_code, progress))
    return report


@contextmanager
def _told(report: PruneReport, journal: Journal) -> Iterator[None]:
    """Completes the report, and hands it out with whatever stops the body."""
    start = time.perf_counter()
    try:
        with stopping(report, PruneError, lambda where: journal.told()):
            yield
    except BaseException as error:
        report.seconds = time.perf_counter() - start
        error.left = journal.told()  # type: ignore[attr-defined]
        raise
