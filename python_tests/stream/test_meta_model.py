"""Models on the meta device: buffers computed, code not run, other formats refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from streamed import saved
from tiny_models import tiny_model

from wanda_ext.checkpoint.reader import open_checkpoint
from wanda_ext.stream import meta_model
from wanda_ext.stream.meta_model import NamesError, empty_model

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path(__file__).with_name("ran").touch()
class Config(LlamaConfig):
    model_type = "odd"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def change(folder: Path, **entries: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return folder


def test_only_buffers_have_values(tmp_path: Path) -> None:
    model = empty_model(open_checkpoint(saved(tmp_path / "src")), None, None, False)
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = tiny_model().model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    assert not model.training


@pytest.mark.parametrize("named", [None, "bfloat16"])
def test_the_dtype_is_the_configs_or_that_of_the_files(tmp_path: Path, named: str | None) -> None:
    checkpoint = open_checkpoint(change(saved(tmp_path / "src"), dtype=named))
    model = empty_model(checkpoint, None, torch.float16, False)
    assert model.dtype == (torch.bfloat16 if named else torch.float16)
    assert empty_model(checkpoint, torch.float32, torch.float16, False).dtype == torch.float32


def test_eight_bit_weights_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path / "src"))
    with pytest.raises(ValueError, match="float8_e4m3fn; only float32"):
        empty_model(checkpoint, torch.float8_e4m3fn, None, False)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    src = saved(tmp_path / "src")
    (src / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter; merge it"):
        empty_model(open_checkpoint(src), None, None, False)


def test_another_quantization_is_refused(tmp_path: Path) -> None:
    change(saved(tmp_path / "src"), quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="quantized by 'fp8'"):
        open_checkpoint(tmp_path / "src")


def test_a_buffer_that_nothing_computes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(saved(tmp_path / "src"))
    around = type("Odd", (), {"_init_weights": lambda self, module: None})
    monkeypatch.setattr(meta_model, "_pretrained_around", lambda *_: around())
    with pytest.raises(NamesError, match=r"does not say how to compute its buffer .*inv_freq"):
        empty_model(checkpoint, None, None, False)


def test_code_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    src = saved(tmp_path / "src")
    names = {"AutoConfig": "odd.Config", "AutoModelForCausalLM": "odd.Model"}
    change(src, model_type="odd", auto_map=names)
    (src / "odd.py").write_text(CODE)
    with pytest.raises(ValueError, match="trust_remote_code"):
        empty_model(open_checkpoint(src), None, None, False)
    assert not list(tmp_path.rglob("ran"))
    assert type(empty_model(open_checkpoint(src), None, None, True)).__name__ == "Model"
