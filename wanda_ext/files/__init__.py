"""Safetensors on disk, whole or not at all.

Directories that appear in one step, files that are read and written tensor by tensor. Nothing here
knows what a tensor means.
"""

from __future__ import annotations

from wanda_ext.files.directory import (
    MARKER,
    TensorHeader,
    check_replaceable,
    new_directory,
    publish,
    read_headers,
    sync_tree,
)
from wanda_ext.files.inside import check_inside, is_plain, leads_out
from wanda_ext.files.shards import (
    DTYPES,
    Stored,
    sha256_of,
    stored_tensors,
    sync_path,
    write_shard,
)

__all__ = [
    "DTYPES",
    "MARKER",
    "Stored",
    "TensorHeader",
    "check_inside",
    "check_replaceable",
    "is_plain",
    "leads_out",
    "new_directory",
    "publish",
    "read_headers",
    "sha256_of",
    "stored_tensors",
    "sync_path",
    "sync_tree",
    "write_shard",
]
