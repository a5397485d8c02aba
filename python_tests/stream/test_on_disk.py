"""A resumed run looks at what is on the disk: each file once, by its checksum."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamed import assert_same_tensors, names, prune, saved

import wanda_ext
from wanda_ext.checkpoint.reader import open_checkpoint
from wanda_ext.prune.prune import PruneError
from wanda_ext.stream import journal as journal_module
from wanda_ext.stream import run

SHARD = "model-00003-of-00004.safetensors"  # of the second of three blocks


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "src")


@pytest.fixture(scope="module")
def whole(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dst = tmp_path_factory.mktemp("whole") / "dst"
    prune(src, dst)
    return dst


def stopped(src: Path, dst: Path, at: int, **options: Any) -> Path:
    """The directory of a run that was stopped when it had finished `at` blocks."""
    commit = run.Run._commit

    def interrupted(self: run.Run, index: int, *rest: Any) -> None:
        if index == at:
            raise KeyboardInterrupt
        commit(self, index, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Run, "_commit", interrupted)
        prune(src, dst, **options)
    return dst.with_name(f".{dst.name}.unfinished")


def complete(src: Path, dst: Path) -> Path:
    """The directory of a run that was stopped before its last step: the checkpoint's name."""

    def full(*_: Any) -> None:
        raise OSError("stopped here")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PruneError, match="stopped here"):
        patch.setattr(journal_module, "publish", full)
        prune(src, dst)
    return dst.with_name(f".{dst.name}.unfinished")


def flip(path: Path) -> None:
    """One bit of the last tensor's data."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def remember_pruned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    pruned: list[int] = []
    plain = run.prune_block
    monkeypatch.setattr(
        run, "prune_block", lambda block, i, *rest: (pruned.append(i), plain(block, i, *rest))[1]
    )
    return pruned


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing"),
    "flipped": (flip, "is damaged"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged"),
    "link": (lambda path: path.symlink_to(path.rename(path.with_name("moved"))), "is missing"),
}


@pytest.mark.parametrize("states", ["memory", "files"])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_block_whose_file_is_damaged_is_done_again(
    src: Path,
    whole: Path,
    tmp_path: Path,
    how: str,
    states: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = stopped(src, tmp_path / "dst", 2, states=states)
    damage, told = DAMAGES[how]
    damage(home / "checkpoint" / SHARD)
    pruned = remember_pruned(monkeypatch)
    prune(src, tmp_path / "dst", states=states)
    err = capsys.readouterr().err
    assert f"{SHARD} {told}: model.layers.1 and what follows is done again" in err
    assert pruned == [1, 2]
    open_checkpoint(tmp_path / "dst")
    assert_same_tensors(tmp_path / "dst", whole)
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


def test_whole_blocks_are_read_once_with_a_bar(
    src: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped(src, tmp_path / "dst", 2)
    pruned = remember_pruned(monkeypatch)
    prune(src, tmp_path / "dst", progress=True)
    assert pruned == [2]
    err = capsys.readouterr().err
    assert "checking: 100%" in err and "done again" not in err
    assert_same_tensors(tmp_path / "dst", whole)


@pytest.mark.parametrize("name", [SHARD, "model-00001-of-00004.safetensors", "tokenizer.json"])
def test_a_complete_run_is_not_published_damaged(
    src: Path, whole: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    home = complete(src, tmp_path / "dst")
    (home / "checkpoint" / name).unlink()
    prune(src, tmp_path / "dst")
    assert f"{name} is missing" in capsys.readouterr().err
    assert names(tmp_path / "dst") == names(whole)
    assert_same_tensors(tmp_path / "dst", whole)


def test_a_directory_that_is_gone_is_made_anew(src: Path, whole: Path, tmp_path: Path) -> None:
    for home in (stopped(src, tmp_path / "a", 2), complete(src, tmp_path / "b")):
        shutil.rmtree(home / "checkpoint")
    for name in "ab":
        prune(src, tmp_path / name)
        assert_same_tensors(tmp_path / name, whole)


@pytest.mark.parametrize("damage", [Path.unlink, flip])
def test_hidden_states_are_looked_at_too(
    src: Path,
    whole: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = stopped(src, tmp_path / "dst", 2, states="files")
    damage(home / "states" / "1-0.safetensors")  # batch 1, as it enters block 2
    pruned = remember_pruned(monkeypatch)
    prune(src, tmp_path / "dst", states="files")
    assert "are run again for their states" in capsys.readouterr().err
    assert pruned == [2]
    assert_same_tensors(tmp_path / "dst", whole)


def of_an_earlier_version(home: Path) -> None:
    """Takes the checksums out of a journal."""
    path = home / "journal.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        entry.pop("sha256", None)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_a_journal_without_checksums_compares_sizes(
    src: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = stopped(src, tmp_path / "dst", 2)
    of_an_earlier_version(home)
    prune(src, tmp_path / "dst")
    err = capsys.readouterr().err
    assert "without checksums: sizes were compared" in err and "done again" not in err
    assert_same_tensors(tmp_path / "dst", whole)
    home = stopped(src, tmp_path / "other", 2)
    of_an_earlier_version(home)
    shutil.copy(home / "checkpoint" / SHARD.replace("3", "2", 1), home / "checkpoint" / SHARD)
    prune(src, tmp_path / "other")
    assert f"{SHARD} holds other tensors than were written" in capsys.readouterr().err
    assert_same_tensors(tmp_path / "other", whole)


def test_a_file_that_the_journal_puts_elsewhere_is_not_read(
    src: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = stopped(src, tmp_path / "dst", 2)
    path = home / "journal.jsonl"
    path.write_text(path.read_text().replace(f'"{SHARD}"', f'"../{SHARD}"'))
    prune(src, tmp_path / "dst")
    assert "no file of a checkpoint" in capsys.readouterr().err
    assert_same_tensors(tmp_path / "dst", whole)
    assert isinstance(wanda_ext.PruneReport.load(tmp_path / "dst" / run.REPORT).left, dict)
