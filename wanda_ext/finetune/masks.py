"""hold_masks: full fine-tuning in which pruned weights stay exactly zero.

A zero weight whose gradient is masked gets no step from any of torch's optimizers, and clipping
sees the norm of what is trained alone. What else could move it (momentum from before the prune, a
step that adds noise) is undone after each step, in the weight and in the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class HeldMasks:
    """What hold_masks returns. `remove()`, or leaving it as a context, lets the zeros go again.

    parameters: how many hold zeros. zeros: how many zeros they hold.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Iterable[nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._pruned = [(weight, weight.detach() == 0) for weight in weights]
        self.parameters = len(self._pruned)
        self.zeros = sum(int(pruned.count_nonzero()) for _, pruned in self._pruned)
        self._handles: list[Any] = [
            weight.register_hook(  # type: ignore[no-untyped-call]
                lambda grad, index=index: self._masked(index, grad)
            )
            for index, (weight, _) in enumerate(self._pruned)
            if weight.requires_grad
        ]
        self._handles.append(optimizer.register_step_post_hook(self._restore))
        self._clear()

    def remove(self) -> None:
        """Lets the zeros go: later steps may fill them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> HeldMasks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _masked(self, index: int, grad: Tensor) -> Tensor:
        return grad.masked_fill(self._pruned_on(index, grad.device), 0)

    def _restore(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._clear()

    @torch.no_grad()
    def _clear(self) -> None:
        """Zeros in the weights, and in whatever the optimizer keeps for each of their entries."""
        for index, (weight, _) in enumerate(self._pruned):
            pruned = self._pruned_on(index, weight.device)
            weight.masked_fill_(pruned, 0)
            for value in self._optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(pruned.to(value.device), 0)

    def _pruned_on(self, index: int, device: torch.device) -> Tensor:
        """The mask where the weight is now, should the model have moved."""
        weight, pruned = self._pruned[index]
        if pruned.device != device:
            pruned = pruned.to(device)
            self._pruned[index] = weight, pruned
        return pruned


def hold_masks(
    optimizer: torch.optim.Optimizer,
    parameters: nn.Module | Iterable[nn.Parameter] | None = None,
) -> HeldMasks:
    """From now on every step of `optimizer` leaves exact zeros where there are zeros now.

    Held are the zeros of all weights with two or more dimensions (linears, stacked experts) that
    the optimizer trains and that have any: those of pruned weights, and a zero that a dense weight
    or a padding row happens to have. parameters: only those of this module, or these ones. Works
    with every torch optimizer (momentum, weight decay, foreach, fused), gradient clipping and
    torch.amp.GradScaler. Call it before accelerate or another library wraps the optimizer, and
    again for parameter groups that are added later.

    Raises TypeError for what is no torch optimizer, ValueError where no weight has zeros.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"hold_masks: expected a torch optimizer, got {type(optimizer).__name__}; make one of "
            "the pruned model's parameters first"
        )
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    wanted = None if parameters is None else {id(parameter) for parameter in parameters}
    weights = [
        weight
        for group in optimizer.param_groups
        for weight in group["params"]
        if weight.dim() >= 2
        and (wanted is None or id(weight) in wanted)
        and int(weight.detach().count_nonzero()) < weight.numel()
    ]
    if not weights:
        raise ValueError(
            "hold_masks: expected an optimizer that trains pruned weights, and none of its weights "
            "holds a zero: prune the model first, and give the optimizer its parameters"
        )
    return HeldMasks(optimizer, weights)
