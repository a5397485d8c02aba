"""The command `prune`: a directory block by block, anything else in memory."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import wanda_ext
from wanda_ext.checkpoint import (
    KeysError,
    check_apart,
    copy_other_files,
    holds_safetensors,
    save_over,
    shown,
)
from wanda_ext.cli.arguments import (
    add_model,
    add_protocol,
    add_trust,
    checkpoint_of,
    load,
    source_of,
    tell,
)
from wanda_ext.cli.continuations import add_continuations, continue_files, started
from wanda_ext.files import new_directory
from wanda_ext.methods import METHODS, UPDATES
from wanda_ext.prune import check_packable, plan_blocks
from wanda_ext.quality import MAX_RATIO, check_ratio, repair
from wanda_ext.report import PruneReport, note_saved
from wanda_ext.stream import NamesError, launched

SHARED = (  # arguments of prune_model and of prune_checkpoint
    *("calib", "sparsity", "method", "update", "nsamples", "seqlen", "seed", "batch_size"),
    *("device", "ignore", "blocks", "protocol"),
)


def add_prune(commands: Any) -> None:
    """Adds the command to a parser's."""
    prune = commands.add_parser("prune", help="prune a model and save it")
    add_model(prune)
    prune.add_argument("--out", required=True, help="directory to write the pruned model to")
    prune.add_argument(
        "--calib",
        action="append",
        type=_source,
        metavar="SOURCE[=SHARE]",
        help="builtin, c4, wikitext2, a .txt/.jsonl/.parquet path or a Hub dataset (c4); several "
        "share the windows, such as --calib prose.txt=3 --calib manual.txt",
    )
    prune.add_argument("--sparsity", default="2:4", help="50%%, 0.5, 2:4, 4:8, ... (%(default)s)")
    prune.add_argument("--method", default="wanda", choices=METHODS, help="(%(default)s)")
    prune.add_argument(
        "--update",
        choices=UPDATES,
        help="let the weights that stay make up for what pruning did to the outputs",
    )
    prune.add_argument("--nsamples", type=int, default=128, help="windows of text (%(default)s)")
    prune.add_argument("--seqlen", type=int, help="tokens a window (2048, or the model's context)")
    prune.add_argument("--seed", type=int, default=0, help="draws the windows (%(default)s)")
    prune.add_argument("--batch-size", type=int, help="windows a forward pass")
    add_protocol(prune)
    prune.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="GLOB",
        help="leave linears of this name dense; may be repeated",
    )
    prune.add_argument("--blocks", help="dotted path of the decoder blocks, where not found")
    prune.add_argument("--packed", action="store_true", help="save pruned linears packed")
    prune.add_argument(
        "--repair",
        action="store_true",
        help="retrain the kept weights block by block on the same text; implies --in-memory",
    )
    prune.add_argument(
        "--gate",
        type=float,
        nargs="?",
        const=MAX_RATIO,
        metavar="RATIO",
        help="write nothing and exit with 1 unless perplexity on held-out text of --calib is at "
        f"most RATIO times the dense model's ({MAX_RATIO}); implies --in-memory",
    )
    prune.add_argument(
        "--fallback",
        action="store_true",
        help="leave the worst linears dense, as few as the gate needs to hold; implies --gate",
    )
    prune.add_argument(
        "--in-memory",
        action="store_true",
        help="load the whole model; a directory of safetensors is else pruned block by block",
    )
    prune.add_argument(
        "--states",
        choices=("memory", "files"),
        default="memory",
        help="where hidden states wait, block by block (%(default)s)",
    )
    prune.add_argument(
        "--restart", action="store_true", help="do not go on with an unfinished run into --out"
    )
    add_continuations(prune)
    add_trust(prune)
    prune.set_defaults(run=_prune)


def _source(text: str) -> tuple[str, float]:
    """ "a.txt=3" -> ("a.txt", 3.0); without a number behind the last "=": the text, and 1."""
    name, _, share = text.rpartition("=")
    try:
        return (name, float(share)) if name else (text, 1.0)
    except ValueError:
        return text, 1.0


def _prune(arguments: argparse.Namespace) -> None:
    how = "in memory"
    sources = arguments.calib or [("c4", 1.0)]
    arguments.calib = sources if len(sources) > 1 else sources[0][0]
    if arguments.fallback and arguments.gate is None:
        arguments.gate = MAX_RATIO
    if arguments.gate is not None:
        check_ratio(arguments.gate)
    needs_dense = arguments.repair or arguments.gate is not None
    if needs_dense and not arguments.in_memory:
        print("pruning in memory, for --gate and --repair need both models there", file=sys.stderr)
        arguments.in_memory = True
    if not arguments.in_memory and holds_safetensors(arguments.model):
        try:
            report, how = _prune_files(arguments), "block by block"
        except NamesError as reason:
            print(f"pruning in memory, for {reason}", file=sys.stderr)
            report = _prune_in_memory(arguments)
    else:
        report = _prune_in_memory(arguments)
    if launched() and os.environ["RANK"] != "0":
        return
    if how == "block by block":
        continue_files(arguments, report)
    print(report)
    form = "packed" if arguments.packed else "dense, with zeros,"
    print(f"Pruned {how}; saved {form} in {arguments.out}")


def _prune_files(arguments: argparse.Namespace) -> PruneReport:
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    return wanda_ext.prune_checkpoint(
        arguments.model,
        arguments.out,
        dtype=dtype,
        packed=arguments.packed,
        states=arguments.states,
        resume=not arguments.restart,
        trust_remote_code=arguments.trust_remote_code,
        **_prune_options(arguments),
    )


def _prune_in_memory(arguments: argparse.Namespace) -> PruneReport:
    if launched():
        raise ValueError(
            "several processes can share a prune only where it goes block by block, from a "
            "directory of safetensors: start one"
        )
    packed, options = arguments.packed, _prune_options(arguments)
    if Path(arguments.model).is_dir():
        check_apart(arguments.model, arguments.out)
        checkpoint = checkpoint_of(arguments.model)
        if checkpoint is not None:
            checkpoint.stored()  # refuses what cannot be written again
    with new_directory(arguments.out) as fresh:  # refuses the name now, not after hours of work
        model, tokenizer, unexpected = load(arguments)
        _tell_carried(arguments.model, model, unexpected)
        compared = arguments.repair or arguments.gate is not None
        if compared and packed:  # what prune_model would refuse if it were to pack
            given = (options[word] for word in ("sparsity", "ignore", "blocks"))
            check_packable(model, plan_blocks(model, *given))
        texts = started(arguments, model)
        texts.add("dense", lambda: (model, tokenizer))
        swap = packed and not compared
        report = wanda_ext.prune_model(model, tokenizer=tokenizer, swap=swap, **options)
        if compared:
            _compare(arguments, model, tokenizer, report)
        with report.timed("saving"):
            report.left = _save(arguments, model, tokenizer, fresh)
        note_saved(report, fresh, Path(arguments.out).resolve(), packed)
    texts.finish({"pruned": lambda: (model, tokenizer)}, report, arguments.out)
    return report


def _tell_carried(name: str, model: Any, unexpected: list[str]) -> None:
    """Says what is written as it was, because the model has no place for it."""
    if unexpected and checkpoint_of(name) is None:
        raise KeysError(
            f"{name} holds {len(unexpected)} tensors that {type(model).__name__} has no place for, "
            f"which would be lost: {shown(unexpected)}; only those of safetensors files can be "
            "carried over: save it as such first"
        )
    tell(name, model, unexpected, "carried over unchanged")


def _save(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, folder: Path
) -> dict[str, str]:
    """The model, and all else that its directory holds; file -> why, of what was left there."""
    packed, code = arguments.packed, arguments.trust_remote_code
    checkpoint = checkpoint_of(arguments.model)
    if checkpoint is not None:
        dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
        return save_over(checkpoint, model, folder, packed, dtype, code)
    wanda_ext.save_pretrained(model, folder, packed=packed, tokenizer=tokenizer)
    source = source_of(arguments.model)
    return {} if source is None else copy_other_files(source, folder, code)


def _compare(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, report: PruneReport
) -> None:
    """What needs the dense model beside the pruned one: the repair, then the gate."""
    dense, _, _ = load(arguments)
    words = ("nsamples", "seqlen", "seed", "batch_size", "device", "blocks", "protocol")
    options = {"tokenizer": tokenizer, **{word: getattr(arguments, word) for word in words}}
    if arguments.repair:
        with report.timed("repair"):
            repaired = repair(model, dense, arguments.calib, **options)
        report.repair = asdict(repaired)
        print(repaired)
    if arguments.gate is not None:
        ratio, fallback = arguments.gate, arguments.fallback
        with report.timed("gate"):
            found = wanda_ext.gate(
                model,
                dense,
                arguments.calib,
                max_ratio=ratio,
                fallback=fallback,
                report=report,
                **options,
            )
        print(found)
        found.raise_if_failed()


def _prune_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {word: getattr(arguments, word) for word in SHARED}
