"""Tensors without a place in the model get their own file, and the index tells of all."""

from __future__ import annotations

import json

import pytest
import torch
from models_24 import digests, logits, model_24
from safetensors.torch import load_file, save_file
from streamed import tensors_of
from transformers import AutoModelForCausalLM

from wanda_ext.checkpoint.carry import CARRIED, add_tensors
from wanda_ext.checkpoint.reader import INDEX, open_checkpoint
from wanda_ext.files import stored_tensors


@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_a_saved_model_and_what_is_added(shard, tmp_path):
    model = model_24("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "out", max_shard_size=shard)
    before = tensors_of(tmp_path / "out")
    more = {"mtp.weight": torch.ones(2, 3, dtype=torch.bfloat16), "mtp.id": torch.arange(3)}
    save_file(more, tmp_path / "more.safetensors")
    add_tensors(tmp_path / "out", stored_tensors([tmp_path / "more.safetensors"]))
    found, index = tensors_of(tmp_path / "out"), json.loads((tmp_path / "out" / INDEX).read_text())
    assert found.keys() == index["weight_map"].keys() == {*before, *more}
    assert all(torch.equal(found[name], one) for name, one in (before | more).items())
    assert load_file(tmp_path / "out" / CARRIED).keys() == more.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert open_checkpoint(tmp_path / "out").headers.keys() == found.keys()
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model)
    )


def test_nothing_to_add_changes_nothing(tmp_path):
    model_24("llama").save_pretrained(tmp_path)
    before = digests(tmp_path)
    add_tensors(tmp_path, {})
    assert digests(tmp_path) == before
