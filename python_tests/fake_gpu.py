"""A GPU that is not there: kernels by name, rules, and the CPU posing as one of its kind."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wanda_ext.packed import dispatch
from wanda_ext.packed.dispatch_table import Gpu, Row, cache_path, write_rows

GPU = Gpu("Test GPU", 90, 132)
SKINNY, WIDE = "skinny", "wide"
KERNELS = {SKINNY: (16, 8), WIDE: (2**62, 1)}  # name -> by default up to this m, splits at most


class FakeC:
    """linear_24's kernels as wanda_ext._C shows them in a build with CUDA."""

    def __init__(self) -> None:
        self.rules: list[Any] = []

    def linear_24_kernels(self) -> list[str]:
        return list(KERNELS)

    def set_linear_24_rules(self, rules: list[Any]) -> None:
        for *_, kernel, splits in rules:
            assert kernel == -1 or 1 <= splits <= list(KERNELS.values())[kernel][1]
        self.rules = list(rules)

    def linear_24_check(self, kernel: int, splits: int, arch: int, sms: int, *problem: Any) -> str:
        _, n, _, dtype, order = problem
        if arch < 80 or dtype == "float32" or order not in (80, 90):
            return f"no such kernel for sm_{arch}, {dtype}"
        if n % 8:
            return "n must be a multiple of 8"
        return "" if splits <= list(KERNELS.values())[kernel][1] else f"{splits} splits"

    def linear_24_choose(self, *problem: Any) -> tuple[int, int, bool]:
        arch, sms, m, n, k, dtype, _ = problem
        fits = [
            rule for rule in self.rules if rule[:5] == (arch, sms, dtype, n, k) and m <= rule[5]
        ]
        rule = min(fits, key=lambda rule: rule[5], default=None)
        if rule and rule[6] >= 0:
            return rule[6], rule[7], True
        for kernel, (last_m, _) in enumerate(KERNELS.values()):
            if m <= last_m and not self.linear_24_check(kernel, 1, arch, sms, *problem[2:]):
                return kernel, 1, False
        raise RuntimeError(f"wanda_ext.linear_24: no kernel for sm_{arch}, {dtype}, n {n}")


def pose_as_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Gpu = GPU) -> FakeC:
    """From now on the CPU is a GPU of this model, with the kernels of FakeC and no rules."""
    fake = FakeC()
    monkeypatch.setattr(dispatch, "_C", fake)
    monkeypatch.setattr(dispatch, "_tables", {})
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: None if device.type == "meta" else gpu)
    return fake


def row(m: int = 1, kernel: str = SKINNY, **changes: Any) -> Row:
    """A row for a 4096x4096 weight in bf16, packed in 10 us, dense in 15 us."""
    plain = Row(
        *(GPU.name, GPU.arch, GPU.sms, "bfloat16", 4096, 4096, m, kernel),
        splits=1,
        packed_us=10.0,
        dense_us=15.0,
    )
    return replace(plain, **changes)


def cache(*rows: Row) -> None:
    """These are the user's rows; the fixture that the test asks for has moved them."""
    write_rows(cache_path(), rows)


def device_named(name: str, arch: int = 90, sms: int = 132) -> SimpleNamespace:
    """What torch.cuda.get_device_properties says."""
    return SimpleNamespace(name=name, major=arch // 10, minor=arch % 10, multi_processor_count=sms)


CPU = torch.device("cpu")
