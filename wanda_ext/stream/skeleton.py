"""A checkpoint's model without its weights, which come from the files a block at a time.

Parameters are put in where they are needed, and taken out again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext.checkpoint import (
    Checkpoint,
    Conversion,
    Group,
    Made,
    lacking,
    made_of,
    misshapen,
    mistyped,
    shared_names,
)
from wanda_ext.files import Stored
from wanda_ext.stream.meta_model import IN_MEMORY, NamesError, empty_model


class Skeleton:
    """`model` on the meta device; `stored`: where its tensors lie, by their names in the model.

    Of tensors that share one parameter `stored` has the first. `files`: where all stored tensors
    lie, by their names in the files; `unknown`: those that the model's class does not know.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | None, trust: bool) -> None:
        """Raises ValueError where files and model differ, NamesError where they cannot be taken one
        by one."""
        self.checkpoint = checkpoint
        self.folder = checkpoint.folder
        self.asked = dtype
        self.files = checkpoint.stored()
        stored = (one.dtype for one in self.files.values() if one.dtype.is_floating_point)
        self.model = empty_model(checkpoint, dtype, next(stored, None), trust)
        self._tensors: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        self._first: dict[int, str] = {}  # of tensors that share a parameter
        for name, tensor in self._tensors.items():
            self._first.setdefault(id(tensor), name)
        self.conversion = Conversion(self.model, self.files)
        self.model._weight_conversions = self.conversion.used  # as from_pretrained leaves it
        self._made: dict[str, list[str]] = {}  # what each group makes, by its first
        self.stored = {
            name: replace(stored, dtype=self._dtype(name)) if isinstance(stored, Stored) else stored
            for name, stored in self._match(self.files).items()
        }
        self.unknown = {name: self.files[name] for name in self.conversion.unknown}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The stored tensors of these names; what is made together is read once."""
        found: dict[str, Tensor] = {}
        made: dict[str, dict[str, Tensor]] = {}
        for name in names:
            one = self.stored[name]
            if isinstance(one, Made):
                if one.group.first not in made:
                    made[one.group.first] = one.read_group()
                found[name] = made[one.group.first][one.name]
            else:
                found[name] = one.read()
        return found

    def loaded(self, read: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
        """The model's tensors out of some that are named, and cut, as in its checkpoint."""
        found: dict[str, Tensor] = {}
        for group in Conversion(self.model, read).groups:
            found |= group.load(self.model, lambda name: read[name]())
        return {self.first(name): tensor.to(self._dtype(name)) for name, tensor in found.items()}

    def first(self, name: str) -> str:
        """The name in `stored` of a tensor of the model."""
        return self._first[id(self._tensors[name])]

    def groups(self, prefix: str) -> list[Group]:
        """The stored tensors of a module, in the groups that make its tensors."""
        inside = (f"{prefix}.",)
        return [group for group in self.conversion.groups if group.first.startswith(inside)]

    def groups_outside(self, prefixes: list[str]) -> list[Group]:
        """Those of no such module."""
        inside = tuple(f"{prefix}." for prefix in prefixes)
        return [group for group in self.conversion.groups if not group.first.startswith(inside)]

    def made(self, group: Group) -> list[str]:
        """The names in the model of what a group makes."""
        return self._made[group.first]

    def source(self, group: Group) -> dict[str, Stored]:
        """A group as it is in the files; of another dtype where that was asked."""
        parts = {name: self.files[name] for name in group.names}
        if self.asked is None:
            return parts
        dtype = self._dtype(group.first)
        return {name: replace(part, dtype=dtype) for name, part in parts.items()}

    def names(self, prefix: str) -> list[str]:
        """The stored tensors of a module."""
        return [name for name in self.stored if name.startswith(f"{prefix}.")]

    def outside(self, prefixes: list[str]) -> list[str]:
        """The stored tensors of no such module."""
        inside = {name for prefix in prefixes for name in self.names(prefix)}
        return [name for name in self.stored if name not in inside]

    def check_own(self, prefixes: list[str]) -> None:
        """Raises NamesError where one of these modules shares a tensor with anything else, in the
        model or in its checkpoint."""
        owners: dict[int, str] = {}
        for name, tensor in self._tensors.items():
            inside = next((p for p in prefixes if name.startswith(f"{p}.")), "")
            other = owners.setdefault(id(tensor), inside)
            if other != inside:
                raise NamesError(
                    f"{name} is shared by {inside or other} and {other if inside else 'others'}: "
                    f"such blocks cannot be pruned one by one; {IN_MEMORY}"
                )
        self._check_apart(prefixes)

    def computed(self, prefix: str) -> dict[str, Tensor]:
        """The buffers of a module that no file holds."""
        module = self.model.get_submodule(prefix)
        return {name: b for name, b in module.named_buffers(prefix) if name not in self._tensors}

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """The tensors in the model inside, nothing but meta ones again after."""
        before = {name: self._place(name, tensor) for name, tensor in tensors.items()}
        try:
            yield
        finally:
            for name, tensor in before.items():
                self._place(name, tensor)

    @contextmanager
    def read_when_called(self, prefixes: list[str]) -> Iterator[None]:
        """Inside, modules outside of those named get their own tensors when they are called."""
        before: dict[str, Tensor] = {}
        first = {id(self._tensors[name]): name for name in self.stored}

        def fill(name: str, module: nn.Module, args: Any) -> None:
            own = [*module.named_parameters(name, False), *module.named_buffers(name, False)]
            for full, tensor in own:
                if tensor.is_meta:
                    before[full] = self._place(full, self.stored[first[id(tensor)]].read())

        handles = [
            module.register_forward_pre_hook(partial(fill, name))
            for name, module in self.model.named_modules()
            if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, tensor in before.items():
                self._place(name, tensor)

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        """Puts a tensor in, and returns the one that was there."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        before: Tensor = getattr(module, leaf)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            keep = isinstance(tensor, nn.Parameter)
            module._parameters[leaf] = tensor if keep else nn.Parameter(tensor, False)
        return before

    def _check_apart(self, prefixes: list[str]) -> None:
        """Raises NamesError where files keep tensors of several modules in one, or in pieces that
        transformers would not write again."""
        empty = {n: t.to("meta") for n, t in self._tensors.items()}
        for group in self.conversion.groups:
            made = self.made(group)
            owners = {next((p for p in prefixes if n.startswith(f"{p}.")), "") for n in made}
            if len(owners) > 1:
                raise NamesError(
                    f"{self.folder} keeps tensors of several blocks of {type(self.model).__name__} "
                    f"in one ({group.names[0]}); {IN_MEMORY}"
                )
            if group.rule is not None and owners != {""}:
                try:
                    self.conversion.saved(group, {name: empty[name] for name in made})
                except ValueError as error:
                    raise NamesError(f"{self.folder}: {error}; {IN_MEMORY}") from error

    def _match(self, files: Mapping[str, Stored]) -> dict[str, Stored | Made]:
        unknown = self.conversion.unknown
        here: dict[str, Stored | Made] = {}
        for group in self.conversion.groups:
            parts = {name: files[name] for _, name in group.parts}
            whole = [name for name, one in parts.items() if not one.stored.is_floating_point]
            if whole and self._tensors[group.first].is_floating_point():
                raise mistyped(self.folder, whole[0], parts[whole[0]].stored)
            if group.rule is not None:
                dtype = self._dtype(group.first)
                parts = {name: replace(part, dtype=dtype) for name, part in parts.items()}
            try:
                made = made_of(self.model, group, parts)
            except Exception as error:
                raise NamesError(
                    f"{self.folder}: transformers cannot make {group.first} of {', '.join(parts)} "
                    f"({error}); copy or download it again, or {IN_MEMORY}"
                ) from error
            here |= made
            self._made[group.first] = [*made]
        groups = shared_names(self._tensors)
        found: dict[str, Stored | Made] = {}
        absent = [names[0] for names in groups if not here.keys() & set(names)]
        if absent:
            raise lacking(self.folder, type(self.model).__name__, absent, unknown)
        for names in groups:
            present = [name for name in names if name in here]
            for other in present[1:]:
                self._check_tied(present[0], here[present[0]], other, here[other])
            shape = tuple(self._tensors[names[0]].shape)
            if here[present[0]].shape != shape:
                kind, stored = type(self.model).__name__, here[present[0]].shape
                raise misshapen(self.folder, present[0], stored, kind, shape)
            found[names[0]] = here[present[0]]
        return found

    def _check_tied(
        self, name: str, one: Stored | Made, other_name: str, other: Stored | Made
    ) -> None:
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        if alike and isinstance(one, Stored) and isinstance(other, Stored):
            alike = all(a.equal(b) for a, b in zip(one.pieces(), other.pieces(), strict=True))
        elif alike:
            alike = one.read().equal(other.read())
        if not alike:
            raise ValueError(
                f"{self.folder}: config.json ties {name} and {other_name}, and the files hold two "
                'different tensors; set "tie_word_embeddings": false there if both are meant'
            )

    def _dtype(self, name: str) -> torch.dtype:
        """What from_pretrained would load it as."""
        dtype = self._tensors[name].dtype
        if not dtype.is_floating_point:
            return dtype
        plan = getattr(self.model, "dtype_plan", None)  # of transformers 5.0
        if plan is None:
            plan = [*(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())]
            if dtype == torch.float16:
                plan += getattr(self.model, "_keep_in_fp32_modules", None) or ()
        if any(re.search(glob.replace("*", ".*"), name) for glob in plan):
            return torch.float32
        return dtype
