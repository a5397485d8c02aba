"""A checkpoint's model without its weights, which come from the files a block at a time.

Parameters are put in where they are needed, and taken out again.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext.checkpoint import Checkpoint, lacking
from wanda_ext.files import Stored, stored_tensors
from wanda_ext.stream.conversion import Conversion, Made, as_saved, made_of
from wanda_ext.stream.meta_model import IN_MEMORY, NamesError, empty_model


class Skeleton:
    """`model` on the meta device; `stored`: where its tensors lie, by their names in the model.

    Of tensors that share one parameter `stored` has the first, by the name that save_pretrained
    gives it.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | None, trust: bool) -> None:
        """Raises ValueError where files and model differ, NamesError where they cannot be taken one
        by one."""
        self.folder = checkpoint.folder
        files = stored_tensors(sorted({header.file for header in checkpoint.headers.values()}))
        stored = (one.dtype for one in files.values() if one.dtype.is_floating_point)
        self.model = empty_model(checkpoint, dtype, next(stored, None), trust)
        self._tensors: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        self.stored = {
            name: replace(stored, dtype=self._dtype(name)) if isinstance(stored, Stored) else stored
            for name, stored in self._match(files).items()
        }

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
        return found

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
        self._check_apart([*map(self.names, prefixes), self.outside(prefixes)])

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

    def _check_apart(self, parts: list[list[str]]) -> None:
        """Raises NamesError unless each part is loaded and saved alone as all are together."""
        empty = {n: t.to("meta") for n, t in self._tensors.items() if n in self.stored}
        together = as_saved(self.model, empty).keys()
        alone: list[str] = []
        for part in parts:
            saved = as_saved(self.model, {name: empty[name] for name in part})
            back = self.loaded({name: partial(_itself, one) for name, one in saved.items()})
            if back.keys() != set(part):
                break
            alone += saved
        if sorted(alone) != sorted(together):
            raise NamesError(
                f"{self.folder} keeps tensors of several blocks of {type(self.model).__name__} in "
                f"one; {IN_MEMORY}"
            )

    def _match(self, files: Mapping[str, Stored]) -> dict[str, Stored | Made]:
        conversion = Conversion(self.model, files)
        unknown = conversion.unknown
        self.model._weight_conversions = conversion.used  # as from_pretrained leaves it
        here: dict[str, Stored | Made] = {}
        for group in conversion.groups:
            parts = {name: files[name] for _, name in group.parts}
            if group.rule is not None:
                dtype = self._dtype(group.first)
                parts = {name: replace(part, dtype=dtype) for name, part in parts.items()}
            try:
                here |= made_of(self.model, group, parts)
            except Exception as error:
                raise NamesError(
                    f"{self.folder}: transformers cannot make {group.first} of {', '.join(parts)} "
                    f"({error}); copy or download it again, or {IN_MEMORY}"
                ) from error
        groups: dict[int, list[str]] = {}
        for name, tensor in self._tensors.items():
            groups.setdefault(id(tensor), []).append(name)
        found: dict[str, Stored | Made] = {}
        absent = [names[0] for names in groups.values() if not here.keys() & set(names)]
        if absent:
            raise lacking(self.folder, type(self.model).__name__, absent, unknown)
        for names in groups.values():
            present = [name for name in names if name in here]
            for other in present[1:]:
                self._check_tied(present[0], here[present[0]], other, here[other])
            shape = tuple(self._tensors[names[0]].shape)
            if here[present[0]].shape != shape:
                raise ValueError(
                    f"{self.folder}: {present[0]} is stored as {list(here[present[0]].shape)}, and "
                    f"the model of config.json has {list(shape)}; copy or download it again"
                )
            found[names[0]] = here[present[0]]
        self._warn_of(unknown)
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

    def _warn_of(self, unknown: list[str]) -> None:
        known = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        patterns = [*known, r"rotary_emb\.inv_freq", r"position_ids"]
        odd = [name for name in unknown if not any(re.search(p, name) for p in patterns)]
        if odd:
            warnings.warn(
                f"{self.folder} holds {len(odd)} tensors that {type(self.model).__name__} has no "
                f"place for, and that are not written again: {', '.join(odd[:3])}",
                stacklevel=2,
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


def _itself(tensor: Tensor) -> Tensor:
    return tensor
