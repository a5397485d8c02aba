"""Checkpoints that keep tensors under other names, or in other pieces, than the model's modules.

transformers has the rules (experts one by one or fused, older names, ...) and applies them to whole
checkpoints when it loads and saves. Here the same rules work on a part of one, both ways.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping

from wanda_ext.checkpoint import open_checkpoint
from wanda_ext.files import Stored, stored_tensors

Loading: Any = core_model_loading  # untyped


@dataclass(frozen=True)
class Group:
    """Stored tensors that become tensors of the model together, or one under another name."""

    first: str  # the model's tensor that they become; of several, the first
    rule: Any  # None: one tensor, as it is
    parts: list[tuple[str, str]]  # (the rule's pattern, the name in the file), in their order

    def load(self, model: Any, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The model's tensors by name; read(name) gives a stored one."""
        if self.rule is None:
            return {self.first: read(self.parts[0][1])}
        rule = deepcopy(self.rule)  # it collects what it converts
        for pattern, name in self.parts:
            rule.add_tensor(self.first, name, pattern, partial(read, name))
        made = rule.convert(self.first, model=model, config=model.config)
        made = made[0] if isinstance(made, tuple) else made  # of transformers 5.0
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


class Conversion:
    """How tensors of these stored names become a model's; `unknown`: those that become none."""

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        here = model.state_dict()
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, Loading.WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, Loading.WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        place = partial(self._place, model.base_model_prefix, here)
        groups: dict[str, Group] = {}
        self.unknown: list[str] = []
        for name in sorted(names, key=Loading.dot_natural_key):  # as from_pretrained orders them
            first, pattern = place(name, renamings, converters)
            if first not in here:
                first, pattern = place(name, [], [])
            if first in here:
                group = Group(first, by_pattern[pattern] if pattern else None, [])
                groups.setdefault(first, group).parts.append((pattern or name, name))
            else:
                self.unknown.append(name)
        self.groups = list(groups.values())
        # Those that save_pretrained reverts; transformers 5.0 reverts all.
        self.used = [rule for rule in rules if not hasattr(rule, "was_used") or rule.was_used()]

    @staticmethod
    def _place(
        prefix: str, here: Mapping[str, Tensor], name: str, renamings: Any, converters: Any
    ) -> tuple[str, str | None]:
        found: tuple[str, str | None] = Loading.rename_source_key(
            name, renamings, converters, prefix, here
        )
        return found


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor of the model that is made of stored ones, which `parts` has by name."""

    model: Any
    group: Group
    parts: Mapping[str, Stored]
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def joined_bytes(self) -> int:
        """Of all that is read to make it."""
        return sum(part.nbytes for part in self.parts.values())

    def read_group(self) -> dict[str, Tensor]:
        """It, and the others that are made with it."""
        return self.group.load(self.model, lambda name: self.parts[name].read())

    def read(self) -> Tensor:
        return self.read_group()[self.name]


def left_over(model: Any, folder: str | os.PathLike[str]) -> dict[str, Stored]:
    """The stored tensors of a checkpoint that become none of its model's, by their names there.

    model: as it was loaded. Raises ValueError for a directory that `open_checkpoint` refuses.
    """
    headers = open_checkpoint(folder).headers
    files = stored_tensors(sorted({header.file for header in headers.values()}))
    return {name: files[name] for name in Conversion(model, files).unknown}


def made_of(model: Any, group: Group, parts: Mapping[str, Stored]) -> dict[str, Stored | Made]:
    """What a group becomes, by name in the model. Raises what transformers raises if it cannot."""
    if group.rule is None:
        return {group.first: next(iter(parts.values()))}
    empty = group.load(
        model, lambda name: torch.empty(parts[name].shape, dtype=parts[name].dtype, device="meta")
    )
    return {
        name: Made(model, group, parts, name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in empty.items()
    }


def as_saved(model: Any, tensors: Mapping[str, Tensor | Stored | Made]) -> dict[str, Any]:
    """Tensors of the model under the names, and in the pieces, that save_pretrained gives them.

    Stored ones that get a name alone are not read.
    """
    empty = {
        name: torch.empty(one.shape, dtype=one.dtype, device="meta")
        for name, one in tensors.items()
    }
    renamed = {id(one) for one in _reverted(model, empty).values()}
    given = {
        name: one
        if isinstance(one, Tensor) or (isinstance(one, Stored) and id(empty[name]) in renamed)
        else one.read()
        for name, one in tensors.items()
    }
    return _reverted(model, given)


def _reverted(model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    saved: dict[str, Any] = Loading.revert_weight_conversion(model, dict(tensors))
    return saved
