"""open_checkpoint: one clear error for each way a directory is not a checkpoint of ours."""

from __future__ import annotations

import json

import pytest
import torch
from models_24 import edit_json, model_24

from wanda_ext.checkpoint import swap_linears
from wanda_ext.reader import INDEX, open_checkpoint


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
    assert name in packed.packed_names() and len(packed.packed_names()) == 14
    assert torch.equal(packed.read_dense(name), model.get_submodule(name).weight)
    assert torch.equal(dense.read(f"{name}.weight"), model.get_submodule(name).weight)
    assert packed.index["weight_map"] == packed.files()
    assert dense.packed is None and dense.index is None and not dense.packed_names()


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
    edit_json(folder / "config.json", quantization_config=entry | {"format_version": 2})


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
        (_newer, "format_version 2, this wanda_ext reads 1"),
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
