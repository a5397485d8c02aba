"""wanda-ext prune | eval | inspect | convert | bench | demo: the Python API on a command line.

Exit status: 0 done, 1 refused or failed (one line on stderr says why), 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import wanda_ext
from wanda_ext.checkpoint import (
    check_links,
    empty_of,
    inspect_checkpoint,
    load_config,
    load_pretrained,
    told_left,
)
from wanda_ext.cli.arguments import add_trust, named, tell
from wanda_ext.cli.eval import add_eval
from wanda_ext.cli.prune import add_prune
from wanda_ext.packed.dispatch_table import BUCKETS
from wanda_ext.packed.dispatch_table import DTYPES as TIMED_DTYPES
from wanda_ext.report import REPORT, PruneReport


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt as stop:
        _say_error(f"interrupted, {getattr(stop, 'left', 'nothing was written')}", stop)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        _say_error(str(error) or type(error).__name__, error)
        return 1
    return 0


def _say_error(message: str, error: BaseException) -> None:
    report = getattr(error, "report", None)
    if isinstance(report, PruneReport):
        message += f"; until then: {str(report).splitlines()[-1]}"
    message = message.replace("the argument `trust_remote_code=True`", "--trust-remote-code")
    message = message.replace("`trust_remote_code=True`", "--trust-remote-code")
    print(f"wanda-ext: {' '.join(message.split())}", file=sys.stderr)


# --- The commands --------------------------------------------------------------------------------


def _inspect(arguments: argparse.Namespace) -> None:
    every, trust = arguments.all, arguments.trust_remote_code
    found = inspect_checkpoint(arguments.directory, trust)
    print(found if every else found.short())
    if arguments.verify:
        check_links(Path(arguments.directory))
        path = Path(arguments.directory) / REPORT
        report = PruneReport.load(path) if path.exists() else None
        name = arguments.directory
        model, unexpected = load_pretrained(name, trust_remote_code=trust, dtype="auto")
        tell(name, model, unexpected)
        checked = wanda_ext.verify(model, report)
        print(checked if every else checked.verdict())
        checked.raise_if_bad()


def _convert(arguments: argparse.Namespace) -> None:
    trust = arguments.trust_remote_code
    source, destination = arguments.source, arguments.destination
    outcome = wanda_ext.convert(source, destination, arguments.to, trust_remote_code=trust)
    if outcome.left:
        print(told_left(outcome.left))
    print(f"Wrote {arguments.destination}")


def _bench(arguments: argparse.Namespace) -> None:
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    shapes = arguments.shapes or _skeleton(arguments.model, arguments.trust_remote_code)
    tokens = arguments.tokens or BUCKETS
    print(wanda_ext.bench.tune(shapes, tokens, dtype=dtype, device=arguments.device))


def _demo(arguments: argparse.Namespace) -> None:
    from wanda_ext.cli import demo, demo_model

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    settings = demo_model.DemoSettings(seed=arguments.seed)
    demo.run(Path(arguments.out), settings, retrain=arguments.retrain)


def _skeleton(name: str, trust: bool) -> Any:
    """The model without its weights, which are not read."""
    with named(name):
        return empty_of(load_config(name, trust_remote_code=trust), None, trust)


# --- Their arguments -----------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wanda-ext", description="Prunes language models, packs them, measures them."
    )
    parser.add_argument("--version", action="version", version=wanda_ext.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_prune(commands)
    add_eval(commands)

    inspect = commands.add_parser("inspect", help="sparsity, pattern and bytes of the linears")
    inspect.add_argument("directory", metavar="DIR", help="a saved model")
    inspect.add_argument("--all", action="store_true", help="a line for each, not for each kind")
    inspect.add_argument("--verify", action="store_true", help="load it and check it too")
    add_trust(inspect)
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="turn a packed model dense, or back")
    convert.add_argument("source", metavar="DIR", help="a saved model")
    convert.add_argument("destination", metavar="OUT", help="directory to write")
    convert.add_argument("--to", required=True, choices=("packed", "dense"))
    add_trust(convert)
    convert.set_defaults(run=_convert)

    bench = commands.add_parser("bench", help="find the fastest kernels for a model on this GPU")
    what = bench.add_mutually_exclusive_group(required=True)
    what.add_argument("model", metavar="MODEL", nargs="?", help="a directory or a Hub id")
    what.add_argument("--shapes", type=_shapes, metavar="NxK,...", help="out x in features instead")
    bench.add_argument(
        "--tokens", type=_tokens, metavar="M,...", help="rows a call (powers of two up to 16384)"
    )
    bench.add_argument("--device", help="which GPU, such as cuda:1 (the current one)")
    bench.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *TIMED_DTYPES),
        help="of weights (the model's; bfloat16 for shapes)",
    )
    add_trust(bench)
    bench.set_defaults(run=_bench)

    demo = commands.add_parser("demo", help="train a small model offline and prune it every way")
    demo.add_argument("--out", default="wanda-ext-demo", help="directory to write (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    demo.add_argument("--retrain", action="store_true", help="do not use the cached model")
    demo.set_defaults(run=_demo)
    return parser


def _tokens(text: str) -> list[int]:
    return [count for (count,) in _numbers(text, r"\d+", "such as 1,8,2048")]


def _shapes(text: str) -> list[tuple[int, int]]:
    return [(n, k) for n, k in _numbers(text, r"\d+x\d+", "such as 4096x4096,11008x4096")]


def _numbers(text: str, form: str, example: str) -> list[list[int]]:
    if not all(re.fullmatch(form, part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected {example}, got {text!r}")
    return [[int(number) for number in part.split("x")] for part in text.split(",")]
