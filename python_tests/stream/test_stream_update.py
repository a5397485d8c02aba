"""prune_checkpoint with an update: what prune_model writes, however it was stopped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from streamed import assert_same_tensors, in_memory, names, prune, saved
from tiny_models import token_ids

from wanda_ext.calibration.batches import calibration_batches
from wanda_ext.checkpoint.reader import open_checkpoint
from wanda_ext.files import shards
from wanda_ext.methods import Corrected
from wanda_ext.prune.plan import plan_blocks
from wanda_ext.prune.prune import PruneError
from wanda_ext.stream.preflight import MARGIN, needs_of
from wanda_ext.stream.skeleton import Skeleton

UPDATE = {"sparsity": "2:4", "update": "corrected"}


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "src", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def expected(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expected") / "dst"
    in_memory(src, folder, **UPDATE)
    return folder


@pytest.mark.parametrize("states", ["memory", "files"])
def test_it_writes_what_prune_model_does(
    src: Path, expected: Path, tmp_path: Path, states: str
) -> None:
    report = prune(src, tmp_path / "dst", states=states, **UPDATE)
    assert_same_tensors(tmp_path / "dst", expected)
    assert report.arguments["update"] == repr(Corrected())
    assert len(report.pruned) == 21
    assert names(tmp_path) == ["dst"]


@pytest.mark.parametrize("states", ["memory", "files"])
@pytest.mark.parametrize("stopped_at", [1, 2])
def test_a_run_that_was_stopped_is_finished(
    src: Path,
    expected: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    states: str,
    stopped_at: int,
) -> None:
    plain = shards.write_shard

    def full(path: Path, *rest: Any) -> int:
        if path.name == f"model.layers.{stopped_at}.safetensors":
            raise OSError("No space left on device")
        return plain(path, *rest)

    monkeypatch.setattr("wanda_ext.stream.writer.write_shard", full)
    with pytest.raises(PruneError, match="No space left"):
        prune(src, tmp_path / "dst", states=states, **UPDATE)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"differs in update \('Corrected\(.*\)' then, None now\)"):
        prune(src, tmp_path / "dst", states=states, sparsity="2:4")
    prune(src, tmp_path / "dst", states=states, **UPDATE)
    assert_same_tensors(tmp_path / "dst", expected)
    assert names(tmp_path) == ["dst"]


def test_several_ranks_are_refused(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    two = SimpleNamespace(count=2, first=True)
    monkeypatch.setattr("wanda_ext.stream.stream.joined", lambda: nullcontext(two))
    with pytest.raises(ValueError, match="needs all batches in one process, and 2 share them"):
        prune(src, tmp_path / "dst", **UPDATE)
    assert names(tmp_path) == []


def test_preflight_counts_the_second_stream_and_what_is_held(src: Path, tmp_path: Path) -> None:
    skeleton = Skeleton(open_checkpoint(src), None, False)
    plan = plan_blocks(skeleton.model, "2:4")
    batches = calibration_batches(token_ids(8, 32), batch_size=2)

    def needs(**given: Any) -> Any:
        return needs_of(skeleton, plan, batches, tmp_path, False, gram=True, **given)

    tokens, width = 8 * 32, 64 * 2
    held = 2 * (6 * 64 + 96) + 2 * 96 + 2 * width  # a token's: read dense, read pruned, states
    update = 12 * 96**2 + 24 * 64 * 96
    base = needs(in_files=False)
    more = needs(in_files=False, update=True)
    assert more.memory - base.memory == tokens * (width + held) + update
    files = needs(in_files=True, update=True)
    assert more.memory - files.memory == 2 * tokens * width
    files = saved(tmp_path / "files", dtype=torch.bfloat16, max_shard_size="60KB")
    skeleton = Skeleton(open_checkpoint(files), None, False)  # no file is larger than the states
    more_disk = needs(in_files=True, update=True).disk - needs(in_files=True).disk
    assert more_disk == pytest.approx(MARGIN * 2 * tokens * width, abs=2)
