"""A small attention whose packed linears are merged, and what tests ask of it."""

from __future__ import annotations

import torch
from models_24 import prune_24
from torch import nn

from wanda_ext.checkpoint.save import swap_linears
from wanda_ext.packed.fuse import FusedLinear24, FusedProduct


class Attention(nn.Module):
    """q, k and v of one input, as decoders call them."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.q_proj = nn.Linear(64, 64, bias, dtype=dtype)
        self.k_proj = nn.Linear(64, 32, bias, dtype=dtype)
        self.v_proj = nn.Linear(64, 32, bias, dtype=dtype)
        for module in self.children():
            prune_24(module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (*x.shape[:-1], -1, 16)
        q, k, v = (p(x).view(heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        return q + torch.cat([k, v], dim=-2)


def fused(**options) -> Attention:
    module = Attention(**options)
    swap_linears(module, fuse=True)
    return module


def product_of(module: Attention) -> FusedProduct:
    return module.q_proj.product


def merged(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, FusedLinear24)]


def assert_equal_states(state, expected) -> None:
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype, name
