"""A streamed prune that fails: what it leaves, and how the same call finishes it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from streamed import assert_same_tensors, names, prune, saved

import wanda_ext
from wanda_ext.files import shards
from wanda_ext.prune.prune import PruneError
from wanda_ext.stream import run


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "src")


def test_a_failure_is_told_and_finished_later(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *rest: Any) -> shards.Written:
        if path.name == "model.layers.1.safetensors":
            raise OSError(28, "No space left on device")
        return shards.write_shard(path, *rest)

    monkeypatch.setattr("wanda_ext.stream.writer.write_shard", full)
    with pytest.raises(PruneError, match=r"layers.1: .*No space left.* goes on from") as stopped:
        prune(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    assert stopped.value.report.status == "stopped at model.layers.1"
    with pytest.raises(ValueError, match=r"seed \(0 then, 1 now\)"):
        prune(src, tmp_path / "dst", seed=1)
    monkeypatch.undo()

    read: list[str] = []
    plain = shards.Stored.read
    monkeypatch.setattr(
        shards.Stored, "read", lambda s, *a: (read.append(s.file.name), plain(s, *a))[1]
    )
    prune(src, tmp_path / "dst")
    assert "model.layers.0.safetensors" in read  # replayed, not pruned again
    prune(src, tmp_path / "plain")
    assert_same_tensors(tmp_path / "dst", tmp_path / "plain")
    assert names(tmp_path) == ["dst", "plain"]


def test_a_changed_source_is_refused(src: Path, tmp_path: Path) -> None:
    own = tmp_path / "src"
    shutil.copytree(src, own)

    class Refused(wanda_ext.Wanda):
        calls = 0

        def prune_(self, weight: torch.Tensor, *rest: Any) -> None:
            Refused.calls += 1
            if Refused.calls == 10:
                raise ValueError("no more")
            super().prune_(weight, *rest)

    with pytest.raises(PruneError, match="no more"):
        prune(own, tmp_path / "dst", method=Refused())
    os.utime(own / "model.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match=r"source model\.safetensors"):
        prune(own, tmp_path / "dst", method=Refused())
    prune(own, tmp_path / "dst", method=Refused(), resume=False)


def test_ctrl_c_leaves_what_is_finished(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []

    def interrupted(self: run.Run, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        done.append(index)
        commit(self, index, *rest)

    commit = run.Run._commit
    monkeypatch.setattr(run.Run, "_commit", interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        prune(src, tmp_path / "dst")
    monkeypatch.undo()
    assert done == [0] and "goes on from there" in stopped.value.left
    prune(src, tmp_path / "dst")
    prune(src, tmp_path / "plain")
    assert_same_tensors(tmp_path / "dst", tmp_path / "plain")
