"""Windows of text: documents from files, datasets and the Hub, tokenized and cut to length."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wanda_ext.checkpoint import load_tokenizer

POOL = 4  # "concat" draws its windows from this many times as many
TEXT_COLUMNS = ("text", "content", "document", "prompt")
FILES = {".txt": "", ".jsonl": "json", ".parquet": "parquet"}
KEYWORDS = ("builtin", "c4", "wikitext2")
SOURCES = (
    "a list of texts, token ids [nsamples, seqlen], a list of batches (dicts of tensors), a "
    f"Dataset, a DataLoader, or a string: one of {', '.join(map(repr, KEYWORDS))}, the path of a "
    f"{', '.join(FILES)} file, or the id of a dataset on the Hub"
)


def text_windows(
    calib: Any,
    tokenizer: Any,
    nsamples: int,
    seqlen: int,
    seed: int,
    trust_remote_code: bool = False,
) -> list[list[int]]:
    """`nsamples` windows of `seqlen` token ids, drawn with `seed`; never padded.

    From "c4", as the original does, one random window of one document longer than `seqlen` each;
    else from the documents joined by the end-of-text token. Raises TypeError (not a source of
    text) or ValueError (too little of it, a file or dataset that is not there, no tokenizer).
    """
    cut = _long_windows if isinstance(calib, str) and calib == "c4" else _concat_windows
    documents = _documents(calib, tokenizer, seed, trust_remote_code)
    return cut(documents, nsamples, seqlen, random.Random(seed))


def _long_windows(
    documents: Iterator[list[int]], nsamples: int, seqlen: int, rng: random.Random
) -> list[list[int]]:
    rows: list[list[int]] = []
    for ids in documents:
        if len(ids) > seqlen:
            start = rng.randint(0, len(ids) - seqlen - 1)
            rows.append(ids[start : start + seqlen])
        if len(rows) == nsamples:
            return rows
    raise _too_little(len(rows), nsamples, seqlen)


def _concat_windows(
    documents: Iterator[list[int]], nsamples: int, seqlen: int, rng: random.Random
) -> list[list[int]]:
    """Non-overlapping windows, drawn from a bounded start of the text: a stream may be endless."""
    stream: list[int] = []
    for ids in documents:
        stream += ids
        if len(stream) >= POOL * nsamples * seqlen:
            break
    found = min(POOL * nsamples, len(stream) // seqlen)
    if found < nsamples:
        raise _too_little(found, nsamples, seqlen)
    starts = [window * seqlen for window in sorted(rng.sample(range(found), nsamples))]
    return [stream[start : start + seqlen] for start in starts]


def _too_little(found: int, nsamples: int, seqlen: int) -> ValueError:
    return ValueError(
        f"too little calibration text: found {found} windows of {seqlen} tokens, need {nsamples}. "
        "Pass more text, a smaller nsamples or a smaller seqlen"
    )


def _documents(calib: Any, tokenizer: Any, seed: int, trust: bool) -> Iterator[list[int]]:
    """Token ids document by document."""
    encode: Callable[..., Any] | None = None
    end: list[int] = []
    for document in _texts(calib, seed):
        if not isinstance(document, str):  # a dataset that is tokenized already
            yield [int(token) for token in document]
            continue
        if encode is None:
            encode = _tokenizer(tokenizer, trust)
            eos = getattr(encode, "eos_token_id", None)
            end = [] if eos is None else [eos]
        # Of "c4" the original takes windows of encodings with their special tokens.
        special = isinstance(calib, str) and calib == "c4"
        ids = encode(document, add_special_tokens=special, verbose=False)["input_ids"]
        yield list(ids) if special else [*ids, *end]


def _tokenizer(tokenizer: Any, trust: bool) -> Callable[..., Any]:
    if isinstance(tokenizer, (str, Path)):
        try:
            tokenizer = load_tokenizer(tokenizer, trust_remote_code=trust)
        except (OSError, ValueError) as error:
            first, *more = str(error).splitlines()
            code = [line for line in more if "trust_remote_code" in line]
            raise ValueError(
                f"text needs a tokenizer, and none could be loaded from {str(tokenizer)!r} "
                f"({' '.join([first, *code])}): pass tokenizer="
            ) from error
    if not callable(tokenizer):
        raise TypeError(f"text needs a tokenizer, not {type(tokenizer).__name__}: pass tokenizer=")
    encode: Callable[..., Any] = tokenizer
    return encode


def _texts(calib: Any, seed: int) -> Iterator[Any]:
    datasets = sys.modules.get("datasets")  # an object of theirs exists only after their import
    if isinstance(calib, (str, Path)):
        yield from _named_texts(str(calib), seed)
    elif datasets and isinstance(calib, (datasets.Dataset, datasets.IterableDataset)):
        yield from _column(calib)
    elif isinstance(calib, (list, tuple)) and all(isinstance(text, str) for text in calib):
        yield from calib
    else:
        held = f" of {type(calib[0]).__name__}" if isinstance(calib, (list, tuple)) else ""
        raise TypeError(
            f"calib must be {SOURCES}; got {type(calib).__name__}{held}. Pass 'builtin' to try"
        )


def _named_texts(name: str, seed: int) -> Iterator[Any]:
    path = Path(name)
    if name == "builtin":
        from pydoc_data.topics import topics

        yield from dict.fromkeys(topics.values())
    elif name not in KEYWORDS and path.is_file():
        yield from _file_texts(path)
    elif name == "c4":
        shard = {"train": "en/c4-train.00000-of-01024.json.gz"}
        stream = _load("allenai/c4", data_files=shard, streaming=True)
        yield from _column(stream.shuffle(seed=seed, buffer_size=10_000))
    elif name == "wikitext2":
        yield from _column(_load("Salesforce/wikitext", "wikitext-2-raw-v1"))
    elif path.suffix in FILES or path.is_absolute():
        raise ValueError(f"calib={name!r}: there is no such file")
    else:
        yield from _column(_load(name, streaming=True))


def _file_texts(path: Path) -> Iterator[Any]:
    if path.suffix not in FILES:
        raise ValueError(
            f"calib={str(path)!r}: pass a {', '.join(FILES)} file, not {path.suffix!r}"
        )
    try:
        if path.suffix == ".txt":
            with path.open(encoding="utf-8") as file:
                while lines := file.readlines(1 << 20):  # a large file in pieces of a megabyte
                    yield "".join(lines)
        elif path.stat().st_size:
            import datasets

            options = {"data_files": str(path), "split": "train", "streaming": True}
            yield from _column(datasets.load_dataset(FILES[path.suffix], **options))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"calib={str(path)!r} cannot be read as {path.suffix} ({error})"
        ) from error


def _load(*source: str, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(*source, split="train", **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"calib={source[0]!r} could not be loaded as a dataset ({error}). A string must be one "
            f"of {', '.join(map(repr, KEYWORDS))}, an existing file, or the id of a dataset on the "
            "Hub; 'builtin' needs no network"
        ) from error


def _column(dataset: Any) -> Iterator[Any]:
    """The column of tokens, without those that an attention_mask hides, or else that of text."""
    rows = iter(dataset)
    first = next(rows, None)
    if first is None:
        return
    column = next((name for name in ("input_ids", *TEXT_COLUMNS) if name in first), None)
    if column is None:
        raise ValueError(
            f"the dataset has columns {sorted(first)}, none of them {', '.join(TEXT_COLUMNS)} or "
            "input_ids: rename the one that holds the text"
        )
    masked = column == "input_ids" and "attention_mask" in first
    for row in itertools.chain([first], rows):
        yield itertools.compress(row[column], row["attention_mask"]) if masked else row[column]
