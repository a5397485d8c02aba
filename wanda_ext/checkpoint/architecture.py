"""Which class of transformers a checkpoint's model is of."""

from __future__ import annotations

from typing import Any

import torch
import transformers


def model_class(config: Any) -> Any:
    """The class to load a checkpoint by: AutoModelForCausalLM, or the one that its config names.

    That one is taken where AutoModelForCausalLM has none for the config, or only one for a part of
    it, its text: a vision-language model would lose the rest.
    """
    auto: Any = transformers.AutoModelForCausalLM
    named = named_class(config)
    if named is None or named.config_class is not type(config):
        return auto
    known = auto._model_mapping.get(type(config), None)
    a_part = known is not named and bool(type(config).sub_configs)
    return named if known is None or a_part else auto


def named_class(config: Any) -> Any:
    """The model class of transformers that config.architectures names; None: it has none."""
    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list) and names else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if is_model else None


def empty_of(config: Any, dtype: torch.dtype | None, trust: bool) -> Any:
    """The model of a config on the meta device, of `model_class`."""
    kind: Any = model_class(config)
    auto: Any = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        if kind is auto:
            return auto.from_config(config, dtype=dtype, trust_remote_code=trust)
        return kind._from_config(config, dtype=dtype)
