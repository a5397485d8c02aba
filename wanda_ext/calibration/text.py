"""Windows of text: documents from files, datasets and the Hub, tokenized and cut to length.

Where a tokenizer puts a BOS by itself, its model was trained on text that starts with one, and
reads text without it much worse. So every window starts with it (protocol "model"); the papers'
code cuts the tokenized text as it comes (protocol "paper").
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm.auto import tqdm

from wanda_ext.checkpoint import load_tokenizer

Protocol = Literal["model", "paper"]

POOL = 4  # "concat" draws its windows from this many times as many
PIECE = 1 << 16  # characters of a text file that are tokenized at a time
SHOWN_AFTER = 2.0  # seconds: a bar for what takes longer
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
    protocol: Protocol = "model",
    trust_remote_code: bool = False,
    progress: bool = False,
) -> list[list[int]]:
    """`nsamples` windows of `seqlen` token ids, drawn with `seed`; never padded.

    From "c4", as the original does, one random window of one document longer than a window each;
    else from the documents joined by the end-of-text token. Protocol "model": the first id of a
    window is the BOS, where the tokenizer puts one (see `leading_ids`); a dataset's own ids are
    not changed. Raises TypeError (not a source of text) or ValueError (too little of it, a file or
    dataset that is not there, no tokenizer).
    """
    documents = iter(_texts(calib, seed))
    first = next(documents, None)
    documents = itertools.chain([] if first is None else [first], documents)
    lead: list[int] = []
    long = isinstance(calib, str) and calib == "c4"
    if first is not None and not _is_ids(first):
        encode = _tokenizer(tokenizer, trust_remote_code)
        lead = leading_ids(encode, protocol)
        documents = _encoded(documents, encode, special=long and not lead)
    body = seqlen - len(lead)
    if body < 1:
        raise ValueError(f"seqlen={seqlen} has no room for text beside the BOS: pass 2 or more")
    needed = nsamples if long else POOL * nsamples * body
    unit = "window" if long else "token"
    with tqdm(
        total=needed, desc="tokenizing", unit=unit, delay=SHOWN_AFTER, disable=not progress
    ) as bar:
        cut = _long_windows if long else _concat_windows
        rows = cut(documents, nsamples, body, random.Random(seed), bar.update)
    return [lead + row for row in rows]


def leading_ids(tokenizer: Any, protocol: str) -> list[int]:
    """The ids that start every window: [BOS] where the tokenizer puts one by itself, else none.

    None by the protocol "paper".
    """
    check_protocol(protocol)
    bos = getattr(tokenizer, "bos_token_id", None)
    if protocol == "paper" or bos is None:
        return []
    first = list(tokenizer("a")["input_ids"][:1])
    return first if first == [bos] else []


def check_protocol(protocol: str) -> None:
    """Raises ValueError for a word that is no protocol."""
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol must be 'model' or 'paper', not {protocol!r}")


def _long_windows(
    documents: Iterator[Any],
    nsamples: int,
    seqlen: int,
    rng: random.Random,
    done: Callable[[int], Any],
) -> list[list[int]]:
    rows: list[list[int]] = []
    for document in documents:
        ids = [int(token) for token in document]
        if len(ids) > seqlen:
            start = rng.randint(0, len(ids) - seqlen - 1)
            rows.append(ids[start : start + seqlen])
            done(1)
        if len(rows) == nsamples:
            return rows
    raise _too_little(len(rows), nsamples, seqlen)


def _concat_windows(
    documents: Iterator[Any],
    nsamples: int,
    seqlen: int,
    rng: random.Random,
    done: Callable[[int], Any],
) -> list[list[int]]:
    """Non-overlapping windows, drawn from a bounded start of the text: a stream may be endless."""
    stream: list[int] = []
    for document in documents:
        ids = [int(token) for token in document]
        stream += ids
        done(len(ids))
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


def _is_ids(document: Any) -> bool:
    """Whether a dataset's document is tokenized already; else it is text, or its pieces."""
    return not isinstance(document, (str, _Pieces))


def _encoded(
    documents: Iterator[Any], encode: Callable[..., Any], special: bool
) -> Iterator[list[int]]:
    """Token ids document by document, a long one piece by piece.

    special: as the tokenizer puts special tokens around a document by itself (of "c4" the original
    takes windows of such encodings); else the end-of-text token follows each.
    """
    eos = getattr(encode, "eos_token_id", None)
    end = [] if special or eos is None else [eos]
    for document in documents:
        for text in document.texts if isinstance(document, _Pieces) else [document]:
            yield list(encode(text, add_special_tokens=special, verbose=False)["input_ids"])
        yield end


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


@dataclass(frozen=True)
class _Pieces:
    """A long document, in pieces that end with a line."""

    texts: Iterable[str]


def _file_texts(path: Path) -> Iterator[Any]:
    if path.suffix not in FILES:
        raise ValueError(
            f"calib={str(path)!r}: pass a {', '.join(FILES)} file, not {path.suffix!r}"
        )
    if path.suffix == ".txt":
        yield _Pieces(_lines_of(path))
        return
    with _reading(path):
        if path.stat().st_size:
            import datasets

            options = {"data_files": str(path), "split": "train", "streaming": True}
            yield from _column(datasets.load_dataset(FILES[path.suffix], **options))


def _lines_of(path: Path) -> Iterator[str]:
    with _reading(path), path.open(encoding="utf-8") as file:
        while lines := file.readlines(PIECE):
            yield "".join(lines)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
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
