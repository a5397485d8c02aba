"""Perplexity, by the protocol of the Wanda paper's code, and the texts it is measured on."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from wanda_ext.blocks import context_of, in_eval_mode

WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1")


@torch.inference_mode()
def perplexity(model: nn.Module, ids: Tensor, seqlen: int) -> float:
    """exp of the mean cross entropy over non-overlapping windows of `seqlen` tokens.

        ppl = exp(1/w * sum over windows of mean over t < seqlen-1 of -log p(ids[t+1] | ids[..t]))

    This is the reference protocol (locuslab/wanda, lib/eval.py): one tokenized text, w = tokens //
    seqlen windows, the tail dropped, no overlap, logits taken as fp32. The figure depends on the
    tokenizer and on `seqlen`: quote both with it.

    Shapes: ids [tokens] or [1, tokens], any integer dtype, on any device.
    Raises: TypeError / ValueError for ids that are not such a tensor, hold less than one window or
            leave the vocabulary, for a `seqlen` below 2 or over the model's context, and for a
            model whose weights have no storage or whose loss is not finite (the window is named).
    """
    tokens = _checked_ids(ids)
    _check_seqlen(model, seqlen)
    windows = tokens.numel() // seqlen
    if windows == 0:
        raise ValueError(
            f"ids: expected at least one window of seqlen={seqlen} tokens, got {tokens.numel()}; "
            "pass a longer text or a smaller seqlen"
        )
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if embedding.weight.is_meta:
        raise ValueError("model: its weights are on the meta device; load them before evaluating")
    if tokens.min() < 0 or tokens.max() >= embedding.num_embeddings:
        raise ValueError(
            f"ids: expected token ids in [0, {embedding.num_embeddings}), got "
            f"[{int(tokens.min())}, {int(tokens.max())}]; tokenize with the model's own tokenizer"
        )
    total = 0.0
    with in_eval_mode(model):
        for i in range(windows):
            window = tokens[i * seqlen : (i + 1) * seqlen].to(embedding.weight.device)
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            loss = nn.functional.cross_entropy(logits, window[1:].to(logits.device)).item()
            if not math.isfinite(loss):
                raise ValueError(f"model: its loss in window {i} of {windows} is {loss}")
            total += loss
    return math.exp(total / windows)


def evaluation_text(data: str) -> str:
    """The text named by `data`: "builtin", "wikitext2" (its test part) or the path of a text file.

    "builtin" is `pydoc_data.topics`, which ships with CPython and differs between its versions.
    Raises: ValueError for anything else.
    """
    if data == "builtin":
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values())
    if data == "wikitext2":
        import datasets

        rows = datasets.load_dataset(*WIKITEXT2, split="test")
        return "\n\n".join(rows["text"])
    path = Path(data)
    if not path.is_file():
        raise ValueError(f"data: expected 'builtin', 'wikitext2' or a text file, got {data!r}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {data} is not UTF-8 text ({error})") from error


def _checked_ids(ids: Tensor) -> Tensor:
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: expected a tensor of token ids, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"ids: expected an integer dtype, got {ids.dtype}")
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"ids: expected shape [tokens] or [1, tokens], got {list(ids.shape)}")
    return ids.long()


def _check_seqlen(model: nn.Module, seqlen: int) -> None:
    if not isinstance(seqlen, int) or isinstance(seqlen, bool):
        raise TypeError(f"seqlen: expected an int, got {type(seqlen).__name__}")
    if seqlen < 2:
        raise ValueError(f"seqlen: expected at least 2 (a token and its successor), got {seqlen}")
    context = context_of(model)
    if context is not None and seqlen > context:
        raise ValueError(
            f"seqlen: expected at most the model's context of {context} tokens, got {seqlen}"
        )
