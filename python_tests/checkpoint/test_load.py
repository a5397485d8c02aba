"""What transformers loads for us has all of its weights, and runs no code that came with them."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from edited import edit_tensors, ran, renamed, with_code, without
from models_24 import edit_json, logits, model_24, wide_model
from streamed import saved
from tiny_models import FAMILIES, tiny_model, token_ids
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from wanda_ext.checkpoint import KeysError, load_pretrained, load_tokenizer, save_pretrained

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
PARTS = [  # one of each kind that a Llama has
    K_PROJ,
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.2.input_layernorm.weight",
    "model.norm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
]
OUTSIDE = ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_checkpoints_load(family: str, tmp_path: Path) -> None:
    """Tied weights are stored once, and buffers that are computed never."""
    src = saved(tmp_path / "src", family)
    model, unexpected = load_pretrained(src)
    assert unexpected == []
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, tiny_model(family)(token_ids()).logits)


@pytest.mark.parametrize("name", PARTS)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    src = without(saved(tmp_path / "src"), name)
    with pytest.raises(KeysError, match=f"src lacks 1 .* LlamaForCausalLM has: {name};"):
        load_pretrained(src)


def test_a_renamed_tensor_is_named_by_both_names(tmp_path: Path) -> None:
    src = renamed(saved(tmp_path / "src"), K_PROJ, K_PROJ.replace("k_proj", "k_prok"))
    with pytest.raises(KeysError, match=f"{K_PROJ}.*no place for.*k_prok") as told:
        load_pretrained(src)
    assert "\n" not in str(told.value)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path, caplog: Any) -> None:
    src = edit_tensors(saved(tmp_path / "src"), lambda t: t | {"model.norm.weight": torch.ones(65)})
    with pytest.raises(KeysError, match=r"model.norm.weight is stored as \[65\].* has \[64\]"):
        load_pretrained(src)
    assert "LOAD REPORT" not in caplog.text  # the error says it all


def test_a_tensor_without_a_place_is_told(tmp_path: Path, caplog: Any) -> None:
    src = edit_tensors(saved(tmp_path / "src"), lambda t: t | {"extra.weight": torch.ones(2)})
    _, unexpected = load_pretrained(src)
    assert unexpected == ["extra.weight"] and "LOAD REPORT" not in caplog.text


def test_files_that_are_no_safetensors_are_checked_too(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    tensors = dict(model.state_dict())
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert load_pretrained(tmp_path)[1] == []
    del tensors[K_PROJ]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(KeysError, match=K_PROJ):
        load_pretrained(tmp_path)


def test_an_adapters_model_is_checked_too(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra [finetune] is not installed")
    base = saved(tmp_path / "base")
    model, _ = load_pretrained(base)
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, _ = load_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, adapted(token_ids()).logits)
    without(base, "model.norm.weight")
    with pytest.raises(KeysError, match=r"base lacks 1 .*: model\.norm\.weight;"):
        load_pretrained(tmp_path / "adapter")


# --- Packed ones, by transformers' own from_pretrained --------------------------------------------


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("pattern", ["2:4", "mixed"])
def test_packed_checkpoints_lack_nothing(pattern: str, name: str, tmp_path: Path) -> None:
    model = model_24("llama") if pattern == "2:4" else wide_model(pattern)
    save_pretrained(model, tmp_path / "packed", packed=True)
    without(tmp_path / "packed", name)
    with pytest.raises(ValueError, match=f"packed lacks 1 .* LlamaForCausalLM has: {name};"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with pytest.raises(KeysError, match=name):
        load_pretrained(tmp_path / "packed")


def test_a_packed_linear_lacks_no_bias(tmp_path: Path) -> None:
    save_pretrained(model_24("opt"), tmp_path / "packed", packed=True)
    name = "model.decoder.layers.0.fc1.bias"
    without(tmp_path / "packed", name)
    with pytest.raises(ValueError, match=name):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_a_packed_model_gets_another_head(tmp_path: Path) -> None:
    save_pretrained(model_24("llama"), tmp_path / "packed", packed=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert "tie_weights" not in vars(model)
    without(tmp_path / "packed", "model.norm.weight")
    with pytest.raises(ValueError, match=r"lacks 1 .*: model\.norm\.weight;"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("family", ["gpt2", "opt"])  # their embeddings are tied
def test_packed_ones_with_tied_weights_load(family: str, tmp_path: Path) -> None:
    model = model_24(family)
    save_pretrained(model, tmp_path / "packed", packed=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


# --- Code that came with a checkpoint -------------------------------------------------------------


@pytest.fixture
def says_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks gets "y" from stdin, but nobody may."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))


@pytest.mark.usefixtures("says_yes")
def test_code_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    src = with_code(saved(tmp_path / "src"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_pretrained(src)
    assert not ran(src)
    model, _ = load_pretrained(src, trust_remote_code=True)
    assert type(model).__name__ == "Model" and ran(src)


@pytest.mark.usefixtures("says_yes")
def test_a_tokenizers_code_too(tmp_path: Path) -> None:
    src = with_code(saved(tmp_path / "src"), model=False)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(src)
    assert not ran(src)
    load_tokenizer(src, trust_remote_code=True)
    assert ran(src)


def test_a_custom_generate_does_not_run(tmp_path: Path) -> None:
    src = saved(tmp_path / "src")
    (src / "custom_generate").mkdir()
    code = f"import pathlib\npathlib.Path({str(src)!r}, 'ran').touch()\ndef generate(*a): pass\n"
    (src / "custom_generate" / "generate.py").write_text(code)
    load_pretrained(src)
    assert not ran(src)


def test_a_class_that_transformers_has_needs_no_code(tmp_path: Path) -> None:
    src = with_code(saved(tmp_path / "src"))
    edit_json(src / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    model, _ = load_pretrained(src)
    assert type(model).__name__ == "LlamaForCausalLM" and not ran(src)


LOADS = re.compile(r"\b[Aa]uto\w*\.from_pretrained\(")


def test_nothing_else_loads() -> None:
    """A fault here is a place that fills in random numbers, or asks whether code may run."""
    root = Path(__file__).parents[2]
    own = {"wanda_ext/checkpoint/load.py", "wanda_ext/report/commands.py"}  # it prints the call
    paths = [*root.glob("wanda_ext/**/*.py"), *root.glob("benchmarks/*.py")]
    found = {
        path.relative_to(root).as_posix()
        for path in paths
        if LOADS.search(path.read_text(encoding="utf-8"))
    }
    assert found == own
