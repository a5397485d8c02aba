"""convert: packed to dense and back, byte for byte, from files alone."""

from __future__ import annotations

import json

import pytest
import torch
from models_24 import CONFIGS, dense_model, digests, edit_json, logits, model_24
from transformers import AutoModelForCausalLM

from wanda_ext.checkpoint import save_pretrained, swap_linears
from wanda_ext.convert import convert
from wanda_ext.directory import MARKER


@pytest.mark.parametrize("shard", ["5GB", "50KB", "9KB"])  # 9 KB parts weights from their metadata
@pytest.mark.parametrize("family", CONFIGS)
def test_packed_dense_packed_is_byte_identical(family, shard, tmp_path):
    model = model_24(family, torch.bfloat16)
    expected = logits(model)
    save_pretrained(model, tmp_path / "own dense", max_shard_size=shard)
    outcome = swap_linears(model)
    model.save_pretrained(tmp_path / "packed", max_shard_size=shard)
    (tmp_path / "packed" / "tokenizer.json").write_text("{}")
    (tmp_path / "packed" / "templates").mkdir()
    (tmp_path / "packed" / "templates" / "a.jinja").write_text("a")
    (tmp_path / "packed" / "pytorch_model.bin").write_text("other weights")

    packed = {name for name, what in outcome.items() if what == "packed"}
    made_dense = convert(tmp_path / "packed", tmp_path / "dense", to="dense")
    assert made_dense == dict.fromkeys(sorted(packed), "dense")
    assert convert(tmp_path / "dense", tmp_path / "again", to="packed") == outcome
    for name in ("dense", "again"):
        assert (tmp_path / name / "templates" / "a.jinja").read_text() == "a"
        assert not (tmp_path / name / "pytorch_model.bin").exists()
        (tmp_path / name / "templates" / "a.jinja").unlink()
        (tmp_path / name / "templates").rmdir()
    (tmp_path / "packed" / "templates" / "a.jinja").unlink()
    (tmp_path / "packed" / "templates").rmdir()
    (tmp_path / "packed" / "pytorch_model.bin").unlink()
    assert digests(tmp_path / "again") == digests(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(loaded), expected)
    if shard == "5GB":
        dense, own = digests(tmp_path / "dense"), digests(tmp_path / "own dense")
        assert {name: dense[name] for name in own} == own


def test_a_shard_boundary_between_a_weight_and_its_metadata_is_tested(tmp_path):
    model = model_24("llama", torch.bfloat16)
    swap_linears(model)
    model.save_pretrained(tmp_path, max_shard_size="9KB")
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    metas = [name for name in files if name.endswith(".meta")]
    assert any(files[name] != files[name.removesuffix("meta") + "weight"] for name in metas)


def test_what_is_not_24_stays_dense(tmp_path):
    model = model_24("opt")
    model.model.decoder.layers[1].fc2.weight.data[3, :4] = 1.0
    model.save_pretrained(tmp_path / "dense")
    outcome = convert(tmp_path / "dense", tmp_path / "packed")
    reason = "not 2:4: row 3, columns 0 to 3 hold 4 non-zeros"
    assert outcome["model.decoder.layers.1.fc2"] == reason
    entry = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert entry["dense"]["model.decoder.layers.1.fc2"] == reason
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


@pytest.fixture
def packed(tmp_path):
    save_pretrained(model_24("llama"), tmp_path / "packed", packed=True)
    return tmp_path / "packed"


def test_refuses_before_it_writes(packed, tmp_path):
    out = tmp_path / "out"
    save_pretrained(dense_model("llama"), tmp_path / "dense")
    for src, dst, to, message in (
        (packed, out, "sparse", 'expected "packed" or "dense"'),
        (packed, out, "packed", "is packed already"),
        (tmp_path / "dense", out, "dense", "is dense already"),
        (tmp_path / "dense", out, "packed", r"no linear can be packed \(model\.layers"),
        (packed, packed, "dense", "overlap"),
        (packed, packed / "dense", "dense", "overlap"),
        (packed, tmp_path, "dense", "overlap"),
        (tmp_path / "none", out, "dense", "no such directory"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(src, dst, to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "packed"]


def test_refuses_a_foreign_target(packed, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"did not write \(mine\.txt\)"):
        convert(packed, tmp_path / "out", "dense")


def test_replaces_its_own_output(packed, tmp_path):
    convert(packed, tmp_path / "out", "dense")
    convert(packed, tmp_path / "out", "dense")
    files = json.loads((tmp_path / "out" / MARKER).read_text())["files"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files


def test_unknown_architecture_says_what_to_do(packed, tmp_path):
    convert(packed, tmp_path / "dense", "dense")
    edit_json(tmp_path / "dense" / "config.json", architectures=["OwnForCausalLM"])
    with pytest.raises(ValueError, match=r"no architecture 'OwnForCausalLM'; load the model and"):
        convert(tmp_path / "dense", tmp_path / "out", "packed")
