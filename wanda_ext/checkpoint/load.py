"""Models, configs and tokenizers that transformers loads for us: whole, and by code we trust.

Left alone, transformers fills in random numbers where a checkpoint lacks a tensor, and asks on the
terminal whether code that came with it may run. All of this package loads through here instead.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from wanda_ext.checkpoint.architecture import model_class
from wanda_ext.files import TensorHeader, read_headers

SHOWN = 3  # names in a message
WHOLE = ("BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")  # numbers, in a header


class KeysError(ValueError):
    """A checkpoint whose tensors are not those of its model."""


def load_pretrained(
    name: str | os.PathLike[str], *, trust_remote_code: bool = False, **options: Any
) -> tuple[Any, list[str]]:
    """A model of its `model_class`, and the names of the tensors that it ignores.

    name: a directory or a Hub id, of a model or of an adapter that peft can load. options: of
    `from_pretrained`. trust_remote_code: whether code that came with it may run; nobody is asked.

    Raises KeysError, which names them, where tensors are missing or have other shapes than the
    model's; tied ones and computed buffers are not missed. ValueError where code would have to run.
    """
    adapter = _adapter_config(name)
    if adapter:  # transformers would tell of the adapter's tensors, and not of the model's
        base = adapter["base_model_name_or_path"]
        model, unexpected = load_pretrained(base, trust_remote_code=trust_remote_code, **options)
        with _without_report():
            found = model.load_adapter(os.fspath(name))
        missing = getattr(found, "missing_keys", ())
        if missing:
            raise lacking(name, "its adapter", missing)
        return model, unexpected
    config = load_config(name, trust_remote_code=trust_remote_code)
    with _without_report(), _damage_of(name):
        model, found = model_class(config).from_pretrained(
            name,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else the error refers to a table in the log
            **options,
        )
    unexpected = sorted(found["unexpected_keys"])
    if getattr(config, "quantization_config", None) is None:
        check_floats(name, read_headers(_weights_in(Path(name))))
    kind = type(model).__name__
    if found["missing_keys"]:
        raise lacking(name, kind, found["missing_keys"], unexpected)
    if found["mismatched_keys"]:
        tensor, stored, here = min(found["mismatched_keys"])
        raise misshapen(name, tensor, stored, kind, here)
    return model, unexpected


def load_config(
    name: str | os.PathLike[str], *, trust_remote_code: bool = False, **options: Any
) -> Any:
    """What `AutoConfig.from_pretrained` gives; code as in load_pretrained.

    Raises ValueError, in one line, for values that transformers' own checks refuse.
    """
    import transformers

    auto = transformers.AutoConfig
    with _checks_of(name):
        config = auto.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    entry = getattr(config, "quantization_config", None)
    if not (entry is None or isinstance(entry, dict) or hasattr(entry, "to_dict")):
        raise ValueError(
            f"{name}: config.json: quantization_config is {entry!r}; expected a mapping, or none"
        )
    count = getattr(config, "num_hidden_layers", None)
    if isinstance(count, int) and count < 1:  # a model of no blocks, to transformers
        raise ValueError(f"{name}: config.json: num_hidden_layers is {count}; expected 1 or more")
    return config


def load_tokenizer(name: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """What `AutoTokenizer.from_pretrained` gives; code and errors as in load_config."""
    import transformers

    auto = transformers.AutoTokenizer
    with _checks_of(name):
        return auto.from_pretrained(name, trust_remote_code=trust_remote_code)


def lacking(
    where: object, kind: str, missing: Iterable[str], unexpected: Iterable[str] = ()
) -> KeysError:
    """The error for a checkpoint, at `where`, that lacks tensors of a model of class `kind`."""
    names = sorted(missing)
    told = f"{where} lacks {len(names)} of the tensors that {kind} has: {shown(names)}; "
    odd = sorted(unexpected)
    if odd:
        told += f"it holds {len(odd)} that {kind} has no place for: {shown(odd)}; "
    return KeysError(f"{told}copy or download it again")


def misshapen(
    where: object, tensor: str, stored: Iterable[int], kind: str, here: Iterable[int]
) -> KeysError:
    """The error for a tensor of another shape than a model of class `kind` has."""
    return KeysError(
        f"{where}: {tensor} is stored as {list(stored)}, and {kind} has {list(here)}; copy or "
        "download it again"
    )


def check_floats(where: object, headers: Mapping[str, TensorHeader]) -> None:
    """Raises KeysError for a stored weight of whole numbers, which would be read as floats."""
    for name, header in headers.items():
        if name.endswith(".weight") and header.dtype in WHOLE:
            raise mistyped(where, name, header.dtype)


def mistyped(where: object, tensor: str, dtype: object) -> KeysError:
    """The error for whole numbers where a model has floating-point ones."""
    return KeysError(
        f"{where}: {tensor} is stored as {dtype}; expected floating-point numbers: copy or "
        "download it again"
    )


def shared_names(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor of a model: several where modules share it."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def shown(names: list[str]) -> str:
    """The first of some names, for a message."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _weights_in(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads in a directory; none where it is none."""
    if (folder / SAFE_WEIGHTS_NAME).exists():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.exists():
        return []
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / file for file in sorted(set(files))]


def _adapter_config(name: str | os.PathLike[str]) -> dict[str, Any]:
    """The adapter_config.json of an adapter that peft can load; empty for anything else."""
    from transformers.utils.import_utils import is_peft_available
    from transformers.utils.peft_utils import find_adapter_config_file

    path = find_adapter_config_file(os.fspath(name)) if is_peft_available() else None
    return {} if path is None else dict(json.loads(Path(path).read_text(encoding="utf-8")))


@contextmanager
def _checks_of(name: str | os.PathLike[str]) -> Iterator[None]:
    """transformers' checks of what a directory says of its model raise errors of many kinds."""
    try:
        yield
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: its config.json is not one of a model: {told}") from error


@contextmanager
def _damage_of(name: str | os.PathLike[str]) -> Iterator[None]:
    """What reads a damaged directory for transformers raises errors of many kinds, too."""
    try:
        yield
    except (OSError, ValueError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = " ".join(str(error).split())
        raise ValueError(
            f"{name} cannot be loaded ({type(error).__name__}: {told}); if it is damaged, copy or "
            "download it again"
        ) from error


@contextmanager
def _without_report() -> Iterator[None]:
    """Keeps transformers' table of odd tensors out of the log: whoever loads says it in a line."""
    logger = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or "CONVERSION" in text  # its error refers to that one

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
