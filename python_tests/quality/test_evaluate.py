"""Perplexity against the written protocol, the texts and where they come from; what is refused."""

from __future__ import annotations

import hashlib
import math
import platform
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from tiny_models import tiny_model, tiny_tokenizer

from wanda_ext.quality.evaluate import EvaluationText, evaluate_text, evaluation_text, perplexity

VOCABULARY, CONTEXT = 64, 32


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,  # so that windows differ
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (3 * 16 + 5,), generator=torch.Generator().manual_seed(1))


def protocol(model: Any, ids: torch.Tensor, seqlen: int) -> float:
    """lib/eval.py of the original, target by target."""
    windows = len(ids) // seqlen
    means = []
    for i in range(windows):
        window = ids[i * seqlen : (i + 1) * seqlen]
        with torch.no_grad():
            log_p = model.eval()(window[None]).logits[0].double().log_softmax(-1)
        means.append(sum(-log_p[t, window[t + 1]].item() for t in range(seqlen - 1)) / (seqlen - 1))
    return math.exp(sum(means) / windows)


def test_follows_the_protocol(model: Any, ids: torch.Tensor) -> None:
    expected = protocol(model, ids, 16)
    assert perplexity(model, ids, 16) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, ids[None].int(), 16) == pytest.approx(expected, rel=1e-5)


def reference(model: Any, ids: torch.Tensor, seqlen: int) -> float:
    """The same by the steps of the original, in its fp32: each window's mean loss times seqlen."""
    windows = ids.numel() // seqlen
    losses = []
    for i in range(windows):
        window = ids[None, i * seqlen : (i + 1) * seqlen]
        with torch.no_grad():
            logits = model(window).logits[:, :-1, :].contiguous()
        targets = window[:, 1:].reshape(-1)
        mean = torch.nn.CrossEntropyLoss()(logits.reshape(-1, logits.shape[-1]), targets)
        losses.append(mean.float() * seqlen)
    return torch.exp(torch.stack(losses).sum() / (windows * seqlen)).item()


@pytest.mark.parametrize("seqlen", [16, 24, 32])
def test_equals_the_references_steps(model: Any, ids: torch.Tensor, seqlen: int) -> None:
    expected = reference(model.eval(), ids, seqlen)
    assert perplexity(model, ids, seqlen) == pytest.approx(expected, rel=1e-6)


def test_drops_the_tail_and_overlaps_nothing(model: Any, ids: torch.Tensor) -> None:
    assert perplexity(model, ids, 16) == perplexity(model, ids[:48], 16)
    singles = [math.log(perplexity(model, ids[i : i + 16], 16)) for i in (0, 16, 32)]
    assert math.log(perplexity(model, ids, 16)) == pytest.approx(sum(singles) / 3, rel=1e-6)
    assert len(set(singles)) == 3


def test_leaves_the_mode_as_it_was(model: Any, ids: torch.Tensor) -> None:
    model.train()
    model.model.layers[0].eval()  # a part frozen on its own stays so
    perplexity(model, ids, 16)
    assert model.training and not model.model.layers[0].training
    model.eval()


@pytest.mark.parametrize(
    ("bad_ids", "seqlen", "kind", "words"),
    [
        ([1, 2, 3], 2, TypeError, "expected a tensor"),
        (torch.zeros(40), 16, TypeError, "integer dtype, got torch.float32"),
        (torch.zeros(2, 40, dtype=torch.long), 16, ValueError, r"\[tokens\] or \[1, tokens\]"),
        (torch.zeros(15, dtype=torch.long), 16, ValueError, "at least one window of seqlen=16"),
        (torch.full((40,), VOCABULARY), 16, ValueError, "the model's own tokenizer"),
        (torch.full((40,), -1), 16, ValueError, "the model's own tokenizer"),
        (torch.zeros(40, dtype=torch.long), 1, ValueError, "at least 2"),
        (torch.zeros(40, dtype=torch.long), 16.0, TypeError, "expected an int"),
        (torch.zeros(80, dtype=torch.long), 33, ValueError, "context of 32 tokens, got 33"),
    ],
)
def test_refuses(model: Any, bad_ids: Any, seqlen: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        perplexity(model, bad_ids, seqlen)


def test_refuses_weights_that_are_not_loaded(model: Any, ids: torch.Tensor) -> None:
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(model.config)
    with pytest.raises(ValueError, match="meta device"):
        perplexity(empty, ids, 16)


def test_names_the_window_whose_loss_is_not_finite(model: Any, ids: torch.Tensor) -> None:
    broken = transformers.LlamaForCausalLM(model.config)
    token = ids[20]
    assert token not in ids[:16]
    with torch.no_grad():
        broken.model.embed_tokens.weight[token] = math.nan
    with pytest.raises(ValueError, match="loss in window 1 of 3 is nan"):
        perplexity(broken, ids, 16)


def test_texts(tmp_path: Path) -> None:
    builtin = evaluation_text("builtin")
    assert "lambda" in builtin.text and platform.python_version() in builtin.revision
    path = tmp_path / "text.txt"
    path.write_bytes(b"a text\n")
    text = evaluation_text(str(path))
    assert (text.text, text.dataset) == ("a text\n", "text.txt")
    assert text.revision == f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        evaluation_text(str(path))
    with pytest.raises(ValueError, match="'builtin', 'wikitext2' or a text file, got 'nowhere'"):
        evaluation_text("nowhere")


COMMIT = "0123456789abcdef0123456789abcdef01234567"
LINES = ["", " = Title = \n", " A line. \n"]


@pytest.fixture
def cached_wikitext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache that `datasets` leaves behind a download, of LINES, and no network."""
    name = "Salesforce___wikitext/wikitext-2-raw-v1/0.0.0"
    folder = tmp_path / name / COMMIT
    folder.mkdir(parents=True)
    rows = datasets.Dataset.from_dict({"text": LINES})
    with datasets.arrow_writer.ArrowWriter(
        path=str(folder / "wikitext-test.arrow"), features=rows.features
    ) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    info = datasets.DatasetInfo(
        features=rows.features,
        builder_name="parquet",
        dataset_name="wikitext",
        config_name="wikitext-2-raw-v1",
        version="0.0.0",
        splits={"test": {"name": "test", "num_bytes": 99, "num_examples": 3, "dataset_name": None}},
    )
    info.write_to_directory(str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("cached_wikitext")
def test_wikitext2_is_the_hubs_test_part_and_tells_its_commit() -> None:
    found = evaluation_text("wikitext2")
    assert found.text == "\n\n".join(LINES)
    assert found.revision == f"commit {COMMIT}"
    assert found.dataset == "Salesforce/wikitext wikitext-2-raw-v1 test"


def test_an_evaluation_tells_what_it_depends_on(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"word{i}" for i in range(60)))
    model, tokenizer = tiny_model(dtype=torch.bfloat16), tiny_tokenizer()
    found = evaluate_text(model, tokenizer, evaluation_text(str(path)))
    ids = torch.tensor(tokenizer(path.read_text()).input_ids)
    assert found.perplexity == perplexity(model, ids, 64)
    assert (found.seqlen, found.windows, found.tokens) == (64, ids.numel() // 64, ids.numel())
    assert (found.dtype, found.device) == ("bfloat16", "cpu")
    assert found.text_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    printed = str(found)
    for told in ("windows of 64 tokens", found.revision, " unnamed, 99 tokens", "bfloat16 on"):
        assert told in printed
    shorter = evaluate_text(model, tokenizer, evaluation_text(str(path)), 16)
    assert shorter.perplexity == perplexity(model, ids, 16) and shorter.windows > found.windows


def test_windows_of_a_text_start_as_the_model_expects(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"word{i}" for i in range(60)))
    text = evaluation_text(str(path))
    model, tokenizer = tiny_model(), tiny_tokenizer(bos=True)
    ids = torch.tensor(tokenizer(text.text, add_special_tokens=False).input_ids)
    body = [row for row in ids.split(31) if len(row) == 31]
    read = torch.cat([torch.cat([torch.tensor([tokenizer.bos_token_id]), row]) for row in body])
    found = evaluate_text(model, tokenizer, text, 32)
    assert found.perplexity == perplexity(model, read, 32)
    assert (found.windows, found.protocol, found.starts_with) == (len(body), "model", ["<s>"])
    assert "every window starts with <s>" in str(found)
    first = evaluate_text(model, tokenizer, text, 32, windows=2)
    assert first.perplexity == perplexity(model, read[:64], 32) and first.windows == 2
    paper = evaluate_text(model, tokenizer, text, 32, protocol="paper")
    whole = torch.tensor(tokenizer(text.text).input_ids)
    assert paper.perplexity == perplexity(model, whole, 32)
    assert (paper.starts_with, paper.protocol) == ([], "paper")
    with pytest.raises(ValueError, match="windows: expected a whole number from 1 on"):
        evaluate_text(model, tokenizer, text, 32, windows=0)
    with pytest.raises(ValueError, match="protocol must be 'model' or 'paper'"):
        evaluate_text(model, tokenizer, text, 32, protocol="none")
    with pytest.raises(ValueError, match="at least one window of seqlen=64 tokens, got 1"):
        evaluate_text(model, tokenizer, EvaluationText("x", "x", "x", ""), 64)
