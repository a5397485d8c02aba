"""What to keep: a share of each row, or `keep` of every `group` columns, linear by linear."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from wanda_ext.ops import MAX_GROUP


class Sparsity(ABC):
    """How many weights of a linear [n, k] stay, and in which pattern. Immutable."""

    @property
    @abstractmethod
    def keep_fraction(self) -> float:
        """The share of weights that stays, in (0, 1]."""

    def check(self, name: str, n: int, k: int) -> None:  # noqa: B027 - most patterns fit any shape
        """Raises ValueError, naming the module, where an [n, k] weight cannot have this pattern."""

    @abstractmethod
    def __str__(self) -> str:
        """For reports. parse_sparsity reads it back, but for Owl's."""


@dataclass(frozen=True)
class Unstructured(Sparsity):
    """Prunes int(k * ratio) weights of each row. 0 <= ratio < 1."""

    ratio: float

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(
                f"a sparsity ratio is the pruned share of the weights, from 0 up to but not "
                f"including 1; got {self.ratio}. Pass 0.5 or '50%' to prune half of them"
            )

    @property
    def keep_fraction(self) -> float:
        return 1 - self.ratio

    def n_prune(self, size: int) -> int:
        """How many of `size` weights go: the float64 product truncated, as in the original."""
        return int(size * self.ratio)

    def __str__(self) -> str:
        return f"{self.ratio * 100:.10g}%"


@dataclass(frozen=True)
class NM(Sparsity):
    """Keeps `keep` of every `group` consecutive columns. 0 < keep <= group <= 32."""

    keep: int
    group: int

    def __post_init__(self) -> None:
        if not 0 < self.keep <= self.group <= MAX_GROUP:
            raise ValueError(
                f"'keep:group' needs 0 < keep <= group <= {MAX_GROUP}; got '{self}'. "
                "Pass '2:4' to keep 2 of every 4 weights"
            )

    @property
    def keep_fraction(self) -> float:
        return self.keep / self.group

    def check(self, name: str, n: int, k: int) -> None:
        if k % self.group:
            raise ValueError(
                f"{name} has {k} input features, which {self} cannot divide into groups of "
                f"{self.group}: pass ignore=['{name}'] or another sparsity"
            )

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"


@dataclass(frozen=True)
class Owl(Sparsity):
    """Unstructured, with a ratio for each block: those with more outliers keep more weights.

    A weight is an outlier of its block if its score S = |W| * input_norm in the dense model is over
    `m` times the block's mean. The shares of outliers, scaled to a range of 2 * lam, are what the
    blocks keep more or less than 1 - ratio; the mean over all weights is `ratio` (Yin et al. 2023,
    arXiv:2310.05175, section 4). Costs another pass of all calibration data through the blocks.
    """

    ratio: float
    lam: float = 0.08
    m: float = 5.0

    def __post_init__(self) -> None:
        Unstructured(self.ratio)
        if not 0 <= self.lam <= 0.5 or not self.m > 0:
            raise ValueError(
                f"Owl needs 0 <= lam <= 0.5 and m > 0; got lam={self.lam}, m={self.m}. The paper "
                "uses lam=0.08 and m=5"
            )

    @property
    def keep_fraction(self) -> float:
        return 1 - self.ratio

    def __str__(self) -> str:
        return f"Owl({self.ratio}, lam={self.lam}, m={self.m})"


SparsityLike: TypeAlias = "float | str | Sparsity"
SparsitySpec: TypeAlias = (
    "SparsityLike | Mapping[str, SparsityLike | None] | Callable[[str, Any], SparsityLike | None]"
)


def parse_sparsity(value: SparsityLike) -> Sparsity:
    """A Sparsity from 0.5, "0.5", "50%", "2:4" or a Sparsity.

    Raises ValueError (not a sparsity) or TypeError (not a number, a string or a Sparsity).
    """
    if isinstance(value, Sparsity):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Unstructured(float(value))
    if not isinstance(value, str):
        raise TypeError(
            f"sparsity must be a number, a string or a Sparsity, not {type(value).__name__}: "
            "pass 0.5, '50%', '2:4' or Unstructured(0.5)"
        )
    text = value.strip()
    try:
        if ":" in text:
            keep, group = text.split(":")
            parsed: tuple[int, ...] | float = (int(keep), int(group))
        else:
            parsed = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"{value!r} is no sparsity: pass 0.5, '50%' or 'keep:group'") from None
    return NM(*parsed) if isinstance(parsed, tuple) else Unstructured(parsed)


def matches(glob: str, name: str) -> bool:
    """Whether an fnmatch glob names the module or one that holds it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), glob) for i in range(len(parts)))


def sparsity_for(spec: SparsitySpec, name: str, module: Any) -> Sparsity | None:
    """The sparsity of one linear; None: leave it dense.

    A mapping's first matching glob wins; where none matches the linear stays dense. A callable gets
    (name, module), and for an expert of a fused weight an ExpertSlice, which has a `weight` too.
    """
    if isinstance(spec, Mapping):
        values = (value for glob, value in spec.items() if matches(glob, name))
        value = next(values, None)
    elif callable(spec) and not isinstance(spec, Sparsity):
        value = spec(name, module)
    else:
        value = spec
    return None if value is None else parse_sparsity(value)


def as_globs(globs: str | Iterable[str], what: str) -> list[str]:
    """One glob or several as a list. Raises TypeError for anything else."""
    several = [globs] if isinstance(globs, str) else globs
    if not isinstance(several, Iterable) or not all(isinstance(g, str) for g in several):
        raise TypeError(f"{what} must be a glob or several, such as '*.lm_head', not {globs!r}")
    return list(several)


def check_globs(globs: Iterable[str], names: Iterable[str], what: str) -> None:
    """Raises ValueError for a glob that matches none of the names: it would be silently without
    effect."""
    names = list(names)
    for glob in globs:
        if not any(matches(glob, name) for name in names):
            raise ValueError(
                f"{what} {glob!r} matches no module of this model; names look like {names[-1]!r}"
            )


def spec_text(spec: SparsitySpec) -> str:
    """The spec in one line, for the report."""
    if isinstance(spec, Mapping):
        return ", ".join(f"{glob}: {value}" for glob, value in spec.items())
    if callable(spec) and not isinstance(spec, Sparsity):
        return getattr(spec, "__qualname__", type(spec).__name__)
    return str(parse_sparsity(spec))
