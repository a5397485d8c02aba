"""Directories that appear whole or not at all, and the headers of the safetensors files in them."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

MARKER = "wanda_ext.json"  # lists the files of an output directory: what we may replace


@dataclass(frozen=True)
class TensorHeader:
    """Where a stored tensor lies, its safetensors dtype ("BF16", "I16", ...) and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a directory beside `path`; on success it is synced to disk and takes that name.

    On any failure it is removed; a killed process leaves at most a hidden `.<name>.*` beside, never
    a half-written `path`. An existing `path` is replaced if it is empty or holds nothing but files
    that an earlier `new_directory` wrote there (its wanda_ext.json lists them).

    Raises ValueError, before anything is written, for any other existing `path`.
    """
    final = Path(path).resolve()
    check_replaceable(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        yield partial
        publish(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, final: Path) -> None:
    """Gives a complete directory its final name, in the place of an earlier one of ours."""
    files = sorted({*_files_under(partial), MARKER})
    (partial / MARKER).write_text(json.dumps({"files": files}, indent=2) + "\n")
    sync_tree(partial)
    check_replaceable(final)
    _replace(final, partial, final.with_name(f".{final.name}.{secrets.token_hex(4)}.old"))


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """The header of every tensor in safetensors files; ValueError names a missing or cut file."""
    headers: dict[str, TensorHeader] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    stored = tensors.get_slice(name)
                    header = TensorHeader(file, stored.get_dtype(), tuple(stored.get_shape()))
                    if name in headers:
                        raise ValueError(
                            f"{name} is stored in {headers[name].file} and again in {file}"
                        )
                    headers[name] = header
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{file} is not a whole safetensors file ({error}); copy or download it again"
            ) from error
    return headers


def check_replaceable(path: Path) -> None:
    """Raises ValueError where a path is, or holds, what no `publish` wrote."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; expected a directory to write")
    present = _files_under(path)
    if not present and not any(path.iterdir()):
        return
    try:
        ours = set(json.loads((path / MARKER).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    foreign = sorted(set(present) - ours)
    if foreign or not present:
        raise ValueError(
            f"{path} exists and holds what wanda_ext did not write "
            f"({', '.join(foreign[:3]) or 'empty directories'}); name another, or remove it"
        )


def _files_under(folder: Path) -> list[str]:
    return [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    ]


def sync_tree(folder: Path) -> None:
    """Makes all that lies in a directory survive a crash of the machine."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(final: Path, partial: Path, old: Path) -> None:
    if final.exists():
        final.rename(old)
    try:
        partial.rename(final)
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
