"""Output directories appear whole or not at all, and never replace what is not ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh_python import python_options
from safetensors.torch import save_file

from wanda_ext.files.directory import MARKER, new_directory, read_headers


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, text: str = "new") -> None:
    with new_directory(path) as folder:
        (folder / "a.txt").write_text(text)


def test_appears_with_its_files_and_a_list_of_them(tmp_path):
    write(tmp_path / "deep" / "out")
    assert listing(tmp_path / "deep") == ["out"]
    assert listing(tmp_path / "deep" / "out") == ["a.txt", MARKER]
    assert (tmp_path / "deep" / "out").stat().st_mode == (tmp_path / "deep").stat().st_mode


def test_replaces_what_it_wrote_before_and_an_empty_directory(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "old")
    write(tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_text() == "new"
    assert listing(tmp_path) == ["out"]


def test_refuses_a_directory_with_anything_else_in_it(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"did not write \(mine\.txt\)"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("marker", [None, "{}", "[1]", '{"files": 3}', "no json"])
def test_refuses_a_foreign_directory(tmp_path, marker):
    (tmp_path / "a.txt").write_text("old")
    if marker is not None:
        (tmp_path / MARKER).write_text(marker)
    with pytest.raises(ValueError, match="exists and holds"):
        write(tmp_path)


def test_refuses_a_file(tmp_path):
    (tmp_path / "out").write_text("old")
    with pytest.raises(ValueError, match="is a file"):
        write(tmp_path / "out")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_writer_leaves_nothing_and_the_old_directory(tmp_path, error):
    write(tmp_path / "out", "old")
    with pytest.raises(error), new_directory(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("half")
        raise error
    assert listing(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a.txt").read_text() == "old"


def test_refuses_what_appeared_meanwhile(tmp_path):
    with (
        pytest.raises(ValueError, match="exists and holds"),
        new_directory(tmp_path / "out") as folder,
    ):
        (folder / "a.txt").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("precious")
    assert listing(tmp_path / "out") == ["mine.txt"]


def test_a_killed_writer_leaves_nothing_under_the_name(tmp_path):
    code = f"""
from wanda_ext.files.directory import new_directory
with new_directory({str(tmp_path / "out")!r}) as folder:
    (folder / "half.txt").write_text("half")
    print("writing", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        **python_options(),
    ) as writer:
        assert writer.stdout.readline() == b"writing\n"
        os.kill(writer.pid, signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert all(name.startswith(".out.") for name in listing(tmp_path))


def test_headers(tmp_path):
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(4, dtype=torch.int16)}, tmp_path / "2.safetensors")
    headers = read_headers([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert [(h.file.name, h.dtype, h.shape, h.numel) for h in headers.values()] == [
        ("1.safetensors", "BF16", (2, 3), 6),
        ("2.safetensors", "I16", (4,), 4),
    ]


def test_headers_of_damaged_files(tmp_path):
    file, again = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file({"a": torch.zeros(64)}, file)
    again.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"a is stored in .*1\.safetensors and again in"):
        read_headers([file, again])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"1\.safetensors is not a whole safetensors file"):
        read_headers([file])
    with pytest.raises(ValueError, match=r"3\.safetensors is not a whole safetensors file"):
        read_headers([tmp_path / "3.safetensors"])
