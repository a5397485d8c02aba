"""A checkpoint's model on the meta device, as from_pretrained begins: nothing of it is read yet.

Only buffers that no file holds (rotary frequencies, masks) have values: they are computed.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from wanda_ext.checkpoint import Checkpoint, load_config
from wanda_ext.models import preserved
from wanda_ext.ops import FLOATS

IN_MEMORY = "prune it in memory: prune_model, or wanda-ext prune --in-memory"


class NamesError(ValueError):
    """A checkpoint whose tensors, or which model's blocks, cannot be taken one by one."""


def empty_model(
    checkpoint: Checkpoint, dtype: torch.dtype | None, stored: torch.dtype | None, trust: bool
) -> Any:
    """The causal LM of config.json, in eval mode.

    dtype: of the weights; default: what config.json says, or else `stored`. trust: whether code
    beside config.json may run. Raises ValueError for a packed checkpoint, an adapter, another
    dtype than float32, bfloat16 and float16, and NamesError for a buffer that nothing computes.
    """
    _check_dense(checkpoint)
    config = load_config(checkpoint.folder, trust_remote_code=trust, local_files_only=True)
    dtype = dtype or getattr(config, "dtype", None) or stored
    if dtype not in FLOATS:
        raise ValueError(
            f"{checkpoint.folder} is stored as {dtype}; only float32, bfloat16 and float16 weights "
            "can be pruned"
        )
    with torch.device("meta"):
        auto: Any = transformers.AutoModelForCausalLM
        model = auto.from_config(config, dtype=dtype, trust_remote_code=trust)
    model.tie_weights()
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.name_or_path = str(checkpoint.folder)
    with preserved(model):
        _fill_buffers(model)
    return model.eval()


def _check_dense(checkpoint: Checkpoint) -> None:
    if checkpoint.packed is not None:
        raise ValueError(
            f"{checkpoint.folder} is packed already; turn it dense first: wanda-ext convert "
            "DIR OUT --to dense"
        )
    if (checkpoint.folder / "adapter_config.json").exists():
        raise ValueError(
            f"{checkpoint.folder} holds an adapter; merge it (merge_and_unload) and save the model"
        )


def _fill_buffers(model: Any) -> None:
    """Computes the buffers that no checkpoint holds, as from_pretrained does."""
    owners: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        temporary = [leaf for leaf in module._non_persistent_buffers_set if leaf in module._buffers]
        meta = [leaf for leaf in temporary if getattr(module._buffers[leaf], "is_meta", False)]
        for leaf in meta:
            empty = torch.empty_like(module._buffers[leaf], device="cpu")
            module._buffers[leaf] = empty.fill_(float("nan") if empty.is_floating_point() else 0)
        if meta:
            owners[name] = meta
    for name, leaves in owners.items():
        module = model.get_submodule(name)
        _pretrained_around(model, name)._init_weights(module)
        for leaf in leaves:
            if module._buffers[leaf].isnan().any():
                raise NamesError(
                    f"{type(model).__name__} does not say how to compute its buffer {name}.{leaf}; "
                    f"{IN_MEMORY}"
                )


def _pretrained_around(model: Any, name: str) -> Any:
    """The innermost transformers model that a module lies in: it knows how to initialise it."""
    while name:
        module = model.get_submodule(name)
        if isinstance(module, transformers.PreTrainedModel):
            return module
        name = name.rpartition(".")[0]
    return model
