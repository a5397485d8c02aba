"""Published perplexities beside ours: the commands of each row, and a verdict when they are run.

    python benchmarks/reproduce_paper.py --list
    python benchmarks/reproduce_paper.py --row llama2-7b-wanda-2:4 --model PATH

A row is `wanda-ext prune`, left out where it is dense, and `wanda-ext eval`, with the paper's
calibration (128 windows of C4 of the model's seqlen) and evaluation (WikiText-2). Weights and data
come from the Hub where --model names no directory. `--row` takes globs ('llama2-7b-*'). Exit
status: 0 all rows within tolerance or without a published figure, 1 one is off, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from paper_rows import ROWS, Row
from wanda_ext import cli

NONE = "no published figure on record"


def main(words: list[str] | None = None, rows: list[Row] = ROWS) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--list", action="store_true", help="the rows; with --row their commands")
    parser.add_argument("--row", nargs="+", metavar="NAME", default=[], help="names or globs")
    parser.add_argument("--model", help="a directory or a Hub id (the row's own on the Hub)")
    parser.add_argument("--device", help="where to compute, such as cuda")
    parser.add_argument("--eval-device", help="such as auto: all GPUs (--device)")
    parser.add_argument("--out", type=Path, help="keep the pruned models in this directory")
    parser.add_argument("--json", type=Path, help="write the results")
    arguments = parser.parse_args(words)
    chosen = _chosen(parser, rows, arguments.row)
    if arguments.model and len({row.hub for row in chosen}) > 1 and not arguments.list:
        parser.error("--model is one model, but the rows are of several")
    if arguments.list or not arguments.row:
        _print_list(chosen, arguments, with_commands=bool(arguments.row))
        return 0
    results: list[dict[str, Any]] = []
    for row in chosen:
        results.append(_kept(row, arguments))
        print(told(results[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(result["verdict"].startswith("off") for result in results))


def commands_of(row: Row, arguments: argparse.Namespace, pruned: str) -> list[list[str]]:
    """The words after `wanda-ext` of each command; `pruned` is the directory between them."""
    model = arguments.model or row.hub
    seqlen = ["--seqlen", str(row.seqlen), "--protocol", "paper"]
    dtype = ["--dtype", row.dtype]
    device = ["--device", arguments.device] if arguments.device else []
    commands = []
    if row.method != "dense":
        assert row.sparsity is not None
        options = ["--method", row.method, "--sparsity", row.sparsity, "--calib", row.calib]
        options += ["--nsamples", str(row.nsamples), *seqlen, "--seed", "0", *dtype, *device]
        commands.append(["prune", model, "--out", pruned, *options])
        model = pruned
    where = arguments.eval_device or arguments.device
    device = ["--device", where] if where else []
    commands.append(["eval", model, "--data", row.data, *seqlen, *dtype, *device])
    return commands


def reproduce(row: Row, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs a row's commands, with files in `folder`, and compares."""
    commands = commands_of(row, arguments, str(folder / row.name.replace(":", "of")))
    found = folder / f"{row.name.replace(':', 'of')}.json"
    started = time.monotonic()
    for command in commands:
        print(f"wanda-ext {shlex.join(command)}", flush=True)
        more = ["--json", str(found)] if command[0] == "eval" else []
        if status := cli.main([*command, *more]):
            raise SystemExit(status)
    evaluation = json.loads(found.read_text(encoding="utf-8"))
    ours = evaluation["perplexity"]["perplexity"]
    return {
        "row": row.name,
        **asdict(row),
        "ours": ours,
        **compared(row, ours),
        "seconds": time.monotonic() - started,
        "commands": [f"wanda-ext {shlex.join(command)}" for command in commands],
        "evaluation": evaluation,
    }


def compared(row: Row, ours: float) -> dict[str, Any]:
    if row.published is None:
        return {"difference": None, "tolerance": None, "verdict": NONE}
    difference = ours - float(row.published)
    verdict = "within tolerance"
    if not abs(difference) <= row.tolerance:
        verdict = f"off by {difference:+.2f} ({difference / float(row.published):+.1%})"
    return {"difference": difference, "tolerance": row.tolerance, "verdict": verdict}


def told(result: dict[str, Any]) -> str:
    if result["published"] is None:
        return f"{result['row']}: ours {result['ours']:.2f}; {NONE}"
    return (
        f"{result['row']}: ours {result['ours']:.2f}, published {result['published']} "
        f"({result['source']}; {result['evidence']}), difference {result['difference']:+.2f}, "
        f"tolerance {result['tolerance']:.2f}: {result['verdict']}"
    )


def _chosen(parser: argparse.ArgumentParser, rows: list[Row], names: list[str]) -> list[Row]:
    for name in names:
        if not any(fnmatchcase(row.name, name) for row in rows):
            parser.error(f"--row {name}: no such row; --list shows them")
    return [row for row in rows if not names or any(fnmatchcase(row.name, n) for n in names)]


def _print_list(rows: list[Row], arguments: argparse.Namespace, with_commands: bool) -> None:
    for row in rows:
        about = f"{row.source} ({row.evidence})" if row.published else NONE
        calibration = "-" if row.method == "dense" else f"{row.calib} {row.nsamples}"
        figure = row.published or "-"
        print(f"{row.name:<28} {figure:>7}  seqlen {row.seqlen}  {calibration:<7}  {about}")
        if with_commands:
            for command in commands_of(row, arguments, f"out/{row.name.replace(':', 'of')}"):
                print(f"    wanda-ext {shlex.join(command)}")


def _kept(row: Row, arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        return reproduce(row, arguments, arguments.out)
    with tempfile.TemporaryDirectory() as folder:
        return reproduce(row, arguments, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
