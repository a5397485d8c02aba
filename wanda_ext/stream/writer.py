"""The checkpoint that a streamed prune writes: one file a block, one for all else, an index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    write_json,
)
from wanda_ext.files import Stored, stored_tensors, write_shard
from wanda_ext.packed import FORMATS, PackedLinear, looks_dense, pack, stored_linears
from wanda_ext.packed.bitmap import LOOKED_AT
from wanda_ext.stream.skeleton import Skeleton

Entry = dict[str, Any]  # of the journal: what a file holds


class Output:
    """Writes into `folder`; `blocks` are the names of the blocks, in order."""

    def __init__(self, skeleton: Skeleton, blocks: list[str], folder: Path, packed: bool) -> None:
        self._skeleton = skeleton
        self._blocks = blocks
        self._folder = folder
        self._packed = packed
        self._linears = {
            name: module
            for name, module in skeleton.model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }
        self._reasons = stay_dense(skeleton.model)

    def write_block(self, index: int, tensors: Mapping[str, Tensor], changed: set[str]) -> Entry:
        """What to remember of the file, once it is on the disk. changed: those that are not, or may
        not be, what the source holds."""
        groups = self._skeleton.groups(self._blocks[index])
        return self._write(index + 1, groups, tensors, changed)

    def write_rest(self) -> Entry:
        """All that is in no block, as it is."""
        skeleton = self._skeleton
        groups = skeleton.groups_outside(self._blocks)
        return self._write(0, groups, skeleton.stored, set(), skeleton.unknown)

    def read_block(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of a block that was written, dense."""
        stored = stored_tensors([self._folder / entry["file"]])
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

    def finish(self, entries: Iterable[Entry], code: bool) -> dict[str, str]:
        """Index, config and the source's other files; name -> why, of those that are left."""
        entries = list(entries)
        skeleton = self._skeleton
        source = skeleton.checkpoint
        done = {*source.files().values(), INDEX}
        left = copy_other_files(source.folder, self._folder, code, done)
        parameters = skeleton.model.num_parameters()
        parameters += sum(entry["parameters"] for entry in entries)
        entry = self._quantization_config(entries).to_dict() if self._packed else None
        write_config(self._folder, source.config, skeleton.asked, entry)
        total = sum(entry["bytes"] for entry in entries)
        layout = {name: entry["file"] for entry in entries for name in entry["names"]}
        metadata = {"total_parameters": parameters, "total_size": total}
        write_json(self._folder / INDEX, {"metadata": metadata, "weight_map": layout})
        return left

    def _write(
        self,
        number: int,
        groups: Iterable[Group],
        tensors: Mapping[str, Tensor | Stored | Made],
        changed: set[str],
        more: Mapping[str, Stored] | None = None,
    ) -> Entry:
        file = f"model-{number + 1:05d}-of-{len(self._blocks) + 1:05d}.safetensors"
        saved: dict[str, Tensor | Stored] = dict(more or {})
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
            if inside or changed & {self._skeleton.first(name) for name in made}:
                now = {n: t if isinstance(t, Tensor) else t.read() for n, t in made.items()}
                saved |= self._skeleton.conversion.saved(group, now, inside)
            else:
                saved |= self._skeleton.source(group)
        size, digest = write_shard(self._folder / file, saved)
        told = {"packed": packed, "dense": dense, "parameters": parameters}
        return {"file": file, "bytes": size, "sha256": digest, "names": list(saved), **told}

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
