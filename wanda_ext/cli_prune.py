"""The command `prune`, and what it shares with others: a model named on the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

import wanda_ext
from wanda_ext.directory import new_directory
from wanda_ext.meta_model import NamesError
from wanda_ext.methods import METHODS
from wanda_ext.ranks import launched
from wanda_ext.reader import holds_safetensors
from wanda_ext.report import PruneReport
from wanda_ext.run import REPORT

DTYPES = ("auto", "float32", "bfloat16", "float16")
SHARED = (  # arguments of prune_model and of prune_checkpoint
    *("calib", "sparsity", "method", "nsamples", "seqlen", "seed", "batch_size"),
    *("device", "ignore", "blocks"),
)


def add_prune(commands: Any) -> None:
    """Adds the command to a parser's."""
    prune = commands.add_parser("prune", help="prune a model and save it")
    add_model(prune)
    prune.add_argument("--out", required=True, help="directory to write the pruned model to")
    prune.add_argument(
        "--calib",
        default="c4",
        help="builtin, c4, wikitext2, a .txt/.jsonl/.parquet path or a Hub dataset (%(default)s)",
    )
    prune.add_argument("--sparsity", default="2:4", help="50%%, 0.5, 2:4, 4:8, ... (%(default)s)")
    prune.add_argument("--method", default="wanda", choices=METHODS, help="(%(default)s)")
    prune.add_argument("--nsamples", type=int, default=128, help="windows of text (%(default)s)")
    prune.add_argument("--seqlen", type=int, help="tokens a window (2048, or the model's context)")
    prune.add_argument("--seed", type=int, default=0, help="draws the windows (%(default)s)")
    prune.add_argument("--batch-size", type=int, help="windows a forward pass")
    prune.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="GLOB",
        help="leave linears of this name dense; may be repeated",
    )
    prune.add_argument("--blocks", help="dotted path of the decoder blocks, where not found")
    prune.add_argument("--packed", action="store_true", help="save 2:4 linears packed")
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
    prune.add_argument(
        "--trust-remote-code", action="store_true", help="run code that came with the model"
    )
    prune.set_defaults(run=_prune)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds what names a model, and says where and as what it is wanted."""
    parser.add_argument("model", metavar="MODEL", help="a directory or a Hub id")
    parser.add_argument("--device", help="where to compute, such as cuda (where the model is)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of weights (%(default)s)")


def load(arguments: argparse.Namespace, trust: bool = False) -> tuple[Any, Any]:
    """The model and its tokenizer. trust: whether code that came with it may run."""
    name = arguments.model
    code = {"trust_remote_code": True} if trust else {}
    with named(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **code)
        auto = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(name, dtype=arguments.dtype, **code)
    return model, tokenizer


@contextmanager
def named(name: str) -> Iterator[None]:
    """What goes wrong inside is told as an error of MODEL."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"MODEL {name!r}: expected a model's directory or its id on the Hub ({error})"
        ) from error


def _prune(arguments: argparse.Namespace) -> None:
    how = "in memory"
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
    with new_directory(arguments.out) as fresh:  # refuses the name now, not after hours of work
        model, tokenizer = load(arguments, arguments.trust_remote_code)
        report = wanda_ext.prune_model(
            model, tokenizer=tokenizer, swap=arguments.packed, **_prune_options(arguments)
        )
        wanda_ext.save_pretrained(model, fresh, packed=arguments.packed, tokenizer=tokenizer)
        report.save(fresh / REPORT)
    return report


def _prune_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {word: getattr(arguments, word) for word in SHARED}
