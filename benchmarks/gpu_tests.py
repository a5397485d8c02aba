"""Runs the tests that need a GPU, by name and in parallel, and counts them.

    python benchmarks/gpu_tests.py [--junit FILE] [--jobs 8] [pytest's arguments]

Without a GPU the tests are collected and skipped, and the exit status is 3. Prints one line of JSON
with the counts and the names of those that failed, also where it is interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gpu_harness import NO_DEVICE, print_cell

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = "not 131072 and not 131071"  # minutes on the CPU, which they are compared with


def files() -> list[str]:
    """The tests that are for a GPU."""
    found = sorted((ROOT / "python_tests").rglob("test_gpu*.py"))
    return [str(path) for path in found if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


class Count:
    """A plugin that keeps the outcome of every test."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
            self.outcomes["failed"] += 1
        elif report.when == "call" or report.skipped:
            self.outcomes[report.outcome] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):
            failed = sorted(set(self.failed))
            print_cell("", {"name": "tests", **self.outcomes, "failures": failed[:50]})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--junit", type=Path)
    parser.add_argument("--jobs", type=int, default=8)
    args, more = parser.parse_known_args()
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-q", "-m", "gpu"]
    options += ["-p", "no:cacheprovider", "-k", LEFT_OUT]
    if args.junit is not None:
        options.append(f"--junitxml={args.junit}")
    there = torch.cuda.is_available()
    if there and args.jobs > 1:
        if find_spec("xdist") is None:
            print("pytest-xdist is not installed: one test after the other", flush=True)
        else:
            options += ["-n", str(args.jobs)]
    status = int(pytest.main([*options, *more, *files()], plugins=[Count()]))
    return NO_DEVICE if status == 0 and not there else status


if __name__ == "__main__":
    sys.exit(main())
