"""A checkpoint written again with what became of its model in memory.

Files, names and pieces are those of the source, so that nothing gets lost that the model's class
does not know, or has under another name: a tensor that is as it was is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanda_ext.checkpoint.conversion import Conversion, Group
from wanda_ext.checkpoint.convert import write_index, write_json
from wanda_ext.checkpoint.other_files import copy_other_files
from wanda_ext.checkpoint.quantizer import packed_linears
from wanda_ext.checkpoint.reader import INDEX, Checkpoint
from wanda_ext.checkpoint.save import in_form
from wanda_ext.files import Stored, write_shard

DTYPE_ENTRIES = ("dtype", "torch_dtype")


def save_over(
    source: Checkpoint,
    model: Any,
    folder: Path,
    packed: bool = False,
    dtype: torch.dtype | None = None,
    code: bool = False,
) -> dict[str, str]:
    """Writes `model`, which was loaded from `source`, and all else that lies there, into `folder`.

    packed: pruned linears packed. dtype: what the caller asked it to be loaded as; None: as stored.
    code: whether .py files go along. The model is left as it was.

    Returns file -> why, of what was left, and tensor -> why, where transformers has no way back to
    its name. Raises ValueError, as save_pretrained does, for a model with nothing to pack.
    """
    with in_form(model, packed):
        files = source.stored()
        writer = _Writer(model, files, dtype)
        layout, size = writer.write(folder)
        parameters = model.num_parameters()
        write_index(folder, source, layout, size, parameters, {} if packed else None)
        entry = model.config.quantization_config.to_dict() if packed else None
    write_config(folder, source.config, dtype, entry)
    done = {*source.files().values(), INDEX}
    return writer.renamed | copy_other_files(source.folder, folder, code, done)


def write_config(
    folder: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype | None,
    quantization_config: Mapping[str, Any] | None,
) -> None:
    """The source's config.json, changed in its quantization_config and, if asked, in its dtype."""
    written = {k: v for k, v in config.items() if k != "quantization_config"}
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        written = _with_dtype(written, name)
        if not written.keys() & {*DTYPE_ENTRIES}:
            written["dtype"] = name
    if quantization_config is not None:
        written["quantization_config"] = quantization_config
    write_json(folder / "config.json", written)


class _Writer:
    def __init__(self, model: Any, files: Mapping[str, Stored], dtype: torch.dtype | None) -> None:
        self._model = model
        self._files = files
        self._asked = dtype
        self._state: dict[str, Tensor] = model.state_dict()
        self._packed = {
            name: {s: self._state[f"{name}.{s}"] for s in module.tensors()}
            for name, module in packed_linears(model).items()
        }
        self._done: set[str] = set()
        self.renamed: dict[str, str] = {}  # stored tensor -> what became of its name
        self._conversion = Conversion(model, files)
        self._group = {name: group for group in self._conversion.groups for name in group.names}

    def write(self, folder: Path) -> tuple[dict[str, str], int]:
        """Name -> file, and the bytes of all tensors."""
        places: dict[str, list[str]] = {}
        for name, stored in self._files.items():
            places.setdefault(stored.file.name, []).append(name)
        layout: dict[str, str] = {}
        size = 0
        waiting: dict[str, Tensor | Stored] = {}  # made with others, for a later file
        for file, names in sorted(places.items()):
            here: dict[str, Tensor | Stored] = {}
            for name in names:
                if name in waiting:
                    here[name] = waiting.pop(name)
                elif name not in layout and name not in here:
                    group = self._group.get(name)
                    for other, tensor in self._made(name):
                        later = group is not None and group.file_of(other, self._files) != file
                        (waiting if later else here)[other] = tensor
            size += write_shard(folder / file, here).nbytes
            layout |= dict.fromkeys(here, file)
        return layout, size

    def _made(self, name: str) -> Iterator[tuple[str, Tensor | Stored]]:
        """What is written for a stored tensor, and for those that are made with it."""
        group = self._group.get(name)
        if group is None:
            yield name, self._files[name]
            return
        if group.first in self._done:
            return
        self._done.add(group.first)
        before = self._loaded(group)
        now = {n: self._state[n] for n in before if n in self._state}
        packed = {n.removesuffix(".weight") for n in now} & self._packed.keys()
        if not packed and self._asked is None and all(_same(before[n], now[n]) for n in now):
            for part in group.names:
                yield part, self._files[part]
            return
        saved = self._conversion.saved(group, now, self._packed, strict=False)
        if not packed and saved.keys() != set(group.names):
            why = f"written as {', '.join(saved)}, the names that transformers gives"
            self.renamed |= {name: why for name in group.names if name not in saved}
        yield from saved.items()

    def _loaded(self, group: Group) -> dict[str, Tensor]:
        """A group's tensors as they were when the model was loaded."""
        return group.load(self._model, lambda name: self._files[name].read())


def _same(stored: Tensor, now: Tensor) -> bool:
    """Whether what a file holds is, in the model's dtype, what the model has."""
    if stored.shape != now.shape:
        return False
    one, other = stored.to(now.dtype), now.detach().cpu()
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def _with_dtype(entry: Any, name: str) -> Any:
    """The same config, of another dtype, and the configs of its parts."""
    if not isinstance(entry, Mapping):
        return entry
    return {
        key: name if key in DTYPE_ENTRIES and isinstance(value, str) else _with_dtype(value, name)
        for key, value in entry.items()
    }
