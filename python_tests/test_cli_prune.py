"""`wanda-ext prune` on a directory: block by block where that can be, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import tiny_model, tiny_tokenizer

from wanda_ext import cli, shards


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "dense"
    tiny_model().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    text = " ".join(f"word{i} of line {i % 7}" for i in range(200))
    (directory.parent / "text.txt").write_text(text)
    return directory


def prune(saved: Path, out: Path, *more: str) -> int:
    calib = str(saved.parent / "text.txt")
    options = ["--calib", calib, "--nsamples", "4", "--seqlen", "32", *more]
    return cli.main(["prune", str(saved), "--out", str(out), *options])


def weights(directory: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    return dict(model.named_parameters())


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("wanda-ext: ")]
    assert len(said) == 1, said
    return said[0]


def test_directories_are_pruned_block_by_block(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(saved, tmp_path / "files", "--states", "files") == 0
    assert "Pruned block by block; saved dense" in capsys.readouterr().out
    assert prune(saved, tmp_path / "memory", "--in-memory") == 0
    assert "Pruned in memory; saved dense" in capsys.readouterr().out
    expected = weights(tmp_path / "memory")
    for name, parameter in weights(tmp_path / "files").items():
        assert torch.equal(parameter, expected[name]), name


def test_what_cannot_go_block_by_block_goes_in_memory(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("gpt_neox").save_pretrained(tmp_path / "neox")
    tiny_tokenizer().save_pretrained(tmp_path / "neox")
    options = ["--out", str(tmp_path / "out"), "--method", "magnitude"]
    assert cli.main(["prune", str(tmp_path / "neox"), *options]) == 0
    told = capsys.readouterr()
    assert "pruning in memory, for " in told.err and "embed_out" in told.err
    assert "Pruned in memory" in told.out


def test_restart_begins_anew(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = "wanda_ext.writer.write_shard"
    plain = shards.write_shard

    def full(path: Path, *rest: Any) -> int:
        if path.name.startswith("model-00003"):
            raise OSError("No space left on device")
        return plain(path, *rest)

    monkeypatch.setattr(writer, full)
    assert prune(saved, tmp_path / "out") == 1
    assert "No space left" in one_line(capsys)
    monkeypatch.undo()
    assert prune(saved, tmp_path / "out", "--seed", "1") == 1
    assert "seed (0 then, 1 now)" in one_line(capsys)
    assert prune(saved, tmp_path / "out", "--seed", "1", "--restart") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_processes_do_not_share_what_is_in_memory(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    assert prune(saved, tmp_path / "out", "--in-memory") == 1
    assert "only where it goes block by block" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []
