"""A resumed run looks at what is on the disk: each file once, by its checksum."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamed import contents, names, prune, saved

from wanda_ext.checkpoint.reader import open_checkpoint
from wanda_ext.prune.prune import PruneError
from wanda_ext.stream import journal as journal_module
from wanda_ext.stream import run, writer

ONE, TWO, THREE, FOUR = (f"model-0000{i}-of-00004.safetensors" for i in range(1, 5))
PIECE = f"pieces/{TWO}/model.layers.1.safetensors"  # of the second of three blocks
REST = f"pieces/{ONE}/rest.safetensors"


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four files; each of the first three has parts of two blocks."""
    return saved(tmp_path_factory.mktemp("models") / "src", max_shard_size="150KB")


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
    return failing(src, dst, journal_module, "publish", lambda folder, final: True)


def joining(src: Path, dst: Path, at: str) -> Path:
    """The directory of a run that was stopped when it was to join one of the files."""
    return failing(src, dst, writer, "write_shard", lambda path, *_, **__: path.name == at)


def failing(
    src: Path, dst: Path, module: Any, name: str, here: Callable[..., bool], **options: Any
) -> Path:
    """The directory of a run that failed where `here` says so of the call of a function."""
    plain = getattr(module, name)

    def full(*given: Any, **named: Any) -> Any:
        if here(*given, **named):
            raise OSError("stopped here")
        return plain(*given, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PruneError, match="stopped here"):
        patch.setattr(module, name, full)
        prune(src, dst, **options)
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
    damage(home / PIECE)
    pruned = remember_pruned(monkeypatch)
    prune(src, tmp_path / "dst", states=states)
    err = capsys.readouterr().err
    assert f"{PIECE} {told}: model.layers.1 and what follows is done again" in err
    assert pruned == [1, 2]
    open_checkpoint(tmp_path / "dst")
    assert contents(tmp_path / "dst") == contents(whole)
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
    assert "checking: 100%" in err and "joining: 100%" in err and "done again" not in err
    assert contents(tmp_path / "dst") == contents(whole)


@pytest.mark.parametrize(
    ("name", "again"),
    [(TWO, "model.layers.0 and what follows"), ("tokenizer.json", "the last step")],
)
@pytest.mark.parametrize("how", ["missing", "flipped"])
def test_a_complete_run_is_not_published_damaged(
    src: Path,
    whole: Path,
    tmp_path: Path,
    name: str,
    again: str,
    how: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = complete(src, tmp_path / "dst")
    damage, told = DAMAGES[how]
    damage(home / "checkpoint" / name)
    prune(src, tmp_path / "dst")
    assert f"{name} {told}: {again} is done again" in capsys.readouterr().err
    assert names(tmp_path / "dst") == names(whole)
    assert contents(tmp_path / "dst") == contents(whole)


def test_the_rest_is_looked_at_too(
    src: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flip(joining(src, tmp_path / "dst", ONE) / REST)
    pruned = remember_pruned(monkeypatch)
    prune(src, tmp_path / "dst")
    assert f"{REST} is damaged: rest and what follows is done again" in capsys.readouterr().err
    assert pruned == []
    assert contents(tmp_path / "dst") == contents(whole)


@pytest.mark.parametrize("damaged", ["", f"checkpoint/{TWO}", f"pieces/{THREE}/rest.safetensors"])
def test_a_run_that_joins_goes_on(
    src: Path,
    whole: Path,
    tmp_path: Path,
    damaged: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = joining(src, tmp_path / "dst", THREE)
    assert names(home / "checkpoint") == [ONE, TWO]
    assert names(home / "pieces") == [THREE, FOUR]  # the others made room
    if damaged:
        flip(home / damaged)
    pruned = remember_pruned(monkeypatch)
    prune(src, tmp_path / "dst")
    assert pruned == ([0, 1, 2] if damaged else [])  # their pieces are gone
    assert (f"{damaged} is damaged" in capsys.readouterr().err) == bool(damaged)
    assert contents(tmp_path / "dst") == contents(whole)


def test_what_was_half_written_is_written_anew(src: Path, whole: Path, tmp_path: Path) -> None:
    home = joining(src, tmp_path / "dst", FOUR)
    (home / "checkpoint" / FOUR).write_bytes(b"half")
    (home / "checkpoint" / "tokenizer.json").write_text("{")
    (home / "checkpoint" / "half").mkdir()
    prune(src, tmp_path / "dst")
    assert contents(tmp_path / "dst") == contents(whole)
    assert names(tmp_path / "dst") == names(whole)


def test_ctrl_c_stops_the_joining(
    src: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = writer.Output.join

    def interrupted(self: Any, file: str, *rest: Any) -> str:
        if file == TWO:
            os.kill(os.getpid(), signal.SIGINT)
        return join(self, file, *rest)

    monkeypatch.setattr(writer.Output, "join", interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        prune(src, tmp_path / "dst")
    monkeypatch.undo()
    assert "goes on from there" in stopped.value.left  # type: ignore[attr-defined]
    assert not (tmp_path / "dst").exists()
    pruned = remember_pruned(monkeypatch)
    prune(src, tmp_path / "dst")
    assert pruned == []
    assert contents(tmp_path / "dst") == contents(whole)


def test_a_directory_that_is_gone_is_made_anew(src: Path, whole: Path, tmp_path: Path) -> None:
    for home in (stopped(src, tmp_path / "a", 2), complete(src, tmp_path / "b")):
        for name in ("checkpoint", "pieces"):
            shutil.rmtree(home / name)
    for name in "ab":
        prune(src, tmp_path / name)
        assert contents(tmp_path / name) == contents(whole)


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
    assert contents(tmp_path / "dst") == contents(whole)


def test_a_journal_of_an_earlier_version_is_refused(src: Path, whole: Path, tmp_path: Path) -> None:
    path = stopped(src, tmp_path / "dst", 2) / "journal.jsonl"
    path.write_text(path.read_text().replace('"journal": 2, ', ""))
    with pytest.raises(ValueError, match=r"journal \(None then, 2 now\).*resume=False"):
        prune(src, tmp_path / "dst")
    prune(src, tmp_path / "dst", resume=False)
    assert contents(tmp_path / "dst") == contents(whole)


def test_a_file_that_the_journal_puts_elsewhere_is_not_read(src: Path, tmp_path: Path) -> None:
    path = stopped(src, tmp_path / "dst", 2) / "journal.jsonl"
    path.write_text(path.read_text().replace(f'"{TWO}": "', f'"../{TWO}": "'))
    told = r"names '\.\./model.*no file of a checkpoint: pass resume=False"
    with pytest.raises(ValueError, match=told):
        prune(src, tmp_path / "dst")
