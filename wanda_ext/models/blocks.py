"""Where a model keeps its decoder blocks and linears, and which models cannot be pruned."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from wanda_ext.checkpoint import quantized_by
from wanda_ext.models.experts import ExpertSlice, expert_slices
from wanda_ext.ops import FLOATS
from wanda_ext.packed import PackedLinear, computes_weight

# How configs call their number of blocks: an encoder-decoder's own count, and the one of models
# that count the halves of a block in the first.
LAYER_COUNTS = ("num_hidden_layers", "decoder_layers", "num_layers")

Block = tuple[str, nn.Module]
Linear = nn.Module | ExpertSlice  # what has a weight [n, k], or [k, n] where it is transposed


def find_blocks(model: nn.Module, blocks: str | nn.ModuleList | None = None) -> list[Block]:
    """The decoder blocks with their dotted names, in the order they run.

    `blocks` overrides the search: the dotted path of a ModuleList, or the ModuleList itself. Raises
    ValueError where no block list, or more than one, is found.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if blocks is not None:
        found = [n for n, m in lists.items() if n == blocks or m is blocks]
        if not found:
            raise ValueError(
                f"blocks={blocks!r} is no ModuleList of this model; it has {', '.join(lists)}"
            )
    else:
        found = _candidates(model, lists)
    if len(found) != 1:
        raise ValueError(
            f"expected one list of decoder blocks with linears in {type(model).__name__}, found "
            f"{len(found)} ({', '.join(found) or 'none'}): pass blocks='path.to.layers'"
        )
    return [(f"{found[0]}.{i}", block) for i, block in enumerate(lists[found[0]])]


def _candidates(model: nn.Module, lists: dict[str, nn.ModuleList]) -> list[str]:
    """Outermost lists with as many entries as the config says layers, narrowed while ambiguous."""
    config = getattr(model, "config", None)
    counts = [getattr(_text_config(config), name, None) for name in LAYER_COUNTS]
    found = [n for n, m in lists.items() if len(m) in counts and targets_of_block(m)]
    found = [n for n in found if not any(n.startswith(f"{outer}.") for outer in found)]
    get_decoder = getattr(model, "get_decoder", None)
    decoder = None if get_decoder is None else get_decoder()
    inside = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    whole = set(getattr(model, "_no_split_modules", None) or ())  # names of block classes
    narrowings: tuple[Callable[[str], bool], ...] = (
        lambda n: lists[n] in inside,
        lambda n: any(type(block).__name__ in whole for block in lists[n]),
    )
    for narrow in narrowings:
        if len(found) > 1:
            found = [n for n in found if narrow(n)] or found
    return found


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def context_of(model: nn.Module) -> int | None:
    """The longest sequence the model takes; None where its config knows no limit (ALiBi)."""
    config = _text_config(getattr(model, "config", None))
    context: int | None = getattr(config, "max_position_embeddings", None)
    return context


def vocab_size_of(model: nn.Module) -> int | None:
    """How many tokens the model's embedding holds; None where it tells none."""
    config = _text_config(getattr(model, "config", None))
    size: int | None = getattr(config, "vocab_size", None)
    return size


def linears_of(block: nn.Module) -> dict[str, nn.Module]:
    """The linears inside a module by relative name: nn.Linear, its subclasses, GPT-2's Conv1D."""
    return {n: m for n, m in block.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def targets_of_block(block: nn.Module) -> dict[str, Linear]:
    """All that can be pruned in a block by relative name: its linears, and its experts' slices."""
    return {**linears_of(block), **expert_slices(block)}


def weight_shape(module: Linear) -> tuple[int, int]:
    """(out, in) features: [n, k], whichever way round the module stores it."""
    rows, columns = weight_of(module).shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def weight_of(module: Linear) -> Tensor:
    """The weight as the module stores it, without its history."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def weight_identity(module: Linear) -> tuple[int, int]:
    """The same for linears that share a weight, and for no others."""
    if isinstance(module, ExpertSlice):
        return id(getattr(module.owner, module.parameter)), module.index
    return id(module.weight), 0


def is_transposed(module: Linear) -> bool:
    """Whether the module stores its weight as [k, n]."""
    return module.transposed if isinstance(module, ExpertSlice) else isinstance(module, Conv1D)


@contextmanager
def dense_weight(module: Linear, device: torch.device) -> Iterator[Tensor]:
    """The weight as [n, k] with unit column stride on `device`, to change in place.

    Where the module keeps it otherwise (transposed, on another device) a copy is lent and written
    back at the end, unless the body raises.
    """
    stored = weight_of(module)
    view = stored.t() if is_transposed(module) else stored
    dense = view.to(device).contiguous()
    yield dense
    if dense.data_ptr() != stored.data_ptr():
        view.copy_(dense)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """eval() inside; afterwards every module has its own training flag again."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """eval() and no gradients inside; afterwards training flags and random states are as before."""
    state, torch_state = random.getstate(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        with in_eval_mode(model), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        random.setstate(state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


# --- What is refused before any work -------------------------------------------------------------


def check_prunable(model: nn.Module) -> None:
    """Raises TypeError or ValueError for a model whose weights cannot be pruned in place."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch module, not {type(model).__name__}: load it with "
            "AutoModelForCausalLM.from_pretrained"
        )
    for name, module in model.named_modules():
        kinds = {
            f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(module).__mro__
        }
        if any(kind.startswith("peft.") for kind in kinds):
            raise ValueError(
                f"{name or 'the model'} holds an unmerged adapter ({type(module).__name__}): call "
                "merge_and_unload() first, or prune before training adapters"
            )
        if isinstance(module, PackedLinear):
            raise ValueError(f"{name} is packed already: call unswap_linears(model) first")
        if kinds & {"torch.FullyShardedDataParallel", "torch.FSDPModule"}:
            raise ValueError(f"{name or 'the model'} is sharded by FSDP: load it unsharded")
        if getattr(module, "_is_expert_parallel", False):
            raise ValueError(f"{name} holds a part of the experts only: load the model unsharded")
    label = quantized_by(model)
    if label:
        raise ValueError(
            f"the model is quantized ({label}): prune the original in float32, bfloat16 or "
            "float16, then quantize"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device: its values are not loaded, or offloaded to the "
                "disk or the CPU. Load the model without offloading and pass device= to prune "
                "block by block on the device"
            )


def check_weight(name: str, module: Linear) -> None:
    """Raises ValueError, naming the linear, where its weight is no plain float matrix."""
    if not isinstance(module, ExpertSlice) and computes_weight(module):
        raise ValueError(
            f"{name}.weight is computed anew for every call, and zeros in it would be lost: make "
            "it a parameter first (torch.nn.utils.parametrize.remove_parametrizations, or "
            "prune.remove), or ignore it"
        )
    weight = module.weight
    kind = type(weight.data if isinstance(weight, Tensor) else weight)
    if kind is not Tensor:
        raise ValueError(
            f"{name}.weight is a {kind.__name__}, a quantized or distributed tensor: prune the "
            "model unquantized and unsharded"
        )
    if weight.dtype not in FLOATS:
        raise ValueError(
            f"{name}.weight is {str(weight.dtype).removeprefix('torch.')}, and only float32, "
            "bfloat16 and float16 can be pruned: load the model unquantized in one of them"
        )
