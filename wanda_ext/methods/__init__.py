"""How the weights that go are chosen: methods, sparsities, and what a method knows of its inputs.

A method is one file and one line in METHODS. It sees one weight and the sums over its inputs, and
nothing of the model around them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from wanda_ext.methods.corrected import UPDATES, Corrected, Updated, get_update, with_update
from wanda_ext.methods.magnitude import Magnitude
from wanda_ext.methods.method import Method
from wanda_ext.methods.sparsegpt import SparseGPT
from wanda_ext.methods.sparsity import (
    NM,
    Owl,
    Sparsity,
    SparsitySpec,
    Unstructured,
    as_globs,
    check_globs,
    matches,
    parse_sparsity,
    sparsity_for,
    spec_text,
)
from wanda_ext.methods.statistic import InputStatistic, Reads, drift_of, gram_of
from wanda_ext.methods.wanda import Wanda

__all__ = [
    "METHODS",
    "NM",
    "UPDATES",
    "Corrected",
    "InputStatistic",
    "Magnitude",
    "Method",
    "Owl",
    "Reads",
    "SparseGPT",
    "Sparsity",
    "SparsitySpec",
    "Unstructured",
    "Updated",
    "Wanda",
    "as_globs",
    "check_globs",
    "drift_of",
    "get_method",
    "get_update",
    "gram_of",
    "matches",
    "parse_sparsity",
    "sparsity_for",
    "spec_text",
    "with_update",
]


METHODS: dict[str, Callable[[], Method]] = {
    "wanda": Wanda,
    "wanda-variant": partial(Wanda, variant=True),
    "magnitude": Magnitude,
    "sparsegpt": SparseGPT,
}


def get_method(method: str | Method) -> Method:
    """The method of that name with its default options, or the method itself.

    Raises ValueError (no such name) or TypeError (neither a name nor a method).
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"there is no method {method!r}: pass one of {', '.join(METHODS)}")
        return METHODS[method]()
    if isinstance(method, type) or not isinstance(method, Method):
        raise TypeError(
            f"method must be a name ({', '.join(METHODS)}) or a method object such as "
            f"Wanda(), not {method!r}"
        )
    return method
