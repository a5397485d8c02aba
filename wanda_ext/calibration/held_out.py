"""Text that a prune did not see, from its own source, and what a model makes of it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from wanda_ext.calibration.batches import Batch, calibration_batches
from wanda_ext.calibration.mixture import shares_of, split
from wanda_ext.interrupt import step

LOGITS_AT_ONCE = 1 << 22  # 16 MiB in fp32


def held_out_batches(
    calib: Any,
    windows: int,
    *,
    nsamples: int = 128,
    seed: int = 0,
    batch_size: int | None = None,
    **options: Any,
) -> list[Batch]:
    """Batches of `windows` windows that prune_model(calib, nsamples=, seed=) does not draw.

    The prune's windows are drawn again, then nsamples + windows of them with the same seed, and
    those of the prune are taken out. A text is cut at multiples of seqlen both times, so what is
    left shares no token position with them; from "c4" the same documents come first again, and the
    held-out windows are of the documents behind them. Windows that repeat a text of the prune's are
    taken out too. Token tensors, DataLoaders and lists of batches are used as they are: give others
    than the prune got.

    options: tokenizer, seqlen, context, vocab_size and protocol, as in calibration_batches. Raises
    ValueError where the source holds less than nsamples + windows windows.
    """
    if not isinstance(windows, int) or windows < 1:
        raise ValueError(f"windows must be a positive whole number, not {windows!r}")
    options["batch_size"] = batch_size
    if _is_tokens(calib):
        return calibration_batches(calib, nsamples=windows, seed=seed, **options)
    mixed = shares_of(calib)
    rows = [
        row
        for (source, count), (_, held) in zip(
            split(mixed or [(calib, 1.0)], nsamples),
            split(mixed or [(calib, 1.0)], windows),
            strict=True,
        )
        for row in _held_out_rows(source, held, count, seed, options)
    ]
    return calibration_batches(torch.stack(rows), batch_size=batch_size)


def _held_out_rows(
    calib: Any, windows: int, nsamples: int, seed: int, options: Mapping[str, Any]
) -> list[Tensor]:
    """From one source."""
    drawn = _rows(calibration_batches(calib, nsamples=nsamples, seed=seed, **options))
    try:
        more = calibration_batches(calib, nsamples=nsamples + windows, seed=seed, **options)
    except ValueError as error:
        raise ValueError(f"{windows} windows cannot be held out: {error}") from error
    seen = {tuple(row) for row in drawn.tolist()}
    left = [row for row in _rows(more) if tuple(row.tolist()) not in seen]
    if len(left) < windows:
        raise ValueError(
            f"{windows} windows cannot be held out: beside the {nsamples} of the prune the text "
            f"has only {len(left)} others; pass more text, or fewer windows"
        )
    chosen = sorted(random.Random(seed).sample(range(len(left)), windows))
    return [left[i] for i in chosen]


def perplexity_of(model: Any, batches: Sequence[Batch], device: torch.device | None) -> float:
    """exp of the mean over windows of their mean cross entropy; infinity where it is not finite.

    As in evaluate.py, but batch by batch, without what an attention_mask hides. device: where the
    whole model is taken to; it must be in evaluation mode, without gradients.
    """
    losses: list[float] = []
    with _on(model, device):
        home = model.get_input_embeddings().weight.device
        for batch in batches:
            step()
            here = {key: tensor.to(home) for key, tensor in batch.items()}
            logits = model(**here, use_cache=False).logits[:, :-1]
            ids = here["input_ids"][:, 1:].to(logits.device)
            loss = token_losses(logits, ids)
            keep = torch.ones_like(ids)
            if "attention_mask" in here:
                keep = here["attention_mask"][:, 1:].to(keep)
            losses += ((loss * keep).sum(dim=1) / keep.sum(dim=1).clamp_min(1)).tolist()
    mean = sum(losses) / len(losses)
    return math.exp(mean) if mean < math.log(torch.finfo(torch.float64).max) else math.inf


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """The cross entropy of each token in fp32, some tokens at a time: copies of all logits would
    take several times their memory where the vocabulary is large.

    Shapes: logits [..., tokens, vocabulary], ids [..., tokens] int64 -> [..., tokens] float32.
    """
    rows, targets = logits.flatten(0, -2), ids.flatten()
    at_once = max(1, LOGITS_AT_ONCE // rows.shape[-1])
    losses = [
        nn.functional.cross_entropy(some.float(), these, reduction="none")
        for some, these in zip(
            torch.split(rows, at_once), torch.split(targets, at_once), strict=True
        )
    ]
    return torch.cat(losses).view(ids.shape)


@contextmanager
def _on(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """The whole model on the device inside; it is not changed there, so nothing comes back."""
    tensors = [] if device is None else [*model.parameters(), *model.buffers()]
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


def _is_tokens(calib: Any) -> bool:
    batches = isinstance(calib, (list, tuple)) and calib and isinstance(calib[0], Mapping)
    return isinstance(calib, (Tensor, DataLoader)) or bool(batches)


def _rows(batches: list[Batch]) -> Tensor:
    return torch.cat([batch["input_ids"] for batch in batches])
