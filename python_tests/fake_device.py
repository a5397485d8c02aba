"""A GPU that is not there, for the logic of gpu_check.py: its clocks, and programs to run on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from gpu_run import Command, Run, Step, Tool


class FakeDevice:
    """Its clock rises with every reading."""

    def __init__(self) -> None:
        self.readings = 0

    def about(self) -> dict[str, Any]:
        return {"name": "Test GPU", "driver": "999.9"}

    def reading(self) -> dict[str, int]:
        self.readings += 1
        return {"sm_mhz": 1000 + self.readings, "watts": 500, "slowed": 4 * (self.readings % 2)}


def program(code: str, limit: float = 60, tool: Tool | None = None, writes: str = "") -> Command:
    """A program in Python."""
    return Command(limit, (sys.executable, "-c", code), tool, writes)


def cell(name: str, **values: Any) -> str:
    """Code that prints a result."""
    return f"import json; print(json.dumps({ {'cell': name, **values}!r}), flush=True);"


def step(name: str, *commands: Command) -> Step:
    return Step(name, f"what {name} does", 1, commands)


def run_steps(out: Path, *steps: Step, seconds: float = 120, device: Any = None) -> Run:
    """What became of them."""
    about = {"versions": {"python": "3"}, "commit": "abc"}
    run = Run(out, device, seconds, about, say=lambda text: None)
    run.steps(steps)
    return run
