"""The original Wanda procedure in plain PyTorch: what wanda_ext is compared with.

Written from the paper (arXiv:2306.11695) and the behaviour of its authors' code, independent of the
package: statistics by add_batch, |W| * sqrt(s), a stable sort per row or topk per group, one block
after the other, one sequence at a time. Kept straightforward, not fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from original_sparsegpt import Hessian, prune_sparsegpt_

BLOCKS = {
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
}


class _Caught(Exception):  # noqa: N818 - not an error
    """Ends a forward pass at the first block."""


class Statistic:
    """The mean over sequences of each input feature's sum of squares, kept batch by batch."""

    def __init__(self, columns: int) -> None:
        self.scaler_row = torch.zeros(columns)
        self.nsamples = 0

    def add_batch(self, inp: Tensor, keep: Tensor | None = None) -> None:
        """inp [batch, tokens, k] or [tokens, k]; keep [tokens] bool drops padding."""
        if inp.dim() == 2:
            inp = inp.unsqueeze(0)
        added = inp.shape[0]
        inp = inp.reshape(-1, inp.shape[-1])
        if keep is not None:
            inp = inp[keep]
        inp = inp.t().type(torch.float32)
        self.scaler_row *= self.nsamples / (self.nsamples + added)
        self.nsamples += added
        self.scaler_row += torch.norm(inp, p=2, dim=1) ** 2 / self.nsamples


def prune_unstructured_(weight: Tensor, scaler_row: Tensor, ratio: float) -> None:
    """Row by row: a stable sort of all scores, then int(k * ratio) scattered zeros."""
    metric = torch.abs(weight) * torch.sqrt(scaler_row.reshape(1, -1))
    mask = torch.zeros_like(metric) == 1
    indices = torch.sort(metric, dim=-1, stable=True)[1][:, : int(metric.shape[1] * ratio)]
    mask.scatter_(1, indices, True)
    weight[mask] = 0


def prune_group_(weight: Tensor, scaler_row: Tensor, keep: int, group: int) -> None:
    """Group by group: the lowest group - keep scores of each row by topk."""
    metric = torch.abs(weight) * torch.sqrt(scaler_row.reshape(1, -1))
    mask = torch.zeros_like(metric) == 1
    for first in range(0, metric.shape[1], group):
        part = metric[:, first : first + group].float()
        lowest = torch.topk(part, group - keep, dim=1, largest=False)[1]
        mask.scatter_(1, first + lowest, True)
    weight[mask] = 0


def prune_variant_(weight: Tensor, scaler_row: Tensor, ratio: float) -> float:
    """Row by row: scores up to alpha of the row's sum; alpha by bisection. Returns alpha.

    Where even a row's lowest score is too much, the authors' index wraps to the row's highest score
    and all of the row goes; here nothing of it goes.
    """
    metric = torch.abs(weight) * torch.sqrt(scaler_row.reshape(1, -1))
    ordered = torch.sort(metric, dim=-1, stable=True)[0]
    prefix, total = torch.cumsum(ordered, dim=1), metric.sum(dim=1)

    def mask_at(alpha: float) -> Tensor:
        mask = torch.zeros_like(metric) == 1
        for row in range(len(metric)):
            within = int((prefix[row] <= total[row] * alpha).sum())
            if within:
                mask[row] = metric[row] <= ordered[row, within - 1]
        return mask

    alpha, bounds = 0.4, [0.0, 0.8]
    mask = mask_at(alpha)
    while abs(mask.float().mean() - ratio) > 0.001 and bounds[1] - bounds[0] >= 0.001:
        too_many = bool(mask.float().mean() > ratio)
        bounds[int(too_many)], alpha = alpha, (alpha + bounds[1 - int(too_many)]) / 2
        mask = mask_at(alpha)
    weight[mask] = 0
    return alpha


@torch.no_grad()
def prune(
    model: nn.Module,
    sequences: Sequence[dict[str, Tensor]],
    sparsity: float | tuple[int, int],
    method: str = "wanda",
) -> dict[str, Statistic | Hessian]:
    """Prunes the model's decoder blocks in place; returns each linear's statistic.

    sequences: batches of one, each for model(**sequence); attention_mask keeps padding out.
    sparsity: a ratio, or (keep, group). method: "wanda" or "sparsegpt".
    """
    path = BLOCKS[model.config.model_type]
    layers = model.get_submodule(path)
    inputs, others = _first_block_inputs(model, layers, sequences)
    statistics: dict[str, Statistic | Hessian] = {}
    kind = Hessian if method == "sparsegpt" else Statistic
    for number, layer in enumerate(layers):
        linears = {
            name: module
            for name, module in layer.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }
        collected = _collect(kind, layer, linears, inputs, others, sequences)
        for name, module in linears.items():
            weight, found = _as_rows(module), collected[name]
            if isinstance(found, Hessian):
                prune_sparsegpt_(weight, found.matrix, sparsity)
            elif isinstance(sparsity, tuple):
                prune_group_(weight, found.scaler_row, *sparsity)
            else:
                prune_unstructured_(weight, found.scaler_row, sparsity)
            statistics[f"{path}.{number}.{name}"] = collected[name]
        inputs = [_run(layer, inputs[j], others[j]) for j in range(len(sequences))]
    return statistics


def _collect(
    kind: type[Statistic] | type[Hessian],
    layer: nn.Module,
    linears: dict[str, nn.Module],
    inputs: list[Tensor],
    others: list[tuple[tuple, dict]],
    sequences: Sequence[dict[str, Tensor]],
) -> dict[str, Statistic | Hessian]:
    collected = {name: kind(_as_rows(module).shape[1]) for name, module in linears.items()}
    keep: Tensor | None = None

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: collected[name].add_batch(args[0], keep)

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    for hidden, other, sequence in zip(inputs, others, sequences, strict=True):
        mask = sequence.get("attention_mask")
        keep = None if mask is None else mask.reshape(-1).bool()
        _run(layer, hidden, other)
    for handle in handles:
        handle.remove()
    return collected


def _as_rows(module: nn.Module) -> Tensor:
    weight = module.weight.data
    return weight.t() if isinstance(module, Conv1D) else weight


def _first_block_inputs(
    model: nn.Module, layers: nn.ModuleList, sequences: Sequence[dict[str, Tensor]]
) -> tuple[list[Tensor], list[tuple[tuple, dict]]]:
    """What enters the first block; the original calls every block with its other arguments."""
    inputs: list[Tensor] = []
    others: list[tuple[tuple, dict]] = []

    def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append(args[0])
        others.append((args[1:], kwargs))
        raise _Caught

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for sequence in sequences:
        with suppress(_Caught):
            model(**sequence, use_cache=False)
    handle.remove()
    return inputs, others


def _run(layer: nn.Module, hidden: Tensor, other: tuple[tuple, dict]) -> Tensor:
    args, kwargs = other
    out = layer(hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out
