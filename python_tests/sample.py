"""Which of many cases a normal run tries: a few, the same ones each time. `.ci/full` tries all."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
ALL = bool(os.environ.get("WANDA_EXT_TEST_ALL"))  # set to anything: every case


def sampled(cases: Sequence[T], count: int, always: Sequence[T] = ()) -> list[T]:
    """`always`, and others drawn with a fixed seed until there are `count`, in their order."""
    if ALL:
        return list(cases)
    others = [case for case in cases if case not in always]
    drawn = random.Random(0).sample(others, min(len(others), max(0, count - len(always))))
    return [case for case in cases if case in drawn or case in always]
