"""What commands share: a model that is named on the command line, and loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from transformers.utils.hub import cached_file

from wanda_ext.calibration import Protocol
from wanda_ext.checkpoint import (
    Checkpoint,
    KeysError,
    check_links,
    holds_safetensors,
    load_pretrained,
    load_tokenizer,
    open_checkpoint,
    shown,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds what names a model, and says where and as what it is wanted."""
    parser.add_argument("model", metavar="MODEL", help="a directory or a Hub id")
    parser.add_argument("--device", help="where to compute, such as cuda (where the model is)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of weights (%(default)s)")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the word without which no code of a model runs; nobody is asked for it."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that came with the model"
    )


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """Adds what a window of text starts with."""
    parser.add_argument(
        "--protocol",
        choices=get_args(Protocol),
        default="model",
        help="windows of text start with a BOS where the model's tokenizer puts one (model), or "
        "never get one, as in the papers (%(default)s)",
    )


def load(arguments: argparse.Namespace, **options: Any) -> tuple[Any, Any, list[str]]:
    """The model, loaded with `options`, its tokenizer, and the names of the tensors that the model
    has no place for."""
    name, trust = arguments.model, arguments.trust_remote_code
    if Path(name).is_dir():
        check_links(Path(name))
    with named(name):
        tokenizer = load_tokenizer(name, trust_remote_code=trust)
        model, unexpected = load_pretrained(
            name, trust_remote_code=trust, dtype=arguments.dtype, **options
        )
    return model, tokenizer, unexpected


def tell(name: str, model: Any, unexpected: list[str], what: str = "ignored") -> None:
    """Says, once, what becomes of the tensors that a model has no place for."""
    if unexpected:
        kind = type(model).__name__
        print(
            f"{name} holds {len(unexpected)} tensors that {kind} has no place for, {what}: "
            f"{shown(unexpected)}",
            file=sys.stderr,
        )


def source_of(name: str) -> Path | None:
    """The directory that MODEL was loaded from: itself, or the Hub's cache of it; None: unknown."""
    if Path(name).is_dir():
        return Path(name)
    try:
        found = cached_file(name, "config.json", local_files_only=True)
    except OSError:
        return None
    return None if found is None else Path(found).parent


def checkpoint_of(name: str) -> Checkpoint | None:
    """The safetensors that MODEL was loaded from; None: it has none."""
    folder = source_of(name)
    return open_checkpoint(folder) if folder and holds_safetensors(folder) else None


@contextmanager
def named(name: str) -> Iterator[None]:
    """What goes wrong inside is told as an error of MODEL."""
    try:
        yield
    except KeysError:  # a model it is
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"MODEL {name!r}: expected a model's directory or its id on the Hub ({error})"
        ) from error
