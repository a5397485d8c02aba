"""What commands share: a model that is named on the command line, and loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from wanda_ext.checkpoint import KeysError, load_pretrained, load_tokenizer, shown

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


def load(arguments: argparse.Namespace, **options: Any) -> tuple[Any, Any, list[str]]:
    """The model, loaded with `options`, its tokenizer, and the names of the tensors that the model
    has no place for."""
    name, trust = arguments.model, arguments.trust_remote_code
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
