"""Zeros that stay zero in training: masks for an optimizer, adapters that leave them alone.

peft is imported only once an adapter is asked for.
"""

from __future__ import annotations

from wanda_ext.finetune.adapters import add_adapters, merge_adapters
from wanda_ext.finetune.masks import hold_masks

__all__ = ["add_adapters", "hold_masks", "merge_adapters"]
