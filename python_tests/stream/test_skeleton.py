"""Models whose weights come from files: which ones, under which names, and for how long."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from streamed import assert_same_tensors, in_memory, prune, saved, tensors_of
from tiny_models import FAMILIES, tiny_model, token_ids

from wanda_ext.checkpoint import convert
from wanda_ext.checkpoint.reader import open_checkpoint
from wanda_ext.stream.meta_model import NamesError
from wanda_ext.stream.skeleton import Skeleton


def skeleton_of(folder: Path, dtype: torch.dtype | None = None) -> Skeleton:
    return Skeleton(open_checkpoint(folder), dtype, False)


def edited(folder: Path, change, config=None) -> Path:
    """The checkpoint with `change(tensors)` made, and entries of its config replaced."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_neox"])
def test_tensors_are_those_of_from_pretrained(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny_model(family, torch.bfloat16).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    skeleton = skeleton_of(tmp_path, dtype)
    assert skeleton.stored.keys() == load_file(tmp_path / "model.safetensors").keys()
    for name, tensor in model.state_dict().items():
        if name in skeleton.stored:
            found = skeleton.stored[name].read()
            assert torch.equal(found, tensor) and found.dtype == tensor.dtype, name
    buffers = dict(model.named_non_persistent_buffers())
    assert buffers.keys() == dict(skeleton.model.named_non_persistent_buffers()).keys()
    for name, buffer in skeleton.model.named_non_persistent_buffers():
        assert torch.equal(buffer, buffers[name]) and buffer.dtype == buffers[name].dtype, name
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_family_keeps_in_float32(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = transformers.LlamaForCausalLM
    monkeypatch.setattr(kind, "_keep_in_fp32_modules", ["input_*norm"])
    monkeypatch.setattr(kind, "_keep_in_fp32_modules_strict", ["down_proj"])
    saved(tmp_path / "src")
    model = kind.from_pretrained(tmp_path / "src", dtype=dtype)
    stored = skeleton_of(tmp_path / "src", dtype).stored
    found = {name: stored[name].dtype for name in stored}
    assert found == {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert found["model.layers.0.mlp.down_proj.weight"] == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_it_runs_with_what_is_put_in(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    skeleton = skeleton_of(tmp_path)
    parts = list(dict.fromkeys(name.rpartition(".")[0] for name in skeleton.stored))
    blocks = [n for n in parts if ".0." in n or ".1." in n or ".2." in n]
    inside = {
        name: skeleton.stored[name].read() for part in blocks for name in skeleton.names(part)
    }
    ids = token_ids(2, 8)
    with torch.no_grad(), skeleton.holding(inside), skeleton.read_when_called(blocks):
        assert torch.equal(skeleton.model(ids).logits, model(ids).logits)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    tied = skeleton.model.config.tie_word_embeddings
    embeddings = (skeleton.model.get_input_embeddings(), skeleton.model.get_output_embeddings())
    assert (embeddings[0].weight is embeddings[1].weight) == tied


def test_a_base_models_checkpoint(tmp_path: Path) -> None:
    """GPT-2's on the Hub has no `transformer.` in front, and masks that no module keeps now."""
    src = saved(tmp_path / "src", "gpt2")

    def as_on_the_hub(tensors):
        short = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        return short | {"h.0.attn.bias": torch.ones(1, 1, 64, 64).bool()}

    edited(src, as_on_the_hub)
    in_memory(src, tmp_path / "memory")
    prune(src, tmp_path / "dst")
    expected = {
        n.removeprefix("transformer."): t for n, t in tensors_of(tmp_path / "memory").items()
    }
    found = tensors_of(tmp_path / "dst")
    assert found.keys() == tensors_of(src).keys() == expected.keys() | {"h.0.attn.bias"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    prune(src, tmp_path / "packed", packed=True)
    assert {"h.0.attn.c_attn.meta", "h.0.attn.bias"} <= tensors_of(tmp_path / "packed").keys()
    convert(tmp_path / "packed", tmp_path / "dense", "dense")
    assert_same_tensors(tmp_path / "dense", tmp_path / "dst")
    convert(tmp_path / "dense", tmp_path / "again", "packed")
    assert_same_tensors(tmp_path / "again", tmp_path / "packed")


def test_a_tied_tensor_that_is_stored_twice(tmp_path: Path) -> None:
    src = saved(tmp_path / "src", "opt")
    tied = "model.decoder.embed_tokens.weight"
    prune(src, tmp_path / "once")
    edited(src, lambda t: t | {"lm_head.weight": t[tied].clone()})
    prune(src, tmp_path / "twice")
    found, once = tensors_of(tmp_path / "twice"), tensors_of(tmp_path / "once")
    assert found.keys() == once.keys() | {"lm_head.weight"}
    assert torch.equal(found["lm_head.weight"], found[tied])
    assert all(torch.equal(found[name], once[name]) for name in once)
    edited(src, lambda t: t | {"lm_head.weight": t[tied] + 1})
    with pytest.raises(ValueError, match=r"ties .*embed_tokens.weight and lm_head.weight"):
        skeleton_of(src)


def test_tensors_without_a_place_are_known(tmp_path: Path) -> None:
    src = saved(tmp_path / "src")
    edited(
        src, lambda t: t | {"extra.weight": torch.ones(2), "a.rotary_emb.inv_freq": torch.ones(2)}
    )
    skeleton = skeleton_of(src)
    assert "extra.weight" not in skeleton.stored
    assert skeleton.unknown.keys() == {"extra.weight", "a.rotary_emb.inv_freq"}


def test_blocks_that_share_are_refused(tmp_path: Path) -> None:
    skeleton = skeleton_of(saved(tmp_path / "src"))
    blocks = [f"model.layers.{i}" for i in range(3)]
    skeleton.check_own(blocks)
    layers = skeleton.model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    skeleton._tensors = skeleton.model.state_dict(keep_vars=True)
    with pytest.raises(NamesError, match=r"layers.2.mlp.up_proj.weight is shared by"):
        skeleton.check_own(blocks)


def test_a_shard_of_a_checkpoint_is_missed(tmp_path: Path) -> None:
    src = saved(tmp_path / "src")
    model = transformers.AutoModelForCausalLM.from_pretrained(src)
    shutil.rmtree(src)
    model.save_pretrained(src, max_shard_size="50KB")
    assert len(skeleton_of(src).stored) == 3 * 9 + 3
    next(src.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-.* is not a whole safetensors file"):
        open_checkpoint(src)
