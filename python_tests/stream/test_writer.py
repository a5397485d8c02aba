"""The files of a streamed prune are those of its source, whatever its pieces were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from command_line import prune as prune_by_command
from command_line import saved_model
from safetensors.torch import load_file
from streamed import contents, prune, saved

import wanda_ext
from wanda_ext.checkpoint.convert import PACKED_FILES
from wanda_ext.checkpoint.reader import INDEX


def layout_of(folder: Path) -> dict[str, str]:
    """Tensor -> file."""
    files = folder.glob("*.safetensors")
    return {name: file.name for file in files for name in load_file(file)}


def sizes_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", ["5GB", "150KB"])
def test_a_file_for_each_of_the_source(size: str, packed: bool, tmp_path: Path) -> None:
    src, dst = saved(tmp_path / "src", max_shard_size=size), tmp_path / "dst"
    prune(src, dst, packed=packed)
    before, after = sizes_of(src), sizes_of(dst)
    assert len(before) == (1 if size == "5GB" else 4)
    assert after.keys() == before.keys()
    assert all(after[name] < before[name] + 100 for name in before)  # the library pads its header
    layout = layout_of(dst)
    assert layout.items() >= layout_of(src).items()
    for name, file in layout.items():  # a linear is not torn apart
        assert file == layout[name.replace(".meta", ".weight")], name
    assert (dst / INDEX).exists() == (size != "5GB")
    if size != "5GB":
        index = json.loads((dst / INDEX).read_text())
        assert index["weight_map"] == layout
    model = transformers.AutoModelForCausalLM.from_pretrained(dst, dtype="auto")
    wanda_ext.verify(model).raise_if_bad()


@pytest.mark.parametrize("words", [(), ("--packed",), ("--dtype", "bfloat16")])
@pytest.mark.parametrize("size", ["5GB", "150KB"])
def test_the_bytes_of_a_prune_in_memory(size: str, words: tuple[str, ...], tmp_path: Path) -> None:
    src = saved_model(tmp_path, max_shard_size=size)
    if size != "5GB":
        index = json.loads((src / INDEX).read_text())
        index["metadata"] |= {"of": "its maker", PACKED_FILES: {"q_proj.meta": "a.safetensors"}}
        (src / INDEX).write_text(json.dumps(index))
    for out, more in (("streamed", ()), ("memory", ("--in-memory",))):
        assert prune_by_command(src, tmp_path / out, *words, *more) == 0
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")


def test_the_file_that_transformers_writes(tmp_path: Path) -> None:
    src, dst = saved(tmp_path / "src"), tmp_path / "dst"
    prune(src, dst)
    model = transformers.AutoModelForCausalLM.from_pretrained(dst, dtype="auto")
    model.save_pretrained(tmp_path / "again")
    written = contents(tmp_path / "again")
    assert written.keys() == {"config.json", "generation_config.json", "model.safetensors"}
    assert all(contents(dst)[name] == data for name, data in written.items())
