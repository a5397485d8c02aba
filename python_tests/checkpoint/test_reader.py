"""open_checkpoint: one clear error for each way a directory is not a checkpoint of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from models_24 import edit_json, model_24, wide_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wanda_ext.checkpoint.reader import INDEX, open_checkpoint
from wanda_ext.checkpoint.save import save_pretrained, swap_linears


@pytest.fixture
def sharded(tmp_path):
    model = model_24("llama")
    swap_linears(model)
    model.save_pretrained(tmp_path / "packed", max_shard_size="50KB")
    return tmp_path / "packed"


def test_reads_packed_and_dense(sharded, tmp_path):
    model = model_24("llama")
    model.save_pretrained(tmp_path / "dense")
    packed, dense = open_checkpoint(sharded), open_checkpoint(tmp_path / "dense")
    name = "model.layers.1.self_attn.k_proj"
    kinds = packed.packed_linears()
    assert len(kinds) == 14
    weight = kinds[name].unpack(packed.read_packed(name, kinds[name]))
    assert torch.equal(weight, model.get_submodule(name).weight)
    assert torch.equal(dense.read(f"{name}.weight"), model.get_submodule(name).weight)
    assert packed.index["weight_map"] == packed.files()
    assert dense.packed is None and dense.index is None and not dense.packed_linears()


def _map_to(file):
    def damage(folder):
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = file
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def _truncate(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def _foreign(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def _newer(folder):
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=entry | {"format_version": 3})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "model-00002.*is not a whole safetensors file"),
        (lambda d: sorted(d.glob("*.safetensors"))[0].unlink(), "model-00001.*is not a whole"),
        (lambda d: (d / INDEX).unlink(), f"has shards, but not their {INDEX}"),
        (lambda d: [f.unlink() for f in d.glob("model*")], r"has no model\.safetensors"),
        (lambda d: (d / INDEX).write_text("{"), f"{INDEX} cannot be read"),
        (lambda d: edit_json(d / INDEX, weight_map=None), "has no weight_map"),
        (_map_to("../other.safetensors"), "expected a .safetensors file beside it"),
        (_map_to("/etc/passwd"), "expected a .safetensors file beside it"),
        (_map_to("weights.bin"), "expected a .safetensors file beside it"),
        (lambda d: (d / "config.json").unlink(), r"config\.json cannot be read"),
        (lambda d: (d / "config.json").write_text("[]"), "not a JSON object"),
        (lambda d: edit_json(d / "config.json", quantization_config=None), "restore its config"),
        (_foreign, "quantized by 'gptq'"),
        (_newer, "format_version 3, this wanda_ext reads 1 and 2"),
    ],
)
def test_damage_is_named(damage, message, sharded):
    damage(sharded)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(sharded)


def test_a_tensor_that_no_file_holds_is_named(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["extra.weight"] = index["weight_map"]["lm_head.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lists extra\.weight, which no file holds"):
        open_checkpoint(sharded)


# --- Bitmaps: the same errors from files and from transformers ------------------------------------


@pytest.fixture(scope="module")
def saved_mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "model"
    save_pretrained(wide_model("mixed"), folder, packed=True)
    return folder


@pytest.fixture
def mixed(saved_mixed, tmp_path):
    """q, k, v and o are bitmaps with a surplus; gate, up and down are 2:4."""
    return Path(shutil.copytree(saved_mixed, tmp_path / "mixed"))


Q = "model.layers.0.self_attn.q_proj"


def _edit_tensor(directory: Path, name: str, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _drop(directory: Path, name: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _edit_entry(directory: Path, **changes) -> None:
    entry = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_json(directory / "config.json", quantization_config=entry | changes)


def _edit_surplus(directory: Path, change) -> None:
    entry = json.loads((directory / "config.json").read_text())["quantization_config"]
    _edit_entry(directory, bitmap=entry["bitmap"] | {Q: change(entry["bitmap"][Q])})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: _edit_entry(d, format_version=3), "upgrade wanda_ext"),
        (lambda d: _edit_entry(d, bitmap={Q: 1}), "names 1 packed linears, the files hold .* of 4"),
        (lambda d: _edit_entry(d, modules=["x"]), "names 1 packed linears, the files hold .* of 3"),
        (lambda d: _edit_entry(d, modules=[]), "names 0 packed linears, the files hold .* of 3"),
        (lambda d: _edit_surplus(d, lambda count: count + 1), "in surplus lists, the files hold"),
        (lambda d: _edit_surplus(d, lambda count: 0), "in surplus lists, the files hold"),
        (lambda d: _drop(d, f"{Q}.mask"), "names 4 packed .* the files hold metadata of 3"),
        (lambda d: _drop(d, f"{Q}.weight"), r"q_proj\.weight is missing"),
        (lambda d: _drop(d, f"{Q}.shape"), r"q_proj\.shape is missing"),
        (lambda d: _drop(d, f"{Q}.surplus_rows"), r"q_proj\.surplus_rows is missing"),
        (lambda d: _edit_tensor(d, f"{Q}.mask", lambda t: t[:-1]), r"q_proj\.weight is of shape"),
        (lambda d: _edit_tensor(d, f"{Q}.surplus_columns", lambda t: t[:-1]), r"columns is of sh"),
    ],
)
@pytest.mark.parametrize("load", [open_checkpoint, AutoModelForCausalLM.from_pretrained])
def test_damaged_bitmaps_are_named(load, damage, message, mixed):
    damage(mixed)
    with pytest.raises(ValueError, match=message):
        load(mixed)


def test_a_mixed_checkpoint_is_read(saved_mixed):
    checkpoint = open_checkpoint(saved_mixed)
    model = wide_model("mixed")
    kinds = checkpoint.packed_linears()
    assert [kind.FORMAT for kind in kinds.values()].count("bitmap") == 4 and len(kinds) == 7
    for name, kind in kinds.items():
        tensors = checkpoint.read_packed(name, kind)
        assert torch.equal(kind.unpack(tensors), model.get_submodule(name).weight), name
        assert ("surplus_rows" in tensors) == ("attn" in name)


def test_bitmaps_without_their_entry_are_told(mixed):
    edit_json(mixed / "config.json", quantization_config=None)
    with pytest.raises(ValueError, match=r"hold packed linears, but config\.json has no"):
        open_checkpoint(mixed)


def test_a_mask_of_the_model_itself_is_no_bitmap(tmp_path):
    folder = tmp_path / "dense"
    model_24("llama").save_pretrained(folder)
    save_pretrained(model_24("llama"), tmp_path / "packed", packed=True)
    for path in (folder, tmp_path / "packed"):
        tensors = load_file(path / "model.safetensors")
        tensors["model.layers.0.self_attn.mask"] = torch.ones(1, 64, 64, dtype=torch.int32)
        save_file(tensors, path / "model.safetensors")
    assert open_checkpoint(folder).packed is None
    assert len(open_checkpoint(tmp_path / "packed").packed_linears()) == 14
