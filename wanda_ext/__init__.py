"""wanda_ext prunes language models by weights and activations (Wanda), packs what is left, and
runs it.

    report = wanda_ext.prune_model(model, "builtin", "2:4", tokenizer=tokenizer)
    wanda_ext.save_pretrained(model, "pruned", tokenizer=tokenizer)

Importing it teaches `transformers` to load its packed checkpoints.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from wanda_ext._version import __version__

try:
    import torch  # noqa: F401  first, for the compiled part links to its libraries

    import wanda_ext._C  # registers the ops

    if find_spec("wanda_ext._C_sm90a") and hasattr(wanda_ext._C, "add_linear_24_kernels"):
        import wanda_ext._C_sm90a

        wanda_ext._C.add_linear_24_kernels(wanda_ext._C_sm90a.linear_24_kernels())
except ImportError as error:
    if "wanda_ext.info" in sys.orig_argv:  # `python -m wanda_ext.info`, which finds out why
        from wanda_ext import info

        raise SystemExit(info.main()) from None
    raise ImportError(
        f"wanda_ext: its compiled part does not load ({error}); run `pip install .` in the source "
        "tree, and start Python elsewhere, for there the sources hide what was installed"
    ) from error

from wanda_ext import bench, ops, reference
from wanda_ext.checkpoint import convert, save_pretrained, swap_linears, unswap_linears
from wanda_ext.finetune import add_adapters, hold_masks, merge_adapters
from wanda_ext.methods import (
    NM,
    Corrected,
    Magnitude,
    Owl,
    SparseGPT,
    Sparsity,
    Unstructured,
    Wanda,
)
from wanda_ext.packed import SparseLinear24, SparseLinearBitmap, explain
from wanda_ext.prune import PruneError, prune_model, verify
from wanda_ext.quality import (
    GateReport,
    RepairError,
    RepairReport,
    evaluate_tasks,
    gate,
    perplexity,
    repair,
)
from wanda_ext.report import PruneReport
from wanda_ext.stream import prune_checkpoint

__all__ = [
    "NM",
    "Corrected",
    "GateReport",
    "Magnitude",
    "Owl",
    "PruneError",
    "PruneReport",
    "RepairError",
    "RepairReport",
    "SparseGPT",
    "SparseLinear24",
    "SparseLinearBitmap",
    "Sparsity",
    "Unstructured",
    "Wanda",
    "__version__",
    "add_adapters",
    "bench",
    "build_info",
    "convert",
    "evaluate_tasks",
    "explain",
    "gate",
    "hold_masks",
    "merge_adapters",
    "ops",
    "perplexity",
    "prune_checkpoint",
    "prune_model",
    "reference",
    "repair",
    "save_pretrained",
    "swap_linears",
    "unswap_linears",
    "verify",
]


def build_info() -> dict[str, Any]:
    """What this binary was built with and for, and what is here (see `wanda_ext.info`)."""
    from wanda_ext import info  # not above, for `python -m wanda_ext.info` runs it afresh

    return info.build_info()
