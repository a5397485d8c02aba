"""save_over: the files, names and pieces of the source, with what a model became in memory."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from streamed import saved, tensors_of
from tiny_models import tiny_model, token_ids

import wanda_ext
from wanda_ext.checkpoint import conversion
from wanda_ext.checkpoint.convert import PACKED_FILES
from wanda_ext.checkpoint.reader import INDEX, open_checkpoint
from wanda_ext.checkpoint.rewrite import save_over, write_config


def loaded(src: Path, dtype: torch.dtype | str = "auto") -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(src, dtype=dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_files_and_names_are_the_sources(tmp_path: Path, packed: bool) -> None:
    src = tmp_path / "src"
    tiny_model(dtype=torch.bfloat16).save_pretrained(src, max_shard_size="60KB")
    index = json.loads((src / INDEX).read_text())
    index["metadata"] |= {"of": "its maker", PACKED_FILES: {"q_proj.meta": "a.safetensors"}}
    (src / INDEX).write_text(json.dumps(index))
    model = loaded(src)
    wanda_ext.prune_model(model, token_ids(), batch_size=2, progress=False, swap=False)
    (tmp_path / "dst").mkdir()
    assert save_over(open_checkpoint(src), model, tmp_path / "dst", packed) == {}
    after = json.loads((tmp_path / "dst" / INDEX).read_text())
    maps = [index["weight_map"], after["weight_map"]]
    assert maps[0].items() <= maps[1].items()
    assert after["metadata"]["of"] == "its maker"
    assert (PACKED_FILES in after["metadata"]) != packed  # where convert is to put what it packs
    assert bool(maps[1].keys() - maps[0].keys()) == packed
    again = loaded(tmp_path / "dst")
    assert bool(packed) == ("quantization_config" in again.config.to_dict())
    if packed:
        wanda_ext.unswap_linears(again)
    expected = model.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in again.state_dict().items())
    assert not any("Sparse" in type(module).__name__ for module in model.modules())


def test_a_tensor_that_is_as_it_was_keeps_its_dtype(tmp_path: Path) -> None:
    src = saved(tmp_path / "src", dtype=torch.bfloat16)
    tensors = load_file(src / "model.safetensors")
    norm, up = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
    tensors[norm] = torch.randn(64)  # more of it than the model keeps
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    model = loaded(src)
    assert model.state_dict()[norm].dtype == torch.bfloat16
    model.state_dict()[up].zero_()
    for name, asked in (("as stored", None), ("half", torch.float16)):
        (tmp_path / name).mkdir()
        if asked is not None:
            model = model.to(asked)
        save_over(open_checkpoint(src), model, tmp_path / name, dtype=asked)
    after, half = tensors_of(tmp_path / "as stored"), tensors_of(tmp_path / "half")
    assert torch.equal(after[norm], tensors[norm]) and not after[up].any()
    assert after[up].dtype == torch.bfloat16
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}


def test_what_transformers_stores_otherwise_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = tmp_path / "src"
    families.build("mixtral").save_pretrained(src)
    model = loaded(src)
    model.state_dict()["model.layers.0.mlp.experts.down_proj"].zero_()
    plain = conversion._reverted
    monkeypatch.setattr(
        conversion, "_reverted", lambda m, t: {f"new.{n}": one for n, one in plain(m, t).items()}
    )
    (tmp_path / "dst").mkdir()
    told = save_over(open_checkpoint(src), model, tmp_path / "dst")
    before, after = tensors_of(src), tensors_of(tmp_path / "dst")
    assert told.keys() == before.keys() - after.keys()
    assert {f"new.{name}" for name in told} == after.keys() - before.keys()
    assert len(told) == 4 and all("w2" in name for name in told)


def test_only_what_was_asked_changes_in_the_config(tmp_path: Path) -> None:
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "a": 1}, "odd": [1]}
    config |= {"quantization_config": {"quant_method": "wanda_ext"}}

    def written(*asked: object) -> dict[str, object]:
        write_config(tmp_path, config, *asked)  # type: ignore[arg-type]
        found: dict[str, object] = json.loads((tmp_path / "config.json").read_text())
        return found

    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    assert written(None, None) == plain
    changed = written(torch.bfloat16, {"bits": 2})
    assert changed == {
        "dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16", "a": 1},
        "odd": [1],
        "quantization_config": {"bits": 2},
    }
