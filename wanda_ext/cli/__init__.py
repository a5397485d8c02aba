"""The command line: `wanda-ext prune | eval | inspect | convert | bench | demo`.

A command translates its words into one call of the Python API and prints what that gives; it
decides nothing that a caller in Python could not ask for. The demo and the model that it trains
live here too. Nothing of the package imports this room.
"""

from __future__ import annotations

from wanda_ext.cli.main import main

__all__ = ["main"]
