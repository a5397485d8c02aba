"""The checkpoint that a streamed prune writes: its files are those of the source.

A tensor lies in the file that had it there, and a new one where that of which it is made lay. Such
a file takes tensors of many blocks, so that every block first writes pieces, one for each file it
has tensors in: pieces/FILE/BLOCK.safetensors. In the end the pieces of a file are joined.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from wanda_ext.checkpoint import (
    INDEX,
    PACKED,
    Group,
    Made,
    WandaExtConfig,
    check_some_packed,
    copy_other_files,
    stay_dense,
    write_config,
    write_index,
)
from wanda_ext.files import Stored, is_plain, stored_tensors, sync_path, write_shard
from wanda_ext.packed import FORMATS, PackedLinear, looks_dense, pack, stored_linears
from wanda_ext.packed.bitmap import LOOKED_AT
from wanda_ext.stream.skeleton import Skeleton

Entry = dict[str, Any]  # of the journal: what a step left


class Output:
    """Writes into `folder`, by way of `pieces`; `blocks` are the names of the blocks, in order."""

    def __init__(
        self, skeleton: Skeleton, blocks: list[str], folder: Path, pieces: Path, packed: bool
    ) -> None:
        self._skeleton = skeleton
        self._blocks = blocks
        self._folder = folder
        self._pieces = pieces
        self._packed = packed
        self._linears = {
            name: module
            for name, module in skeleton.model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }
        self._reasons = stay_dense(skeleton.model)

    def write_block(self, index: int, tensors: Mapping[str, Tensor], changed: set[str]) -> Entry:
        """What to remember of a block's pieces, once they are on the disk. changed: those that are
        not, or may not be, what the source holds."""
        name = self._blocks[index]
        return self._write(name, self._skeleton.groups(name), tensors, changed)

    def write_rest(self, step: str) -> Entry:
        """The pieces of all that is in no block, as it is."""
        skeleton = self._skeleton
        groups = skeleton.groups_outside(self._blocks)
        return self._write(step, groups, skeleton.stored, set(), skeleton.unknown)

    def read_block(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of a block that was written, dense."""
        pieces = [piece_file(self._pieces, file, entry["step"]) for file in entry["pieces"]]
        stored = stored_tensors(pieces)
        read: dict[str, Callable[[], Tensor]] = {name: one.read for name, one in stored.items()}
        for kind in FORMATS if entry["packed"] else ():
            for name, parts in stored_linears(stored, kind).items():
                for short in parts:
                    del read[f"{name}.{short}"]
                read[f"{name}.weight"] = partial(_unpacked, kind, parts)
        tensors = self._skeleton.loaded(read)
        for name in entry["packed"]:
            if isinstance(self._linears[name], Conv1D):
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"].T.contiguous()
        return tensors

    def join(self, file: str, entries: Iterable[Entry], seen: Callable[[int], object]) -> str:
        """Makes a file of the checkpoint of all its pieces; its sha256, once it is on the disk.

        seen(count) is told of the bytes as they are written.
        """
        steps = [entry["step"] for entry in entries if file in entry["pieces"]]
        stored = stored_tensors(piece_file(self._pieces, file, step) for step in steps)
        digest = write_shard(self._folder / file, stored, seen=seen).sha256
        sync_path(self._folder)
        return digest

    def finish(self, entries: list[Entry], code: bool) -> dict[str, str]:
        """Index, config and the source's other files, beside the joined ones; name -> why, of those
        that are left."""
        skeleton = self._skeleton
        source = skeleton.checkpoint
        files = files_of(entries)
        _keep_only(self._folder, files)
        left = copy_other_files(
            source.folder, self._folder, code, {*source.files().values(), INDEX}
        )
        config = self._quantization_config(entries).to_dict() if self._packed else None
        write_config(self._folder, source.config, skeleton.asked, config)
        stored = stored_tensors(self._folder / file for file in files)
        layout = {name: one.file.name for name, one in stored.items()}
        size = sum(one.nbytes for one in stored.values())
        parameters = skeleton.model.num_parameters()
        parameters += sum(entry["parameters"] for entry in entries)
        write_index(self._folder, source, layout, size, parameters, {} if self._packed else None)
        return left

    def _write(
        self,
        step: str,
        groups: Iterable[Group],
        tensors: Mapping[str, Tensor | Stored | Made],
        changed: set[str],
        more: Mapping[str, Stored] | None = None,
    ) -> Entry:
        files: dict[str, dict[str, Tensor | Stored]] = defaultdict(dict)
        for name, one in (more or {}).items():
            files[one.file.name][name] = one
        packed: dict[str, tuple[str, dict[str, int]]] = {}
        dense: dict[str, str] = {}
        parameters = 0
        for group in groups:
            made = {n: tensors[self._skeleton.first(n)] for n in self._skeleton.made(group)}
            inside: dict[str, dict[str, Tensor]] = {}
            for name in self._packable(made):
                try:
                    kind, parts = self._pack(name, made[f"{name}.weight"])
                except ValueError as reason:
                    dense[name] = str(reason)
                else:
                    inside[name] = parts
                    packed[name] = kind.FORMAT, kind.options(parts)
                    parameters -= self._linears[name].weight.numel()
                    parameters += sum(t.numel() for s, t in parts.items() if s in kind.PARAMETERS)
            saved: Mapping[str, Tensor | Stored] = self._skeleton.source(group)
            if inside or changed & {self._skeleton.first(name) for name in made}:
                now = {n: t if isinstance(t, Tensor) else t.read() for n, t in made.items()}
                saved = self._skeleton.conversion.saved(group, now, inside)
            for name, tensor in saved.items():
                files[group.file_of(name, self._skeleton.files)][name] = tensor
        pieces = {file: self._write_piece(file, step, here) for file, here in files.items()}
        sync_path(self._pieces)
        return {"pieces": pieces, "packed": packed, "dense": dense, "parameters": parameters}

    def _write_piece(self, file: str, step: str, tensors: Mapping[str, Tensor | Stored]) -> str:
        path = piece_file(self._pieces, file, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = write_shard(path, tensors).sha256
        sync_path(path.parent)
        return digest

    def _packable(self, made: Iterable[str]) -> list[str]:
        names = (name.removesuffix(".weight") for name in made if self._packed)
        return [name for name in names if name in self._linears and name not in self._reasons]

    def _pack(
        self, name: str, weight: Tensor | Stored | Made
    ) -> tuple[type[PackedLinear], dict[str, Tensor]]:
        turned = isinstance(self._linears[name], Conv1D)
        if isinstance(weight, Stored) and not turned:
            first = weight.read(LOOKED_AT)
            if looks_dense(first):
                pack(first)  # raises what it would for all of it
        if not isinstance(weight, Tensor):
            weight = weight.read()
        return pack((weight.T if turned else weight).cpu())

    def _quantization_config(self, entries: list[Entry]) -> WandaExtConfig:
        """As swap_linears would have it. Raises ValueError where nothing could be packed."""
        found = {name: tuple(one) for entry in entries for name, one in entry["packed"].items()}
        outcome = {name: reason for entry in entries for name, reason in entry["dense"].items()}
        outcome |= dict.fromkeys(found, PACKED)
        outcome = {name: self._reasons.get(name) or outcome[name] for name in self._linears}
        packed = {name: found[name] for name, what in outcome.items() if what == PACKED}
        check_some_packed(outcome)
        turned = [name for name in packed if isinstance(self._linears[name], Conv1D)]
        dense = {name: reason for name, reason in outcome.items() if reason != PACKED}
        return WandaExtConfig.of(packed, turned, dense)


def _unpacked(kind: type[PackedLinear], stored: Mapping[str, Stored]) -> Tensor:
    return kind.unpack({short: one.read() for short, one in stored.items()})


def piece_file(pieces: Path, file: str, step: str) -> Path:
    """Where a step's piece of a file lies. Raises ValueError for what is no name of a file."""
    if not is_plain(file):
        raise ValueError(
            f"{pieces.parent}: the journal names {file!r}, which is no file of a checkpoint: pass "
            "resume=False to start anew"
        )
    return pieces / file / f"{step}.safetensors"


def files_of(entries: Iterable[Entry]) -> list[str]:
    """The checkpoint's files of tensors, by the pieces that there are."""
    return sorted({file for entry in entries for file in entry["pieces"]})


def _keep_only(folder: Path, files: Container[str]) -> None:
    """Removes all else: a run that was killed may have written half of it."""
    for path in folder.iterdir():
        if path.name not in files:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
