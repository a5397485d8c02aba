"""transformers loads packed checkpoints with us and never without, in fresh processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from fresh_python import run_python
from models_24 import IDS, dense_model, edit_json, logits, model_24, wide_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from wanda_ext.checkpoint.quantizer import WandaExtConfig, attached, packed_linears
from wanda_ext.checkpoint.save import save_pretrained, swap_linears
from wanda_ext.packed.bitmap import SparseLinearBitmap

LOAD = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
{also}
for directory in map(Path, sys.argv[1:]):
    try:
        model = AutoModelForCausalLM.from_pretrained(directory)
    except Exception as error:
        (directory / "outcome.txt").write_text(f"{type(error).__name__}: {error}")
        continue
    with torch.no_grad():
        torch.save(model(torch.arange(32).reshape(2, 16) % 96).logits, directory / "outcome.pt")
"""
CASES = {  # a model, and whether it is sharded, by its own save_pretrained
    "llama": (partial(model_24, "llama"), False),
    "llama-bf16-own": (partial(model_24, "llama", torch.bfloat16), True),
    "gpt2-own": (partial(model_24, "gpt2"), True),
    "opt-bf16": (partial(model_24, "opt", torch.bfloat16), False),
    "16:32": (partial(wide_model, "16:32", dtype=torch.float32), False),
    "50%-own": (partial(wide_model, "50%"), True),
    "gpt2-50%": (partial(wide_model, "50%", "gpt2"), False),
    "mixed-own": (partial(wide_model, "mixed", dtype=torch.float16), True),
}


def load_elsewhere(directories: Iterable[Path], also: str) -> None:
    """Loads each in one fresh process; the logits, or the error, are left in the directory."""
    run = run_python(LOAD.replace("{also}", also), *map(str, directories))
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """case -> its swapped model and three copies of its checkpoint, each loaded elsewhere."""
    root = tmp_path_factory.mktemp("elsewhere")
    models = {}
    for case, (made, own) in CASES.items():
        models[case] = made()
        swap_linears(models[case])
        directory = root / "with" / case
        if own:
            models[case].save_pretrained(directory, max_shard_size="50KB")
            assert len(list(directory.glob("*.safetensors"))) > 1
        else:
            save_pretrained(models[case], directory, packed=True)
    shutil.copytree(root / "with", root / "without")
    for case in CASES:
        for kind in ("with", "without"):
            copied = shutil.copytree(root / kind / case, root / f"{kind}, no entry" / case)
            edit_json(copied / "config.json", quantization_config=None)
    load_elsewhere([*root.glob("with/*"), *root.glob("with, */*")], "import wanda_ext")
    load_elsewhere([*root.glob("without/*"), *root.glob("without, */*")], "")
    return models, root


@pytest.mark.parametrize("case", CASES)
def test_loads_in_a_fresh_process_with_the_import(case, elsewhere):
    models, root = elsewhere
    assert torch.equal(torch.load(root / "with" / case / "outcome.pt"), logits(models[case]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["without", "without, no entry", "with, no entry"])
def test_never_loads_random_weights(kind, case, elsewhere):
    _, root = elsewhere
    assert not (root / kind / case / "outcome.pt").exists()
    assert "ignore_mismatched_sizes" in (root / kind / case / "outcome.txt").read_text()


def test_loads_in_another_dtype(tmp_path):
    model = model_24("llama")
    save_pretrained(model, tmp_path / "model", packed=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float16)
    assert attached(loaded) and len(packed_linears(loaded)) == 14
    assert not any(m.weight.requires_grad for m in packed_linears(loaded).values())
    torch.testing.assert_close(logits(loaded).float(), logits(model), rtol=0.02, atol=0.02)


def test_model_without_a_head_loads_and_saves_the_same_checkpoint(tmp_path):
    model = model_24("llama")
    save_pretrained(model, tmp_path / "full", packed=True)
    base = AutoModel.from_pretrained(tmp_path / "full")
    base.save_pretrained(tmp_path / "base")
    entry = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    assert entry["modules"][0] == "layers.0.self_attn.q_proj"
    again = AutoModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        hidden = [m(IDS).last_hidden_state for m in (model.model, base, again)]
    torch.testing.assert_close(hidden[1], hidden[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(hidden[1], hidden[2])
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # its head is new
    assert len(packed_linears(full)) == 14


def test_dequantize_gives_the_dense_model(tmp_path):
    model = model_24("gpt2")
    save_pretrained(model, tmp_path / "model", packed=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded.dequantize()
    assert torch.equal(logits(loaded), logits(model)) and not packed_linears(loaded)
    assert not hasattr(loaded.config, "quantization_config")


@pytest.mark.parametrize("pattern", ["50%", "mixed"])
def test_bitmaps_load_in_another_dtype_and_dequantize(pattern, tmp_path):
    model = wide_model(pattern)
    save_pretrained(model, tmp_path / "model", packed=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    packed = packed_linears(loaded)
    assert attached(loaded) and len(packed) == 7
    kinds = [type(module) for module in packed.values()]
    assert kinds.count(SparseLinearBitmap) == (7 if pattern == "50%" else 4)
    assert not any(p.requires_grad for m in packed.values() for p in m.parameters())  # no biases
    torch.testing.assert_close(logits(loaded), logits(model.float()), rtol=1e-4, atol=1e-4)
    loaded.dequantize()
    assert torch.equal(logits(loaded), logits(model)) and not packed_linears(loaded)


def test_a_base_model_loads_bitmaps_under_its_own_names(tmp_path):
    model = wide_model("mixed")
    save_pretrained(model, tmp_path / "full", packed=True)
    base = AutoModel.from_pretrained(tmp_path / "full")
    assert len(packed_linears(base)) == 7 and all(n[:7] == "layers." for n in packed_linears(base))
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        hidden = [m(IDS).last_hidden_state for m in (model.model, base, again)]
    torch.testing.assert_close(hidden[1], hidden[0], rtol=2e-2, atol=2e-2)
    assert torch.equal(hidden[1], hidden[2])


def test_config_keeps_formats_apart():
    packed = {"a": ("2:4", {}), "b": ("bitmap", {"surplus": 7}), "c": ("bitmap", {})}
    both = WandaExtConfig.of(packed, ["c"], {"d": "why"})
    assert both.to_dict() == {
        "quant_method": "wanda_ext",
        "format_version": 2,
        "modules": ["a"],
        "transposed": ["c"],
        "dense": {"d": "why"},
        "bitmap": {"b": 7, "c": 0},
    }
    assert WandaExtConfig(**both.to_dict()).packed == packed
    first = WandaExtConfig.of({"a": ("2:4", {})}, [], {})
    assert first.to_dict()["format_version"] == 1 and "bitmap" not in first.to_dict()


def test_newer_format_is_refused():
    with pytest.raises(ValueError, match="format_version 3, this wanda_ext reads 1 and 2; upgrade"):
        WandaExtConfig(["a"], format_version=3)


def test_packing_at_load_is_refused(tmp_path):
    dense_model("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=WandaExtConfig(["model.layers.0.mlp.up_proj"])
        )


def _edit_entry(directory: Path, **changes) -> None:
    entry = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_json(directory / "config.json", quantization_config=entry | changes)


def _drop_tensor(directory: Path, name: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _cut(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _move_out(directory: Path, path: str) -> None:
    (directory / "model.safetensors").rename(directory / path)
    with safe_open(directory / path, framework="pt") as tensors:
        files = dict.fromkeys(tensors.keys(), path)
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: _edit_entry(d, format_version=3), "upgrade wanda_ext"),
        (lambda d: _edit_entry(d, modules=[]), "names no packed modules"),
        (lambda d: _edit_entry(d, modules=[UP]), "names 1 packed linears, the files hold"),
        (lambda d: _drop_tensor(d, f"{UP}.meta"), "the files hold metadata of 13"),
        (lambda d: _drop_tensor(d, f"{UP}.weight"), r"up_proj\.weight is missing"),
        (lambda d: edit_json(d / "config.json", hidden_size=40), "40 columns are not a multiple"),
        (lambda d: _move_out(d, "../x.safetensors"), r"outside of its directory: copy"),
        (_cut, "not fully covered|not a whole safetensors file"),
    ],
)
def test_damaged_checkpoints_do_not_load(damage, message, tmp_path):
    save_pretrained(model_24("llama"), tmp_path / "model", packed=True)
    damage(tmp_path / "model")
    with pytest.raises(Exception, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("value", [0, 0x1111, -1])
def test_metadata_that_means_no_weight_is_refused(value, tmp_path):
    save_pretrained(model_24("llama"), tmp_path / "model", packed=True)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[f"{UP}.meta"][3, 1] = value
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{UP} has invalid metadata in row 3: the checkpoint is"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("pattern", ["2:4", "16:32"])
def test_what_is_offloaded_is_checked_too(pattern, tmp_path):
    model = model_24("llama") if pattern == "2:4" else wide_model(pattern)
    save_pretrained(model, tmp_path / "model", packed=True)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    bits = f"{UP}.meta" if pattern == "2:4" else f"{UP}.mask"
    tensors[bits].view(-1)[0] = 0
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    where |= {"model.rotary_emb": "cpu", "model.layers": "disk"}
    with pytest.raises(ValueError, match=f"{UP} has invalid m"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=where, offload_folder=tmp_path / "offload"
        )
