"""Runs modules so that every hook on them is seen, and finds the linears that run without one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """What torch.compile has compiled runs as written inside, on every thread.

    Compiled code does not look whether a module has got a hook since.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:  # nothing was compiled; importing it takes seconds
            return function(*args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            return function(*args, **kwargs)

    return run


@contextmanager
def reads_of(linears: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """The names of those whose weights torch reads inside, by whatever way."""
    watch = _Watch(linears)
    with watch:
        yield watch.read


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks for weights among the arguments of every op, by their memory: views count too."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: set[str] = set()
        self._names: dict[int, list[str]] = {}
        for name, linear in linears.items():
            assert isinstance(linear.weight, Tensor)
            self._names.setdefault(_place(linear.weight), []).append(name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.read.update(self._names.get(_place(leaf), ()))
        return func(*args, **(kwargs or {}))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
