"""What commands share: a model that is named on the command line, and loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.hub import cached_file

from wanda_ext.checkpoint import (
    Checkpoint,
    check_links,
    holds_safetensors,
    model_class,
    open_checkpoint,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds what names a model, and says where and as what it is wanted."""
    parser.add_argument("model", metavar="MODEL", help="a directory or a Hub id")
    parser.add_argument("--device", help="where to compute, such as cuda (where the model is)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of weights (%(default)s)")


def load(arguments: argparse.Namespace, trust: bool = False, **options: Any) -> tuple[Any, Any]:
    """The model, loaded with `options` by its `model_class`, and its tokenizer.

    trust: whether its own code may run.
    """
    name = arguments.model
    code = {"trust_remote_code": True} if trust else {}
    if Path(name).is_dir():
        check_links(Path(name))
    with named(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **code)
        kind = model_class(transformers.AutoConfig.from_pretrained(name, **code))
        model = kind.from_pretrained(name, dtype=arguments.dtype, **code, **options)
    return model, tokenizer


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
    except (OSError, ValueError) as error:
        raise ValueError(
            f"MODEL {name!r}: expected a model's directory or its id on the Hub ({error})"
        ) from error
