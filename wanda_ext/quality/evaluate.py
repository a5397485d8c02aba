"""Perplexity, by the protocol of the Wanda paper's code, and the texts it is measured on."""

from __future__ import annotations

import hashlib
import math
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wanda_ext.calibration import MAX_SEQLEN, Protocol, leading_ids, token_losses
from wanda_ext.models import context_of, in_eval_mode

WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1")


@torch.inference_mode()
def perplexity(model: nn.Module, ids: Tensor, seqlen: int, *, progress: bool = False) -> float:
    """exp of the mean cross entropy over non-overlapping windows of `seqlen` tokens.

        ppl = exp(1/w * sum over windows of mean over t < seqlen-1 of -log p(ids[t+1] | ids[..t]))

    This is the reference protocol (locuslab/wanda, lib/eval.py): one tokenized text, w = tokens //
    seqlen windows, the tail dropped, no overlap, logits taken as fp32. The reference multiplies
    each window's mean, which is over seqlen-1 targets, by seqlen, and divides the sum by w*seqlen:
    the same. The figure depends on the tokenizer and on `seqlen`: quote both with it. Ids are taken
    as they are: no BOS is added (evaluate_text does, where the model expects one).

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
        for i in tqdm(range(windows), "evaluating", unit="window", disable=not progress):
            window = tokens[i * seqlen : (i + 1) * seqlen].to(embedding.weight.device)
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            loss = token_losses(logits, window[1:].to(logits.device)).mean().item()
            if not math.isfinite(loss):
                raise ValueError(f"model: its loss in window {i} of {windows} is {loss}")
            total += loss
    return math.exp(total / windows)


@dataclass(frozen=True)
class EvaluationText:
    """A text, and what tells it from others of the same name."""

    data: str  # the name it was asked for by
    dataset: str  # what that is
    revision: str  # "commit ..." of the Hub, "CPython ..." or "sha256 ..." of the file
    text: str


def evaluation_text(data: str) -> EvaluationText:
    """The text named by `data`: "builtin", "wikitext2" (its test part) or the path of a text file.

    "builtin" is `pydoc_data.topics`, which ships with CPython and differs between its versions.
    "wikitext2" is downloaded from the Hub once, its lines joined by two newlines.
    Raises: ValueError for anything else; OSError where the Hub cannot be reached.
    """
    if data == "builtin":
        from pydoc_data.topics import topics

        revision = f"{platform.python_implementation()} {platform.python_version()}"
        return EvaluationText(data, "pydoc_data.topics", revision, "\n\n".join(topics.values()))
    if data == "wikitext2":
        import datasets

        rows = datasets.load_dataset(*WIKITEXT2, split="test")
        text = "\n\n".join(rows["text"])
        return EvaluationText(data, " ".join((*WIKITEXT2, "test")), _commit_of(rows), text)
    path = Path(data)
    if not path.is_file():
        raise ValueError(f"data: expected 'builtin', 'wikitext2' or a text file, got {data!r}")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {data} is not UTF-8 text ({error})") from error
    return EvaluationText(data, path.name, f"sha256 {hashlib.sha256(content).hexdigest()}", text)


def _commit_of(rows: Any) -> str:
    """The commit of a dataset from the Hub: `datasets` names the folder of its cache after it."""
    names = [Path(file["filename"]).parent.name for file in rows.cache_files]
    commit = next((name for name in names if re.fullmatch("[0-9a-f]{40}", name)), None)
    return "not told by datasets" if commit is None else f"commit {commit}"


@dataclass(frozen=True)
class Evaluation:
    """A perplexity and all that it depends on. str() is what `wanda-ext eval` prints."""

    perplexity: float
    data: str
    dataset: str
    revision: str
    text_sha256: str  # of the text in UTF-8
    tokenizer: str
    tokens: int  # of the whole text
    seqlen: int
    windows: int
    protocol: str
    starts_with: list[str]  # tokens that every window starts with, by the protocol
    dtype: str  # of the weights
    device: str

    def __str__(self) -> str:
        return "\n".join(
            (
                f"perplexity {self.perplexity:.4f}  ({self.data}, {self.windows} windows of "
                f"{self.seqlen} tokens)",
                f"text       {self.dataset}, {self.revision}; {self.tokens} tokens",
                f"tokenizer  {self.tokenizer}",
                f"protocol   {self.protocol}: {self._windows_are()}",
                f"model      {self.dtype} on {self.device}",
            )
        )

    def _windows_are(self) -> str:
        if self.starts_with:
            return f"every window starts with {' '.join(self.starts_with)}"
        return "windows of the text as it is tokenized"


def evaluate_text(
    model: nn.Module,
    tokenizer: Any,
    text: EvaluationText,
    seqlen: int | None = None,
    *,
    windows: int | None = None,
    protocol: Protocol = "model",
    progress: bool = False,
) -> Evaluation:
    """`perplexity` of a model on a text, tokenized once and whole.

    protocol: "model": every window is the BOS and the next seqlen-1 tokens of the text, where the
    tokenizer puts a BOS by itself. Elsewhere, and by "paper": seqlen tokens of the text with its
    special tokens. seqlen: tokens a window; None: 2048, or the model's context where that is
    shorter. windows: at most so many, from the start of the text; None: all.
    Raises: as `perplexity` does; ValueError for another protocol, or windows below 1.
    """
    if seqlen is None:
        seqlen = min(MAX_SEQLEN, context_of(model) or MAX_SEQLEN)
    _check_seqlen(model, seqlen)
    if windows is not None and (not isinstance(windows, int) or windows < 1):
        raise ValueError(f"windows: expected a whole number from 1 on, or None, got {windows!r}")
    lead = leading_ids(tokenizer, protocol)
    encoded = tokenizer(text.text, add_special_tokens=not lead, verbose=False)
    ids = torch.tensor(encoded.input_ids, dtype=torch.int64)
    rows = list(torch.split(ids, seqlen - len(lead)))[:windows]
    if len(rows) > 1 and len(rows[-1]) < len(rows[0]):
        del rows[-1]
    starts = torch.tensor(lead, dtype=ids.dtype)
    read = torch.cat([part for row in rows for part in (starts, row)])
    value = perplexity(model, read, seqlen, progress=progress)
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    name = getattr(tokenizer, "name_or_path", "") or "unnamed"
    return Evaluation(
        perplexity=value,
        data=text.data,
        dataset=text.dataset,
        revision=text.revision,
        text_sha256=hashlib.sha256(text.text.encode()).hexdigest(),
        tokenizer=f"{type(tokenizer).__name__} {name}, {len(tokenizer)} tokens",
        tokens=ids.numel(),
        seqlen=seqlen,
        windows=len(rows),
        protocol=protocol,
        starts_with=tokenizer.convert_ids_to_tokens(lead),
        dtype=str(weight.dtype).removeprefix("torch."),
        device=str(weight.device),
    )


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
