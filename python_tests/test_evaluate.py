"""Perplexity against the written protocol, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from wanda_ext.evaluate import evaluation_text, perplexity

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
    assert "lambda" in evaluation_text("builtin")
    path = tmp_path / "text.txt"
    path.write_text("a text\n", encoding="utf-8")
    assert evaluation_text(str(path)) == "a text\n"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        evaluation_text(str(path))
    with pytest.raises(ValueError, match="'builtin', 'wikitext2' or a text file, got 'nowhere'"):
        evaluation_text("nowhere")
