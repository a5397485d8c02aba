"""Checkpoints that keep tensors under other names, or in other pieces, than the model's modules.

transformers has the rules (experts one by one or fused, older names, ...) and applies them to whole
checkpoints when it loads and saves. Here the same rules work on a part of one, both ways.

The tensors of a packed linear are stored one by one, however the files keep its dense weight: what
joins or turns weights knows nothing of them.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping

from wanda_ext.files import Stored
from wanda_ext.packed import FORMATS

Loading: Any = core_model_loading  # untyped
Packed = Mapping[str, Mapping[str, Tensor]]  # linear -> its packed tensors, by their short names
_NONE = object()
SHORT = sorted({short for kind in FORMATS for short in kind.TENSORS})


@dataclass(frozen=True)
class Group:
    """Stored tensors that become tensors of the model together, or one under another name."""

    first: str  # the model's tensor that they become; of several, the first
    rule: Any  # None: one tensor, as it is
    parts: list[tuple[str, str]]  # (the rule's pattern, the name in the file), in their order

    @property
    def names(self) -> list[str]:
        """In the files."""
        return [name for _, name in self.parts]

    def file_of(self, name: str, files: Mapping[str, Stored]) -> str:
        """Where a tensor that the group is written as lies: in the source's file of that name's
        tensor, or, of a new name, in the first file that holds a part."""
        holders = [name] if name in files else self.names
        return min(files[holder].file.name for holder in holders)

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
        self._model = model
        self._here: dict[str, Any] = model.state_dict()
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, Loading.WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, Loading.WeightConverter)]
        by_pattern = {p: rule for rule in self._converters for p in rule.source_patterns}
        groups: dict[str, Group] = {}
        self.unknown: list[str] = []
        for name in sorted(names, key=Loading.dot_natural_key):  # as from_pretrained orders them
            first, pattern = self.place(name)
            if first in self._here:
                group = Group(first, by_pattern[pattern] if pattern else None, [])
                groups.setdefault(first, group).parts.append((pattern or name, name))
            else:
                self.unknown.append(name)
        self.groups = list(groups.values())
        # Those that save_pretrained reverts; transformers 5.0 reverts all.
        self.used = [rule for rule in rules if not hasattr(rule, "was_used") or rule.was_used()]

    def place(self, name: str, more: Iterable[str] = ()) -> tuple[str, str | None]:
        """The model's name for a stored one, and the pattern of the rule that converts it.

        more: names that the model would have besides its own.
        """
        here = ChainMap(dict.fromkeys(more, True), self._here)
        prefix = self._model.base_model_prefix
        rules = self._renamings, self._converters
        found: tuple[str, str | None] = Loading.rename_source_key(name, *rules, prefix, here)
        if found[0] not in here:
            found = Loading.rename_source_key(name, [], [], prefix, here)
        return found

    def reads_back(self, base: str, linear: str) -> bool:
        """Whether from_pretrained takes packed tensors under this name for the linear's."""
        here = [f"{linear}.{short}" for short in SHORT]
        return all(
            self.place(f"{base}.{short}", here) == (f"{linear}.{short}", None) for short in SHORT
        )

    def saved(
        self,
        group: Group,
        tensors: Mapping[str, Tensor],
        packed: Packed | None = None,
        strict: bool = True,
    ) -> dict[str, Tensor]:
        """What a group became in the model, by the names, and in the pieces, of the files.

        tensors: all that the group makes; those of packed linears are not looked at. Raises
        ValueError, if strict, where transformers stores it in other pieces than it came in.
        """
        inside = {name.removesuffix(".weight") for name in tensors} & (packed or {}).keys()
        if packed and inside:
            return self._saved_apart(group, tensors, {name: packed[name] for name in inside})
        if group.rule is None:
            return dict.fromkeys(group.names, tensors[group.first])
        saved = _reverted(self._model, tensors)
        if strict and saved.keys() != set(group.names):
            raise ValueError(
                f"transformers reads {', '.join(group.names)}, and would write "
                f"{', '.join(saved)} instead"
            )
        return saved

    def _saved_apart(
        self, group: Group, tensors: Mapping[str, Tensor], packed: Packed
    ) -> dict[str, Tensor]:
        """Each tensor by itself, those of packed linears in the place of their weights."""
        base, _, leaf = group.names[0].rpartition(".")
        owners = {name.rpartition(".")[0] for name in tensors}
        if group.rule is None and leaf == "weight" and self.reads_back(base, *owners):
            bases = {next(iter(owners)): base}  # as the dense weight was stored
        else:
            bases = names_apart(self._model, owners)
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            linear, _, short = name.rpartition(".")
            parts = packed[linear] if linear in packed and short == "weight" else {short: tensor}
            found |= {f"{bases[linear]}.{short}": one for short, one in parts.items()}
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


# --- Packed linears, stored one by one ------------------------------------------------------------


def names_apart(model: Any, linears: Iterable[str]) -> dict[str, str]:
    """How files call each linear that they hold by itself, packed; absent: it would not be read
    back, for a rule of transformers takes its tensors for something else."""
    linears = list(linears)
    rules = conversions_of(model)
    if not rules:
        return {name: name for name in linears}
    alone = [rule for rule in rules if not isinstance(rule, Loading.WeightConverter)]
    reading = Conversion(model, ())
    found = {}
    with _saving_by(model, alone):
        for name in linears:
            (stored,) = _reverted(model, {f"{name}.weight": torch.empty(0, device="meta")})
            base, _, leaf = stored.rpartition(".")
            if leaf == "weight" and reading.reads_back(base, name):
                found[name] = base
    return found


def rules_apart(model: Any, linears: Iterable[str]) -> list[Any] | None:
    """The rules by which save_pretrained stores these packed linears one by one; None: those that
    it has."""
    rules, linears = conversions_of(model), list(linears)
    kept = [rule for rule in rules if not _converts(rule, linears)]
    return None if len(kept) == len(rules) else kept


def conversions_of(model: Any) -> list[Any]:
    """The rules of transformers that save_pretrained reverts for this model."""
    if not hasattr(model, "base_model_prefix"):
        return []
    rules = getattr(model, "_weight_conversions", None)
    if rules is not None:
        return list(rules)
    prefixes = getattr(Loading, "PrefixChange", ())  # only of models that were loaded
    rules = get_model_conversion_mapping(model, add_legacy=False)
    return [rule for rule in rules if not isinstance(rule, prefixes)]


def _converts(rule: Any, linears: Iterable[str]) -> bool:
    if not isinstance(rule, Loading.WeightConverter):
        return False
    back = rule.reverse_transform()
    return any(back.rename_source_key(f"{name}.weight")[1] is not None for name in linears)


@contextmanager
def _saving_by(model: Any, rules: list[Any]) -> Iterator[None]:
    had = vars(model).get("_weight_conversions", _NONE)
    model._weight_conversions = rules
    try:
        yield
    finally:
        if had is _NONE:
            del model._weight_conversions
        else:
            model._weight_conversions = had


def _reverted(model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    saved: dict[str, Any] = Loading.revert_weight_conversion(model, dict(tensors))
    return saved
