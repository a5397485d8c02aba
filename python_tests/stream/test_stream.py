"""prune_checkpoint writes what prune_model and save_pretrained write, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models_24 import PATTERNS, dense_wide
from safetensors.torch import load_file, save_file
from streamed import assert_same_tensors, in_memory, names, prune, saved
from tiny_models import FAMILIES, tiny_tokenizer, token_ids

import wanda_ext
from wanda_ext.checkpoint.reader import INDEX
from wanda_ext.models.transfer import Copies
from wanda_ext.runner.capture import GlueError
from wanda_ext.stream import run
from wanda_ext.stream.meta_model import NamesError


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "src")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_as_in_memory(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    src = saved(tmp_path / "src", family, dtype)
    packed = dtype == torch.bfloat16
    states = "files" if packed else "memory"
    expected = in_memory(src, tmp_path / "memory", packed)
    report = prune(src, tmp_path / "dst", packed=packed, states=states)
    assert_same_tensors(tmp_path / "dst", tmp_path / "memory")
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "dst" / file).read_text() == (tmp_path / "memory" / file).read_text()
    for line, other in zip(report.linears, expected.linears, strict=True):
        assert (line.stored, bool(line.stored_bytes)) == (("2:4", True) if packed else ("", False))
        told = {"seconds": line.seconds, "stored": line.stored, "stored_bytes": line.stored_bytes}
        assert line == replace(other, **told)
    assert report.status == "complete"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "memory", "src"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst", dtype="auto")
    wanda_ext.verify(
        model, wanda_ext.PruneReport.load(tmp_path / "dst" / run.REPORT)
    ).raise_if_bad()


@pytest.mark.parametrize(
    ("pattern", "family"), [("16:32", "llama"), ("50%", "gpt2"), ("mixed", "llama")]
)
def test_packed_patterns_are_those_of_save_pretrained(
    pattern: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = tmp_path / "src"
    dense_wide(family, torch.bfloat16, blocks=2).save_pretrained(src, max_shard_size="500KB")
    tiny_tokenizer().save_pretrained(src)
    options = {"calib": token_ids(4, 16) % 96, "sparsity": PATTERNS[pattern], "packed": True}
    in_memory(src, tmp_path / "memory", **options)
    commit = run.Run._commit

    def interrupted(self: run.Run, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        commit(self, index, *rest)

    monkeypatch.setattr(run.Run, "_commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(src, tmp_path / "dst", **options)
    monkeypatch.undo()
    report = prune(src, tmp_path / "dst", **options)  # reads the packed block again
    assert_same_tensors(tmp_path / "dst", tmp_path / "memory")
    assert len({(tmp_path / x / "config.json").read_text() for x in ("dst", "memory")}) == 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst", dtype="auto")
    wanda_ext.verify(model, report).raise_if_bad()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    one, other = (json.loads((tmp_path / x / INDEX).read_text()) for x in ("dst", "sharded"))
    assert one["metadata"] == other["metadata"]


def test_files_can_be_converted(src: Path, tmp_path: Path) -> None:
    prune(src, tmp_path / "packed", packed=True)
    wanda_ext.convert(tmp_path / "packed", tmp_path / "dense", "dense")
    prune(src, tmp_path / "again")
    assert_same_tensors(tmp_path / "dense", tmp_path / "again")


def test_arguments_mean_the_same(src: Path, tmp_path: Path) -> None:
    options = {
        "calib": [" ".join(f"word{i}" for i in range(3000))],
        "sparsity": {"*.mlp.*": "50%", "model.layers.1.*": "2:4"},
        "ignore": ["*.0.*.q_proj", "model.layers.2.*"],
        "nsamples": 6,
        "seqlen": 32,
        "seed": 3,
    }
    in_memory(src, tmp_path / "memory", tokenizer=tiny_tokenizer(), **options)
    report = prune(src, tmp_path / "dst", **options)
    assert_same_tensors(tmp_path / "dst", tmp_path / "memory")
    assert len(report.pruned) == 3 + 7 and len(report.linears) == 21


def test_magnitude_needs_no_text(src: Path, tmp_path: Path) -> None:
    in_memory(src, tmp_path / "memory", calib=None, method="magnitude")
    prune(src, tmp_path / "dst", calib=None, method="magnitude")
    assert_same_tensors(tmp_path / "dst", tmp_path / "memory")


def test_another_dtype(src: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(src, dtype=torch.bfloat16)
    wanda_ext.prune_model(model, token_ids(), batch_size=2, progress=False, swap=False)
    model.save_pretrained(tmp_path / "memory")
    prune(src, tmp_path / "dst", dtype=torch.bfloat16)
    assert_same_tensors(tmp_path / "dst", tmp_path / "memory")


@pytest.mark.parametrize("states", ["memory", "files"])
def test_blocks_visit_a_device(
    src: Path, tmp_path: Path, states: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a GPU, on the CPU: another device than "cpu" is all that it asks for."""
    used = []

    class Counted(Copies):
        def bring(self, tensor: torch.Tensor) -> Any:
            used.append(tensor)
            return super().bring(tensor)

    monkeypatch.setattr(run, "Copies", lambda at: Counted(torch.device("cpu")))
    monkeypatch.setattr(run.Run, "_copies", lambda self: run.Copies(None))
    prune(src, tmp_path / "dst", states=states)
    monkeypatch.undo()
    assert len(used) > 3 * 9
    prune(src, tmp_path / "plain")
    assert_same_tensors(tmp_path / "dst", tmp_path / "plain")


# --- What is refused ------------------------------------------------------------------------------


def broken(src: Path, folder: Path, how: str) -> Path:
    shutil.copytree(src, folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no index":
        weights.rename(folder / "model-00001-of-00002.safetensors")
    elif how in ("other names", "missing"):
        tensors.pop("model.norm.weight")
        if how == "other names":
            tensors["final.weight"] = torch.ones(64)
        save_file(tensors, weights)
    elif how == "shape":
        save_file({**tensors, "model.norm.weight": torch.ones(65)}, weights)
    elif how == "pickle":
        weights.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    elif how == "link":
        outside = folder.with_name("outside.safetensors")
        weights.rename(outside)
        weights.symlink_to(outside)
    else:
        target = {"up": "../outside.safetensors", "absolute": f"{folder}/model.safetensors"}[how]
        shutil.copy(weights, folder.with_name("outside.safetensors"))
        weights.rename(folder / "a.safetensors")
        layout = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": target}
        index = json.dumps({"metadata": {}, "weight_map": layout})
        (folder / INDEX).write_text(index)
    return folder


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("cut", "not a whole safetensors file"),
        ("no index", "has shards, but not their model.safetensors.index.json"),
        ("missing", "lacks 1 .* LlamaForCausalLM has: model.norm.weight;"),
        ("other names", "has: model.norm.weight; it holds 1 .* no place for: final.weight;"),
        ("shape", r"model.norm.weight is stored as \[65\]"),
        ("pickle", "whole safetensors checkpoints"),
        ("link", "is a link to .*outside.safetensors"),
        ("up", r"into \.\./outside.safetensors; expected"),
        ("absolute", "into /.*; expected"),
    ],
)
def test_bad_checkpoints(src: Path, tmp_path: Path, how: str, told: str) -> None:
    folder = broken(src, tmp_path / "bad", how)
    before = names(tmp_path)
    with pytest.raises(ValueError, match=told):
        prune(folder, tmp_path / "dst")
    assert names(tmp_path) == before


def test_links_of_the_hub_cache_are_followed(src: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "revision"
    snapshot.mkdir(parents=True)
    for path in src.iterdir():
        shutil.copy(path, tmp_path / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    prune(snapshot, tmp_path / "dst")
    prune(src, tmp_path / "plain")
    assert_same_tensors(tmp_path / "dst", tmp_path / "plain")


@pytest.mark.parametrize("trusted", [False, True])
def test_what_is_left_is_named(src: Path, tmp_path: Path, trusted: bool) -> None:
    own = tmp_path / "own"
    shutil.copytree(src, own)
    (tmp_path / "secret").write_text("secret")
    (own / "sub").mkdir()
    for link in (own / "notes.md", own / "sub" / "key"):
        link.symlink_to(tmp_path / "secret")
    (own / "modeling.py").write_text("code")
    report = prune(own, tmp_path / "dst", trust_remote_code=trusted)
    assert report.left.keys() == {"notes.md", "sub/key"} | (set() if trusted else {"modeling.py"})
    assert (tmp_path / "dst" / "modeling.py").exists() == trusted
    assert not [p for p in (tmp_path / "dst").rglob("*") if p.name in ("notes.md", "key")]
    assert "not taken along: " in str(report) and "sub/key (a link to" in str(report)
    assert wanda_ext.PruneReport.load(tmp_path / "dst" / run.REPORT).left == report.left
    (own / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (own / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer.json is a link to"):
        prune(own, tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"states": "disk"}, "'memory' or 'files'"),
        ({"sparsity": 0.2, "packed": True}, "at least 30% is pruned can be packed"),
        ({"ignore": ["*.none"]}, r"\*\.none"),
        ({"sparsity": wanda_ext.Owl(0.5)}, "Owl measures .*prune_model"),
        ({"device": "nowhere"}, "cannot be used here"),
        ({"seqlen": 65}, "context of 64"),
        ({"calib": ["short"]}, "too little"),
    ],
)
def test_bad_arguments(src: Path, tmp_path: Path, options: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        prune(src, tmp_path / "dst", **options)
    assert list(tmp_path.iterdir()) == []


def test_packed_and_overlapping_are_refused(src: Path, tmp_path: Path) -> None:
    prune_packed = tmp_path / "packed"
    prune(src, prune_packed, packed=True)
    with pytest.raises(ValueError, match="packed already"):
        prune(prune_packed, tmp_path / "dst")
    with pytest.raises(ValueError, match="overlap"):
        prune(src, src / "inside")


def test_blocks_that_cannot_run_alone_are_told_first(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def glued(*_: Any) -> None:
        raise GlueError("glue between blocks")

    monkeypatch.setattr("wanda_ext.runner.walk.capture", glued)
    with pytest.raises(NamesError, match=r"cannot run alone \(glue between blocks\); prune it in"):
        prune(src, tmp_path / "dst")
    assert list(tmp_path.iterdir()) == []
