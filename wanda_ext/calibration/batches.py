"""Calibration data: every source a user may have, turned into batches of tokens, never padded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from wanda_ext.calibration.mixture import shares_of, split
from wanda_ext.calibration.text import Protocol, check_protocol, text_windows
from wanda_ext.models import context_of, vocab_size_of

Batch = dict[str, Tensor]

MAX_SEQLEN = 2048  # of the default
BATCH_TOKENS = 1024  # of the default batch size: fills a matrix product, and stays in the cache


def calibration_batches(
    calib: Any,
    *,
    tokenizer: Any = None,
    nsamples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    context: int | None = None,
    vocab_size: int | None = None,
    protocol: Protocol = "model",
    trust_remote_code: bool = False,
    progress: bool = False,
) -> list[Batch]:
    """Batches for model(**batch), each with input_ids [batch, tokens] int64.

    Texts and datasets are cut into `nsamples` windows of `seqlen` tokens (default: min(2048,
    context)), drawn with `seed`: from "c4", as the original does, one random window of one long
    document each; else from the documents joined by the end-of-text token. Several sources of text
    share the windows: a mapping source -> share, or a list of (source, share) pairs. By
    protocol="model" a window of text starts with the BOS where the tokenizer puts one; by "paper"
    it never gets one. A DataLoader is read until it has given `nsamples` sequences. Token tensors
    and lists of batches are used whole, and batches keep their own size; ids are never changed. An
    attention_mask [batch, tokens] keeps padding out of statistics.

    `tokenizer` may be a directory or Hub id to load it from, whose code runs only with
    trust_remote_code. Default `batch_size`: 1024 tokens.
    `context` and `vocab_size` are the model's limits. Raises TypeError (a source of another type)
    or ValueError (too little text, over the limits, no input_ids).
    """
    for name, value in (("nsamples", nsamples), ("seqlen", seqlen), ("batch_size", batch_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive whole number, not {value!r}")
    check_protocol(protocol)
    if not isinstance(seed, int):  # None would draw other windows every time
        raise ValueError(f"seed must be a whole number, not {seed!r}")
    if seqlen is not None and context is not None and seqlen > context:
        raise ValueError(
            f"seqlen={seqlen} is over the model's context of {context} tokens: pass {context} or "
            "less"
        )
    if isinstance(calib, Tensor):
        batches = _split(calib, batch_size)
    elif isinstance(calib, DataLoader):
        batches = _take(map(_as_batch, calib), nsamples)
    elif isinstance(calib, (list, tuple)) and calib and isinstance(calib[0], Mapping):
        batches = [_as_batch(batch) for batch in calib]
    else:
        window = seqlen or min(MAX_SEQLEN, context or MAX_SEQLEN)
        given = (window, seed, protocol, trust_remote_code, progress)
        rows = [
            row
            for source, count in split(shares_of(calib) or [(calib, 1.0)], nsamples)
            for row in text_windows(source, tokenizer, count, *given)
        ]
        batches = _split(torch.tensor(rows), batch_size)
    if not batches:
        raise ValueError("the calibration data holds no batch: pass at least one sequence")
    for i, batch in enumerate(batches):
        batches[i] = _checked(batch, f"calibration batch {i}", seqlen or context, vocab_size)
    return batches


def read_by(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """What calibration_batches takes from the model: its limits, and its tokenizer where none is
    given."""
    own = getattr(model, "name_or_path", "")
    return {
        "tokenizer": own if tokenizer is None else tokenizer,
        "context": context_of(model),
        "vocab_size": vocab_size_of(model),
    }


def _split(ids: Tensor, batch_size: int | None) -> list[Batch]:
    if ids.dim() != 2:
        raise ValueError(f"token ids must be [nsamples, seqlen], not {list(ids.shape)}")
    size = batch_size or max(1, BATCH_TOKENS // max(1, ids.shape[1]))
    return [{"input_ids": part} for part in torch.split(ids, size) if len(part)]


def _as_batch(item: Any) -> Batch:
    """What a DataLoader or a list gives: a dict, bare ids, or an (ids, targets) pair."""
    if isinstance(item, (list, tuple)) and item:
        item = item[0]
    if isinstance(item, Tensor):
        item = {"input_ids": item}
    if not isinstance(item, Mapping):
        raise TypeError(
            f"a calibration batch must be a dict of tensors with 'input_ids', not "
            f"{type(item).__name__}"
        )
    return {key: value for key, value in item.items() if key != "labels"}


def _take(batches: Iterable[Batch], nsamples: int) -> list[Batch]:
    taken: list[Batch] = []
    for batch in batches:
        rows = len(batch.get("input_ids", ()))
        if rows > nsamples:  # what is not one entry a sequence (position_ids [1, tokens]) stays
            per_row = {k for k, v in batch.items() if isinstance(v, Tensor) and len(v) == rows}
            batch = {k: v[:nsamples] if k in per_row else v for k, v in batch.items()}
        taken.append(batch)
        nsamples -= rows
        if nsamples <= 0:
            break
    return taken


def _checked(batch: Batch, name: str, limit: int | None, vocab_size: int | None) -> Batch:
    for key, value in batch.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {key!r} must be a tensor, not {type(value).__name__}")
    if "input_ids" not in batch:
        raise ValueError(f"{name} has no 'input_ids', only {sorted(batch)}: tokenize it first")
    ids = batch["input_ids"]
    if ids.dim() != 2 or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"{name}: 'input_ids' must be whole numbers [batch, tokens], not {ids.dtype} "
            f"{list(ids.shape)}"
        )
    if limit is not None and ids.shape[1] > limit:
        raise ValueError(
            f"{name} has sequences of {ids.shape[1]} tokens, over the limit of {limit} (seqlen, or "
            "the model's context): cut them"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise ValueError(
            f"{name} has token ids from {low} to {high}, but the model's vocabulary has "
            f"{vocab_size}: use the model's own tokenizer"
        )
    mask = batch.get("attention_mask")
    if mask is not None and (mask.shape != ids.shape or not mask.any()):
        raise ValueError(
            f"{name}: 'attention_mask' {list(mask.shape)} must have the shape of 'input_ids', "
            f"{list(ids.shape)}, and keep at least one token"
        )
    return {**batch, "input_ids": ids.long()}
