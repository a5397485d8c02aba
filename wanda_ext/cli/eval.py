"""The command `eval`: perplexity, and scores on the tasks of lm-eval, of a model as it is saved."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wanda_ext.cli.arguments import add_model, add_protocol, add_trust, load, tell
from wanda_ext.quality import evaluate_text, evaluation_text, tasks
from wanda_ext.report import versions

OF_TASKS = ("task_path", "num_fewshot", "limit")  # arguments that say nothing without --tasks


def add_eval(commands: Any) -> None:
    """Adds the command to a parser's."""
    parser = commands.add_parser(
        "eval",
        help="measure perplexity, or run the tasks of lm-eval",
        epilog="Dense, masked and packed models alike. --device auto spreads one over all GPUs.",
    )
    add_model(parser)
    parser.add_argument(
        "--data",
        help="perplexity of builtin, wikitext2 or a text file (wikitext2; none with --tasks)",
    )
    parser.add_argument("--seqlen", type=int, help="tokens a window (2048, or the context)")
    parser.add_argument("--windows", type=int, help="at most so many, from the start (all)")
    add_protocol(parser)
    parser.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="of lm-eval; paper: the paper's seven, zero-shot; mmlu: MMLU, five shots",
    )
    parser.add_argument("--task-path", metavar="DIR", help="YAML files of tasks of your own")
    parser.add_argument("--num-fewshot", type=int, help="examples before a question")
    parser.add_argument("--limit", type=int, help="samples a task, to try it")
    parser.add_argument(
        "--batch-size", type=_batch_size, default=1, help="requests of tasks at a time, or auto"
    )
    parser.add_argument("--json", metavar="OUT", help="write everything that is printed, and more")
    add_trust(parser)
    parser.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> None:
    # What can be refused is, before a model is loaded.
    _check(arguments)
    wanted = None
    if arguments.tasks is not None:
        shots, path = arguments.num_fewshot, arguments.task_path
        wanted = tasks.find(arguments.tasks, num_fewshot=shots, task_path=path)
    data = arguments.data or (None if wanted else "wikitext2")
    text = None if data is None else evaluation_text(data)

    model, tokenizer = _loaded(arguments)
    done: dict[str, Any] = {"model": arguments.model, "versions": versions()}
    if text is not None:
        found = evaluate_text(
            model,
            tokenizer,
            text,
            arguments.seqlen,
            windows=arguments.windows,
            protocol=arguments.protocol,
            progress=True,
        )
        print(found)
        done["perplexity"] = asdict(found)
    if wanted is not None:
        limit, size = arguments.limit, arguments.batch_size
        report = tasks.run(model, tokenizer, wanted, limit=limit, batch_size=size)
        print(report)
        done["tasks"] = asdict(report)
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


def _check(arguments: argparse.Namespace) -> None:
    given = [word for word in OF_TASKS if getattr(arguments, word) is not None]
    if given and arguments.tasks is None:
        words = ", ".join(f"--{word.replace('_', '-')}" for word in given)
        raise ValueError(f"{words}: expected --tasks beside it; add --tasks paper, for example")
    if arguments.windows is not None and arguments.windows < 1:
        raise ValueError(f"--windows: expected a number from 1 on, got {arguments.windows}")
    for word in ("seqlen", "windows"):
        asked = getattr(arguments, word) is not None
        if asked and arguments.tasks is not None and arguments.data is None:
            raise ValueError(f"--{word}: with --tasks alone no perplexity is measured; add --data")
    if arguments.json is not None and not Path(arguments.json).absolute().parent.is_dir():
        raise ValueError(f"--json: the directory of {arguments.json} does not exist; make it first")


def _loaded(arguments: argparse.Namespace) -> tuple[Any, Any]:
    spread = {"device_map": "auto"} if arguments.device == "auto" else {}
    model, tokenizer, unexpected = load(arguments, **spread)
    tell(arguments.model, model, unexpected)
    if arguments.device is not None and not spread:
        model.to(arguments.device)
    return model, tokenizer


def _batch_size(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, or auto, got {text!r}")
    return int(text)
