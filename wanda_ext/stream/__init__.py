"""prune_checkpoint: directory to directory, larger than memory, resumable, on several machines.

It prunes with the plan and the commits of `wanda_ext.prune` and adds what a directory needs: a
model of which two blocks at a time are in memory, the tensors on disk, a journal to go on from, and
ranks that share the work. What only a prune in files needs enters here.
"""

from __future__ import annotations

from wanda_ext.stream.conversion import left_over
from wanda_ext.stream.meta_model import NamesError
from wanda_ext.stream.ranks import launched
from wanda_ext.stream.stream import prune_checkpoint

__all__ = ["NamesError", "launched", "left_over", "prune_checkpoint"]
