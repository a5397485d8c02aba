"""Which kernel is fastest on this machine, measured once and kept in the dispatch table.

Only measuring enters here. What is done with the times is decided in `wanda_ext.packed`.
"""

from __future__ import annotations

from wanda_ext.bench.tuning import Tuning, candidates, tune

__all__ = ["Tuning", "candidates", "tune"]
