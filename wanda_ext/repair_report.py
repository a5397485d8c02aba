"""What a repair did: each block's error before and after, and the time it took."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class BlockRepair:
    """One block. An error is |B(x) - B0(x0)| / |B0(x0)| over the calibration data."""

    name: str
    error_before: float  # with the blocks before it repaired
    error_after: float  # the same where training did not lower it: the block stays as it was
    seconds: float


@dataclass
class RepairReport:
    """What a repair did. str() is a table, a line a block."""

    blocks: list[BlockRepair] = field(default_factory=list)
    status: str = "running"  # "complete", or where it stopped
    seconds: float = 0.0
    arguments: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        width = max((len(block.name) for block in self.blocks), default=0)
        lines = [
            f"{block.name:<{width}}  error {block.error_before:.4f} -> {block.error_after:.4f}"
            f"  {block.seconds:.1f} s"
            for block in self.blocks
        ]
        done = f"{self.status}: {len(self.blocks)} blocks repaired in {self.seconds:.1f} s"
        return "\n".join([*lines, done])
