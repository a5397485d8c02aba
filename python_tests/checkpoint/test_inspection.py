"""Patterns, and a checkpoint's table read from its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models_24 import WIDE, wide_model
from streamed import tensors_of

import wanda_ext
from wanda_ext.checkpoint.inspection import (
    SCREEN,
    CheckpointSummary,
    inspect_checkpoint,
    pattern_of,
)
from wanda_ext.packed.formats import FORMATS


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ([[1, 2, 3, 4, 5, 6, 7, 8]], "dense"),
        ([[1, 2, 0, 0, 0, 6, 7, 0]], "2:4"),
        ([[0, 0, 0, 0, 0, 6, 7, 0]], "2:4"),
        ([[1, 2, 3, 0, 0, 6, 0, 0]], "4:8"),
        ([[1, 2, 3, 0, 5, 6, 0, 0]], "unstructured"),
        ([[1, 2, 0]], "unstructured"),
        ([[1] * 8 + [0] * 8], "8:16"),
        ([[0] * 16 + [1] * 16], "16:32"),
        ([[1] * 17 + [0] * 15], "unstructured"),
        ([[1] * 8 + [0] * 7], "unstructured"),
    ],
)
def test_pattern_of(rows: list[list[float]], pattern: str) -> None:
    assert pattern_of(torch.tensor(rows)) == pattern


def pruned_llama(blocks: int = 1) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config).bfloat16()
    wanda_ext.prune_model(model, None, "2:4", method="magnitude", swap=False, progress=False)
    return model


def test_dense_and_packed_checkpoints(tmp_path: Path) -> None:
    model = pruned_llama()
    wanda_ext.save_pretrained(model, tmp_path / "dense")
    wanda_ext.save_pretrained(model, tmp_path / "packed", packed=True)
    dense = {w.name: w for w in inspect_checkpoint(tmp_path / "dense").weights}
    packed = {w.name: w for w in inspect_checkpoint(tmp_path / "packed").weights}
    assert dense.keys() == packed.keys()
    assert len(dense) == 7 + 2  # linears, embedding, head
    for name, weight in dense.items():
        assert packed[name].shape == weight.shape
        assert packed[name].zeros == weight.zeros
        assert weight.nbytes == weight.dense_nbytes == packed[name].dense_nbytes
        if "layers" in name:
            assert (weight.pattern, packed[name].pattern) == ("2:4", "2:4 packed")
            assert weight.zeros == 0.5
            assert packed[name].nbytes * 16 == weight.nbytes * 9
        else:
            pattern = "-" if "embed" in name else "dense"
            assert (weight.pattern, packed[name].pattern) == (pattern, pattern)
            assert packed[name].nbytes == weight.nbytes
    text = str(inspect_checkpoint(tmp_path / "packed"))
    assert text.splitlines()[-1].startswith("9 weight matrices, ")
    assert "50.00%  2:4 packed" in text


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize(
    ("pattern", "told"), [("16:32", {"16:32"}), ("50%", {"unstructured"}), ("mixed", None)]
)
def test_bitmaps_are_told_with_their_bytes(
    pattern: str, told: set[str] | None, family: str, tmp_path: Path
) -> None:
    model = wide_model(pattern, family)
    wanda_ext.save_pretrained(model, tmp_path / "packed", packed=True)
    wanda_ext.save_pretrained(model, tmp_path / "dense")
    summary = inspect_checkpoint(tmp_path / "packed")
    dense = {w.name: w for w in inspect_checkpoint(tmp_path / "dense").weights}
    tensors = tensors_of(tmp_path / "packed")
    found = [w for w in summary.weights if w.pattern.endswith(" packed")]
    assert len(found) == (7 if family == "llama" else 4)
    assert {w.name for w in summary.weights} == dense.keys()
    for weight in found:
        stored = [f"{weight.name}.{part}" for kind in FORMATS for part in kind.TENSORS]
        own = {name: tensors[name].nbytes for name in stored if name in tensors}
        assert weight.nbytes == sum(own.values()) < weight.dense_nbytes * 0.65
        assert weight.dense_nbytes == dense[weight.name].nbytes
        assert weight.zeros == dense[weight.name].zeros == 0.5
        turned = family == "gpt2"
        assert weight.shape == dense[weight.name].shape[:: -1 if turned else 1]
        expected = "2:4" if pattern == "mixed" and "mlp" in weight.name else "unstructured"
        assert weight.pattern == f"{next(iter(told)) if told else expected} packed"
    total = sum(w.nbytes for w in summary.weights)
    last = str(summary).splitlines()[-1]
    assert last.startswith(f"{len(summary.weights)} weight matrices, {total} bytes, ")


def test_a_screen_holds_a_large_model(tmp_path: Path) -> None:
    """A line for all of a kind; where kinds are too many, for all of a pattern. str() has all."""
    model = pruned_llama(blocks=20)
    model.model.layers[3].mlp.up_proj.weight.data.fill_(1.0)
    wanda_ext.save_pretrained(model, tmp_path / "model")
    found = inspect_checkpoint(tmp_path / "model")
    lines = found.short().splitlines()
    kinds = [line.split("  ")[0] for line in lines[1:-1]]
    assert len(lines) == 1 + 7 + 1 + 2 + 1 and lines[-1] == str(found).splitlines()[-1]
    assert "model.layers.*.mlp.down_proj (20)" in kinds and "lm_head" in kinds
    assert "model.layers.*.mlp.up_proj (19)" in kinds and "model.layers.3.mlp.up_proj" in kinds
    assert len(str(found).splitlines()) == 20 * 7 + 2 + 2
    other = [replace(w, name=f"{w.name}.{'x' * i}") for i, w in enumerate(found.weights)]
    lines = CheckpointSummary(tuple(other), "a note").short().splitlines()
    patterns = {" ".join(line.split()[:2]): line.split()[5] for line in lines[1:-2]}
    assert patterns["several (139)"] == "2:4" and len(patterns) == 3
    assert lines[-2] == "a note" and len(lines) <= SCREEN


def test_embeddings_are_told_by_the_model(tmp_path: Path) -> None:
    """A padding row of zeros is no pattern. Where no model can be built, a line says so."""
    model = pruned_llama()
    model.model.embed_tokens.weight.data[0] = 0
    wanda_ext.save_pretrained(model, tmp_path / "model")
    found = inspect_checkpoint(tmp_path / "model")
    assert {w.name: w.pattern for w in found.weights}["model.embed_tokens"] == "-"
    assert found.note == ""
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"nobody_knows"'))
    found = inspect_checkpoint(tmp_path / "model")
    assert {w.name: w.pattern for w in found.weights}["model.embed_tokens"] == "unstructured"
    assert "embeddings are not told apart from linears: " in found.short()
    assert "nobody_knows" in str(found)


def test_transposed_weights_are_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    wanda_ext.prune_model(model, None, "2:4", method="magnitude", swap=False, progress=False)
    wanda_ext.save_pretrained(model, tmp_path / "out")
    patterns = {w.name: w.pattern for w in inspect_checkpoint(tmp_path / "out").weights}
    assert patterns["transformer.h.0.mlp.c_fc"] == "2:4 transposed"


def test_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such directory"):
        inspect_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"config\.json"):
        inspect_checkpoint(tmp_path)
