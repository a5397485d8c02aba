"""Safetensors files written and read tensor by tensor, against the library's own code."""

from __future__ import annotations

import json
import resource
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from fresh_python import run_python
from safetensors.torch import load_file, save_file

from wanda_ext.files.shards import COPIED_AT_ONCE, sha256_of, stored_tensors, write_shard

TENSORS = {
    "matrix": torch.arange(12.0).reshape(3, 4),
    "half": torch.randn(5).bfloat16(),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 4),
    "bits": torch.tensor([True, False]),
    "größe": torch.tensor([-1], dtype=torch.int16),
}


def test_the_librarys_bytes(tmp_path: Path) -> None:
    seen: list[int] = []
    written = write_shard(tmp_path / "ours", TENSORS, seen=seen.append)
    save_file(TENSORS, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert written.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    assert written.sha256 == sha256((tmp_path / "ours").read_bytes()).hexdigest()
    assert written.sha256 == sha256_of(tmp_path / "ours")
    assert sum(seen) == (tmp_path / "ours").stat().st_size


def test_read_is_what_was_written(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "file")
    found = stored_tensors([tmp_path / "file"])
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name].read(), tensor) and found[name].dtype == tensor.dtype
    assert torch.equal(found["matrix"].read(rows=2), TENSORS["matrix"][:2])
    assert torch.equal(found["matrix"].read(rows=9), TENSORS["matrix"])


def test_copied_and_cast_in_pieces(tmp_path: Path) -> None:
    from dataclasses import replace

    large = torch.randn(COPIED_AT_ONCE // 4 + 5)
    turned = torch.randn(6, 4).T
    write_shard(tmp_path / "a", {"large": large, "turned": turned})
    stored = stored_tensors([tmp_path / "a"])
    half = replace(stored["large"], dtype=torch.bfloat16)
    written = write_shard(tmp_path / "b", {"same": stored["large"], "half": half, "t": turned})
    found = load_file(tmp_path / "b")
    assert torch.equal(found["same"], large) and torch.equal(found["half"], large.bfloat16())
    assert torch.equal(found["t"], turned)
    assert written.nbytes == large.nbytes * 3 // 2 + turned.nbytes
    assert torch.equal(half.read(), large.bfloat16())


def test_a_file_that_shrank_is_told(tmp_path: Path) -> None:
    write_shard(tmp_path / "file", TENSORS)
    found = stored_tensors([tmp_path / "file"])
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-20])
    last = max(found.values(), key=lambda one: one.start)
    with pytest.raises(ValueError, match="file is cut short"):
        last.read()
    with pytest.raises(ValueError, match="file is cut short"):
        write_shard(tmp_path / "copy", {"last": last})


def test_an_unknown_dtype_is_told(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    with pytest.raises(ValueError, match="holds x as F4"):
        stored_tensors([tmp_path / "file"])


def test_a_file_that_grows_too_large_is_an_error(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_shard(tmp_path / "file", {"x": torch.zeros(4096)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_open_file_takes_no_memory(tmp_path: Path) -> None:
    """Copying and reading 64 MB takes the memory of a piece, and of what is read."""
    write_shard(tmp_path / "a", {f"{i}": torch.ones(1 << 20) for i in range(16)})
    code = """
import sys
from pathlib import Path
from wanda_ext.files.shards import COPIED_AT_ONCE, sha256_of, stored_tensors, write_shard
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
folder = Path(sys.argv[1])
stored = stored_tensors([folder / "a"])
before = peak()
write_shard(folder / "b", stored)
for tensor in stored.values():
    tensor.read()
print(peak() - before)
"""
    result = run_python(code, str(tmp_path))
    assert int(result.stdout) < 40, result.stderr
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
