"""The demo's path on a model of five training steps, and the claims that hold for any model."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

from wanda_ext.cli import demo
from wanda_ext.cli.demo import draw
from wanda_ext.cli.demo_model import DemoSettings, cached_model, scale_channels_, split_text

TINY = DemoSettings(
    hidden=32, intermediate=64, layers=2, heads=2, vocabulary=300, seqlen=32, steps=5, nsamples=2
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of its own, so that every run trains."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(directory))
        yield directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[demo.DemoResult, Path, list[str]]:
    out, said = tmp_path_factory.mktemp("demo"), []
    return demo.run(out, TINY, say=said.append), out, said


def test_no_held_out_paragraph_was_trained_on() -> None:
    train, held_out = (set(text.split("\n\n")) for text in split_text())
    assert len(held_out) > 100
    assert not train & held_out


def test_scaling_channels_leaves_the_function_alone() -> None:
    model, tokenizer = cached_model(TINY)
    scaled = copy.deepcopy(model)
    scale_channels_(scaled, seed=0)
    ids = torch.tensor([tokenizer("for name in names: print(name)").input_ids])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, scaled(ids).logits)
    ratio = (
        scaled.model.layers[0].input_layernorm.weight / model.model.layers[0].input_layernorm.weight
    )
    assert torch.equal(ratio.log2(), ratio.log2().round())
    assert ratio.unique().numel() > 3


def test_wanda_keeps_its_masks_and_magnitude_does_not(
    finished: tuple[demo.DemoResult, Path, list[str]],
) -> None:
    result, _, _ = finished
    assert result.masks_changed["wanda"] == 0
    assert result.masks_changed["magnitude"] > 0
    assert result.dense["trained"] == result.dense["scaled"]
    for by_method in zip(
        result.pruned["trained"].values(), result.pruned["scaled"].values(), strict=True
    ):
        trained, scaled = by_method
        assert trained["wanda"] == scaled["wanda"]


def test_what_it_says_and_writes(finished: tuple[demo.DemoResult, Path, list[str]]) -> None:
    result, out, said = finished
    written = json.loads((out / "results.json").read_text())
    assert written["pruned"] == result.pruned
    text = "\n".join(said)
    for sparsity in demo.SPARSITIES:
        assert f"{result.pruned['scaled'][sparsity]['magnitude']:.2f}" in text
    dense, packed = result.linear_bytes
    assert packed / dense == (16 + 1) / 32  # fp32 halves, and 2 bytes for 16 columns
    assert result.largest_difference == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out / demo.PACKED)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "SparseLinear24"


def test_the_model_is_trained_once(cache: Path) -> None:
    (directory,) = [path for path in (cache / "wanda_ext").iterdir() if path.is_dir()] or [None]
    model, _ = cached_model(TINY)
    stored = next(path for path in directory.rglob("*.safetensors"))
    before = stored.stat().st_mtime_ns
    cached_model(TINY)
    assert stored.stat().st_mtime_ns == before
    again, _ = cached_model(TINY, retrain=True)
    assert stored.stat().st_mtime_ns > before
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pruned = {"2:4": {"magnitude": 3.0, "wanda": 2.0}}
    said = draw(
        {"trained": 1.0, "scaled": 1.0}, {"trained": pruned, "scaled": pruned}, tmp_path / "a.png"
    )
    assert said == f"Plot: {tmp_path / 'a.png'}"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_says_how_to_get_the_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in draw({}, {}, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
