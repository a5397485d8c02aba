"""wanda-ext prune | eval | inspect | convert | demo: the Python API's words on a command line.

Exit status: 0 done, 1 refused or failed (one line on stderr says why), 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import wanda_ext
from wanda_ext.blocks import context_of
from wanda_ext.calibration import MAX_SEQLEN
from wanda_ext.directory import new_directory
from wanda_ext.evaluate import evaluation_text
from wanda_ext.inspection import inspect_checkpoint
from wanda_ext.methods import METHODS
from wanda_ext.report import PruneReport

DTYPES = ("auto", "float32", "bfloat16", "float16")
REPORT = "report.json"  # beside the model's files


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt as stop:
        _say_error("interrupted, nothing was written", stop)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        _say_error(str(error) or type(error).__name__, error)
        return 1
    return 0


def _say_error(message: str, error: BaseException) -> None:
    report = getattr(error, "report", None)
    if isinstance(report, PruneReport):
        message += f"; until then: {str(report).splitlines()[-1]}"
    print(f"wanda-ext: {' '.join(message.split())}", file=sys.stderr)


# --- The commands --------------------------------------------------------------------------------


def _prune(arguments: argparse.Namespace) -> None:
    with new_directory(arguments.out) as fresh:  # refuses the name now, not after hours of work
        model, tokenizer = _load(arguments)
        report = wanda_ext.prune_model(
            model,
            arguments.calib,
            arguments.sparsity,
            method=arguments.method,
            tokenizer=tokenizer,
            nsamples=arguments.nsamples,
            seqlen=arguments.seqlen,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            device=arguments.device,
            ignore=arguments.ignore,
            blocks=arguments.blocks,
            swap=arguments.packed,
        )
        wanda_ext.save_pretrained(model, fresh, packed=arguments.packed, tokenizer=tokenizer)
        report.save(fresh / REPORT)
    print(report)
    print(f"Saved {'packed' if arguments.packed else 'dense, with zeros,'} in {arguments.out}")


def _eval(arguments: argparse.Namespace) -> None:
    text = evaluation_text(arguments.data)
    model, tokenizer = _load(arguments)
    if arguments.device is not None:
        model.to(arguments.device)
    context = context_of(model) or MAX_SEQLEN
    seqlen = min(MAX_SEQLEN, context) if arguments.seqlen is None else arguments.seqlen
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    value = wanda_ext.perplexity(model, ids, seqlen)
    windows = ids.numel() // seqlen
    print(f"perplexity {value:.4f}  ({arguments.data}, {windows} windows of {seqlen} tokens)")


def _inspect(arguments: argparse.Namespace) -> None:
    print(inspect_checkpoint(arguments.directory))
    if arguments.verify:
        path = Path(arguments.directory) / REPORT
        report = PruneReport.load(path) if path.exists() else None
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.directory, dtype="auto")
        checked = wanda_ext.verify(model, report)
        print(checked)
        checked.raise_if_bad()


def _convert(arguments: argparse.Namespace) -> None:
    wanda_ext.convert(arguments.source, arguments.destination, arguments.to)
    print(f"Wrote {arguments.destination}")


def _demo(arguments: argparse.Namespace) -> None:
    from wanda_ext import demo, demo_model

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    settings = demo_model.DemoSettings(seed=arguments.seed)
    demo.run(Path(arguments.out), settings, retrain=arguments.retrain)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    name = arguments.model
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=arguments.dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"MODEL {name!r}: expected a model's directory or its id on the Hub ({error})"
        ) from error
    return model, tokenizer


# --- Their arguments -----------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wanda-ext", description="Prunes language models, packs them 2:4, measures them."
    )
    parser.add_argument("--version", action="version", version=wanda_ext.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prune = commands.add_parser("prune", help="prune a model and save it")
    _add_model(prune)
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
    prune.set_defaults(run=_prune)

    evaluate = commands.add_parser("eval", help="measure perplexity")
    _add_model(evaluate)
    evaluate.add_argument(
        "--data", default="wikitext2", help="builtin, wikitext2 or a text file (%(default)s)"
    )
    evaluate.add_argument("--seqlen", type=int, help="tokens a window (2048, or the context)")
    evaluate.set_defaults(run=_eval)

    inspect = commands.add_parser("inspect", help="sparsity, pattern and bytes of every linear")
    inspect.add_argument("directory", metavar="DIR", help="a saved model")
    inspect.add_argument("--verify", action="store_true", help="load it and check it too")
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="turn a packed model dense, or back")
    convert.add_argument("source", metavar="DIR", help="a saved model")
    convert.add_argument("destination", metavar="OUT", help="directory to write")
    convert.add_argument("--to", required=True, choices=("packed", "dense"))
    convert.set_defaults(run=_convert)

    demo = commands.add_parser("demo", help="train a small model offline and prune it every way")
    demo.add_argument("--out", default="wanda-ext-demo", help="directory to write (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    demo.add_argument("--retrain", action="store_true", help="do not use the cached model")
    demo.set_defaults(run=_demo)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory or a Hub id")
    parser.add_argument("--device", help="where to compute, such as cuda (where the model is)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of weights (%(default)s)")
