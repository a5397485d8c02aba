"""convert: packed to dense and back, byte for byte, from files alone."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from models_24 import (
    CONFIGS,
    PATTERNS,
    WIDE,
    dense_model,
    digests,
    edit_json,
    logits,
    model_24,
    wide_model,
)
from streamed import assert_same_tensors, tensors_of
from transformers import AutoModelForCausalLM

from wanda_ext.checkpoint.convert import convert
from wanda_ext.checkpoint.reader import INDEX
from wanda_ext.checkpoint.save import save_pretrained, swap_linears
from wanda_ext.files.directory import MARKER
from wanda_ext.packed.formats import pack


def entry_of(folder):
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


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


@pytest.mark.parametrize("shard", ["5GB", "30KB"])  # 30 KB parts weights from masks and lists
@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bitmaps_save_load_and_convert_byte_identically(pattern, family, shard, tmp_path):
    model = wide_model(pattern, family)
    model.save_pretrained(tmp_path / "dense", max_shard_size=shard)
    outcome = swap_linears(model)
    model.save_pretrained(tmp_path / "packed", max_shard_size=shard)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_state_dict(copy.deepcopy(loaded.state_dict()))
    loaded.save_pretrained(tmp_path / "loaded", max_shard_size=shard)
    save_pretrained(loaded, tmp_path / "unpacked", max_shard_size=shard)
    assert convert(tmp_path / "dense", tmp_path / "to packed", "packed") == outcome
    assert set(convert(tmp_path / "packed", tmp_path / "to dense", "dense").values()) == {"dense"}
    convert(tmp_path / "to dense", tmp_path / "again", "packed")
    convert(tmp_path / "to packed", tmp_path / "dense again", "dense")

    packed, dense = digests(tmp_path / "packed"), digests(tmp_path / "dense")
    assert digests(tmp_path / "again") == packed
    assert digests(tmp_path / "dense again") == dense
    if shard == "5GB":  # save_pretrained parts other tensors, and loaded ones, in another way
        assert digests(tmp_path / "loaded") == digests(tmp_path / "to packed") == packed
        assert digests(tmp_path / "unpacked") == digests(tmp_path / "to dense") == dense
    else:
        files = json.loads((tmp_path / "packed" / INDEX).read_text())["weight_map"]
        assert any(files[n] != files[n[:-4] + "weight"] for n in files if n.endswith(".mask"))
        for made in ("packed", "dense"):
            told = [
                json.loads((tmp_path / name / INDEX).read_text())["metadata"]
                for name in (made, f"to {made}")
            ]
            assert all(told[0][key] == told[1][key] for key in told[0])
    for name in ("loaded", "again", "to packed"):
        assert_same_tensors(tmp_path / name, tmp_path / "packed")
        assert entry_of(tmp_path / name) == entry_of(tmp_path / "packed")
    for name in ("unpacked", "to dense", "dense again"):
        assert_same_tensors(tmp_path / name, tmp_path / "dense")
        assert entry_of(tmp_path / name) is None


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_entry_tells_formats_and_surplus(pattern, family, tmp_path):
    save_pretrained(wide_model(pattern, family), tmp_path / "packed", packed=True)
    entry, tensors = entry_of(tmp_path / "packed"), tensors_of(tmp_path / "packed")
    assert entry["format_version"] == 2 and list(entry["dense"]) == ["lm_head"]
    modules, bitmap = entry["modules"], entry["bitmap"]
    assert all("mlp" in name for name in modules) and bool(modules) == (pattern == "mixed")
    assert set(entry["transposed"]) == ({*modules, *bitmap} if family == "gpt2" else set())
    assert {f"{name}.meta" for name in modules} == {n for n in tensors if n.endswith(".meta")}
    assert {f"{name}.mask" for name in bitmap} == {n for n in tensors if n.endswith(".mask")}
    for name, surplus in bitmap.items():
        stored = tensors.get(f"{name}.surplus_values", ())
        assert len(stored) == surplus and bool(surplus) == (pattern != "16:32"), name


def test_what_is_not_pruned_stays_dense(tmp_path):
    model = model_24("opt")
    model.model.decoder.layers[1].fc2.weight.data[:] = 1.0
    model.save_pretrained(tmp_path / "dense")
    outcome = convert(tmp_path / "dense", tmp_path / "packed")
    reason = (
        "not 2:4: row 0, columns 0 to 3 hold 4 non-zeros; not pruned: 0.0% of its first 64 rows is "
        "zero"
    )
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
        (tmp_path / "dense", out, "packed", r"convert: .*none of the 15 linears can be packed"),
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


def test_each_linear_is_packed_twice_to_look_and_to_write(tmp_path, monkeypatch):
    model = wide_model("50%")
    save_pretrained(model, tmp_path / "dense")
    packed: list[torch.Tensor] = []
    module = sys.modules["wanda_ext.checkpoint.convert"]  # the package's attribute is the function
    monkeypatch.setattr(module, "pack", lambda w: packed.append(w) or pack(w))
    outcome = convert(tmp_path / "dense", tmp_path / "packed")
    assert len(packed) <= 2 * len(outcome)


@pytest.mark.parametrize("change", ["named", "left out"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_transposed_is_the_models_to_say(family, change, tmp_path):
    """A square weight tells nothing by its shape."""
    src = tmp_path / "packed"
    save_pretrained(model_24(family), src, packed=True)
    entry = entry_of(src)
    square = (
        "model.layers.0.self_attn.q_proj" if family == "llama" else "transformer.h.0.attn.c_proj"
    )
    turned = set(entry["transposed"])
    assert (square in turned) == (family == "gpt2")
    if (change == "named") == (square in turned):
        pytest.skip("it is so already")
    entry["transposed"] = sorted(turned ^ {square})
    edit_json(src / "config.json", quantization_config=entry)
    with pytest.raises(ValueError, match=f"config.json .*transposed.*{square}"):
        convert(src, tmp_path / "dense", "dense")
    assert not (tmp_path / "dense").exists()
