"""What a streamed prune says it needs, and that it refuses where that is not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from models_24 import dense_wide
from streamed import prune, saved
from tiny_models import tiny_model, token_ids

from wanda_ext.calibration.batches import calibration_batches
from wanda_ext.checkpoint.reader import open_checkpoint
from wanda_ext.prune.plan import plan_blocks
from wanda_ext.stream import preflight, run
from wanda_ext.stream.preflight import MARGIN, Needs, needs_of
from wanda_ext.stream.skeleton import Skeleton

BLOCK = 4 * (64 * (64 + 32 + 32 + 64 + 3 * 96) + 2 * 64)  # bytes of a tiny Llama's block
EMBEDDING = 4 * 64 * 128
STATES = 8 * 32 * 64 * 4


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "src")


def needs(src: Path, folder: Path, dtype: torch.dtype | None = None, **given: Any) -> Needs:
    skeleton = Skeleton(open_checkpoint(src), dtype, False)
    plan = plan_blocks(skeleton.model, "2:4")
    batches = calibration_batches(token_ids(8, 32), batch_size=2)
    options = {"packed": False, "in_files": False, **given}
    return needs_of(skeleton, plan, batches, folder, **options)


def test_memory_is_two_blocks_and_the_states(src: Path, tmp_path: Path) -> None:
    base = needs(src, tmp_path)
    activations = STATES // 4 * preflight.ACTIVATIONS
    assert base.memory == 2 * BLOCK + STATES + activations
    assert needs(src, tmp_path, in_files=True).memory == base.memory - STATES
    assert needs(src, tmp_path, ranks=2).memory == base.memory - STATES // 2
    grams = 6 * 8 * 64**2 + 8 * 96**2 + 3 * 8 * 96**2
    assert needs(src, tmp_path, gram=True).memory == base.memory + grams


def test_disk_is_the_checkpoint_and_its_largest_file_or_the_states(
    src: Path, tmp_path: Path
) -> None:
    total = sum(p.numel() * 4 for p in tiny_model().parameters())
    assert needs(src, tmp_path).disk == int(MARGIN * 2 * total)
    assert needs(src, tmp_path, in_files=True).disk == int(MARGIN * 2 * total)
    assert needs(src, tmp_path, packed=True).disk < int(MARGIN * 2 * (total - BLOCK))
    assert needs(src, tmp_path, torch.bfloat16).disk == int(MARGIN * total)
    files = saved(tmp_path / "files", max_shard_size="150KB")
    largest = max(path.stat().st_size for path in files.glob("*.safetensors"))
    dst = tmp_path / "dst"
    told = needs(files, dst).disk
    assert MARGIN * (total + largest - 2000) < told < MARGIN * (total + largest)
    assert needs(files, dst, in_files=True).disk == max(told, int(MARGIN * (total + 2 * STATES)))
    dst.mkdir()
    (dst / "written").write_bytes(b"0" * 1000)
    assert needs(files, dst).disk == told - 1000


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", ["5GB", "150KB"])
def test_a_run_takes_no_more_disk_than_told(
    size: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense_wide(blocks=2).save_pretrained(tmp_path / "src", max_shard_size=size)
    told: list[Needs] = []
    taken: list[int] = []
    fsync = os.fsync

    def measured(descriptor: int) -> None:
        files = (path for path in tmp_path.rglob("*") if "src" not in path.parts)
        taken.append(sum(path.stat().st_size for path in files if path.is_file()))
        fsync(descriptor)

    plain = run.needs_of
    monkeypatch.setattr(run, "needs_of", lambda *given: (told.append(plain(*given)), told[-1])[1])
    monkeypatch.setattr(os, "fsync", measured)
    options = {"calib": None, "method": "magnitude", "packed": packed, "sparsity": "16:32"}
    prune(tmp_path / "src", tmp_path / "dst", **options)
    assert 0.8 * told[0].disk < max(taken) <= told[0].disk


TWO = {"*.mlp.*": "2:4", "*.self_attn.*": "8:16"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("made", "sparsity", "share"),
    [
        (dense_wide, "2:4", 1.4),
        (dense_wide, "16:32", 1.4),
        (dense_wide, 0.5, 2.1),  # how much of a surplus there will be is not known
        (dense_wide, TWO, 1.4),
        (tiny_model, "2:4", 1.5),
        (tiny_model, TWO, 1.8),  # its attention is too small for a bitmap
    ],
)
def test_disk_is_at_least_what_is_written_packed(
    made: Any, sparsity: Any, share: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    made(dtype=dtype).save_pretrained(tmp_path / "src")
    skeleton = Skeleton(open_checkpoint(tmp_path / "src"), None, False)
    plan = plan_blocks(skeleton.model, sparsity)
    told = needs_of(skeleton, plan, None, tmp_path / "dst", packed=True, in_files=False).disk
    options = {"calib": None, "method": "magnitude", "sparsity": sparsity, "packed": True}
    prune(tmp_path / "src", tmp_path / "dst", **options)
    written = sum(path.stat().st_size for path in (tmp_path / "dst").glob("*.safetensors"))
    dense = sum(p.nbytes for p in skeleton.model.parameters())
    assert 2 * written <= told <= share * dense


@pytest.mark.parametrize("short", ["disk", "memory"])
def test_refused_where_short(
    src: Path, tmp_path: Path, short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if short == "disk":
        usage = preflight.shutil.disk_usage(tmp_path)
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    else:
        monkeypatch.setattr(preflight, "_free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=f"of {short}.* 0 MB are free"):
        prune(src, tmp_path / "dst")
    assert list(tmp_path.iterdir()) == []


def test_told_before_the_work(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune(src, tmp_path / "dst", progress=True)
    told = capsys.readouterr().err.splitlines()[0]
    assert told.startswith("wanda_ext: needs about ") and "GB free" in told


def test_what_is_free_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 20 < preflight._free_memory() < 1 << 50
    files = {"memory.max": "5000\n", "memory.current": "2000\n", "meminfo": "MemAvailable: 9 kB\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    read = preflight._lines
    monkeypatch.setattr(preflight, "_lines", lambda path: read(str(tmp_path / Path(path).name)))
    assert preflight._free_memory() == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert preflight._free_memory() == 9 * 1024
