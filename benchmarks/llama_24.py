"""Random Llamas whose linears are 2:4, and what an inference engine does with them.

No checkpoint is read: the shapes decide the speed, and the weights are pruned by random norms.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from wanda_ext import ops, swap_linears
from wanda_ext.packed.fuse import FusedLinear24
from wanda_ext.packed.linear_24 import Product24

SIZES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "small": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
    },
}
STEPS = 8  # of decoding, in one run


def random_llama(size: str, device: torch.device) -> Any:
    """A Llama of that shape in bf16; every linear of its blocks is 2:4."""
    config = LlamaConfig(**SIZES[size], max_position_embeddings=4096, attn_implementation="sdpa")
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        for linear in linears_of(model):
            weight = linear.weight.detach()
            ops.prune_nm_(weight, torch.randn(weight.shape[1]).abs(), 2, 4)
    return model


def packed_twin(model: Any, fuse: bool) -> Any:
    """A copy of the model with packed linears."""
    twin = copy.deepcopy(model)
    swap_linears(twin, fuse=fuse)
    return twin


def linears_of(model: Any) -> list[nn.Module]:
    """What multiplies by the weights of the blocks, merged linears once."""
    return [
        module
        for module in model.model.layers.modules()
        if isinstance(module, (nn.Linear, Product24)) and not isinstance(module, FusedLinear24)
    ]


def bytes_of(modules: list[nn.Module], recurse: bool = False) -> int:
    """Of their parameters and buffers, tensors that they share counted once."""
    tensors = {
        id(tensor): tensor
        for module in modules
        for tensor in (*module.parameters(recurse), *module.buffers(recurse))
    }
    return sum(tensor.nbytes for tensor in tensors.values())


class Prefill:
    """`batch` prompts of `length` tokens at once, to the logits of the last ones."""

    def __init__(self, model: Any, batch: int, length: int) -> None:
        self.model, self.tokens = model, batch * length
        self.ids = _ids(model, batch, length)

    def restore(self) -> None: ...

    def run(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1).logits
        return logits


class Decode:
    """STEPS greedy steps of `batch` sequences on a static cache that is half full."""

    def __init__(self, model: Any, batch: int, length: int) -> None:
        self.model, self.tokens, self.half = model, batch, length // 2
        config = model.config
        self.cache = StaticCache(config=config, max_cache_len=length)
        heads = config.num_key_value_heads
        head_dim = config.hidden_size // config.num_attention_heads
        self.cache.early_initialization(batch, heads, head_dim, model.dtype, model.device)
        g = torch.Generator(device=model.device).manual_seed(0)
        for layer in self.cache.layers:
            layer.keys.normal_(generator=g)
            layer.values.normal_(generator=g)
        self.ids = _ids(model, batch, 1)
        # Newer versions of transformers call it `cache`.
        names = inspect.signature(inspect.unwrap(model.forward)).parameters
        self.keyword = "cache" if "cache" in names else "past_key_values"

    def restore(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.half)

    def run(self) -> Tensor:
        ids, chosen = self.ids, []
        for _ in range(STEPS):
            logits = self.model(input_ids=ids, use_cache=True, **{self.keyword: self.cache}).logits
            ids = logits.argmax(dim=-1)
            chosen.append(logits)
        return torch.cat(chosen, dim=1)


class Linears:
    """All linears of the blocks and nothing else, each for `tokens` tokens, `times` times."""

    def __init__(self, model: Any, tokens: int, times: int) -> None:
        self.linears, self.times = linears_of(model), times
        self.inputs = {
            k: torch.randn(tokens, k, dtype=model.dtype, device=model.device)
            for k in sorted({linear.in_features for linear in self.linears})
        }

    def restore(self) -> None: ...

    def run(self) -> Tensor:
        y = torch.empty(0)
        for _ in range(self.times):
            for linear in self.linears:
                y = linear(self.inputs[linear.in_features])
        return y


def works(size: str) -> Iterator[tuple[str, type[Prefill] | type[Decode], int, int]]:
    """Name, kind, batch and length of what is timed."""
    small = size == "small"
    for batch in (1, 2) if small else (1, 8, 32):
        yield f"decode, batch {batch}", Decode, batch, 32 if small else 512
    for batch in (1, 2) if small else (1, 8):
        yield f"prefill {batch}x{16 if small else 2048}", Prefill, batch, 16 if small else 2048


def compile_blocks(model: Any) -> None:
    """Compiles each block by itself, which takes seconds where the whole model takes minutes."""
    torch._dynamo.config.recompile_limit = 1 << 12  # a block's index is a constant of its code
    torch._dynamo.config.accumulated_recompile_limit = 1 << 14
    for block in model.model.layers:
        block.compile(dynamic=False)


def _ids(model: Any, batch: int, length: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=g).to(model.device)
