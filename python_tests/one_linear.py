"""One linear, its weight and its inputs, for tests of methods."""

from __future__ import annotations

import torch

from wanda_ext.methods import InputStatistic, drift_of, gram_of


def correlated(tokens=400, k=192, seed=0):
    """Inputs [tokens, k] whose features are correlated and differ in size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g) / k**0.5 + torch.eye(k)
    return torch.randn(tokens, k, generator=g) @ mix * torch.randn(k, generator=g).exp()


def statistic_of(x, dense=None):
    """dense: the same inputs in the dense model."""
    drift = None if dense is None else drift_of(dense, x)
    return InputStatistic(x.double().square().sum(0), len(x), gram=gram_of(x), drift=drift)


def weight_of_shape(n=40, k=192, dtype=torch.float32):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)).to(dtype)


def pruned(method, weight, sparsity, inputs):
    weight, bad = weight.clone(), torch.tensor([7], dtype=torch.int32)
    method.prune_(weight, sparsity, inputs, bad)
    return weight, int(bad)


def loss(weight, pruned, x):
    return float(((weight - pruned).double() @ x.double().t()).square().sum())
