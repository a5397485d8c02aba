"""One block's kept weights, trained until it puts out what it did before the prune.

Adam on fp32 copies of the block's parameters, a step a batch, each step in proportion to a weight's
own size. A 16-bit block computes in bf16 meanwhile, which no gradient overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wanda_ext.finetune import hold_masks
from wanda_ext.models import ExpertSlice, Linear, check_weight, targets_of_block, weight_of
from wanda_ext.runner import Walk

WARM_UP = 0.05  # the share of the steps in which they grow; then they shrink like a cosine
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Training:
    """epochs: passes over the data, a step a batch. learning_rate: the largest step of a weight,
    relative to the root mean square of those its matrix kept. seed: of the order of the batches."""

    epochs: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class PrunedWeight:
    """A weight that a prune has put zeros into, of a linear or of fused experts, and its bias."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def kept_rms(self) -> float:
        """The root mean square of the entries that are not zero."""
        weight = self.weight.detach()
        return math.sqrt(float(weight.double().square().sum()) / int(weight.count_nonzero()))


def pruned_weights(block: nn.Module, dense: nn.Module) -> list[PrunedWeight]:
    """The weights of a block that are zero where those of its dense twin are not, each once."""
    found: dict[int, PrunedWeight] = {}
    twins = targets_of_block(dense)
    for name, target in targets_of_block(block).items():
        weight, of_dense = _whole_weight(target), _whole_weight(twins[name])
        if ((weight == 0).cpu() & (of_dense != 0).cpu()).any() and weight.any():
            check_weight(name, target)
            one = PrunedWeight(*_parameters(target))
            found[id(one.weight)] = one
    return list(found.values())


def reconstruct(
    walk: Walk,
    index: int,
    pruned: Sequence[PrunedWeight],
    targets: Sequence[Tensor | None],
    training: Training,
) -> tuple[float, float]:
    """Trains block `index` of the walk in place and gives its relative error before and after.

    targets: what the block shall put out for each batch; None: the model skips it. The error is
    |B(x) - target| / |target| over all tokens but padding. Where it would not fall, or anything is
    raised, the block stays as it was, bit for bit. Raises ValueError where it is not finite.

    Shapes: targets [batch, tokens, features].
    """
    called = {j: target for j, target in enumerate(targets) if target is not None}
    power = _mean_square(_kept(target, walk, j) for j, target in called.items())
    homes = [parameter.detach() for one in pruned for parameter in one.parameters]
    device, half = homes[0].device, homes[0].dtype != torch.float32

    def error() -> float:
        parts = (_difference(walk, index, j, target) for j, target in called.items())
        return math.sqrt(_mean_square(parts) / power)

    def loss(j: int) -> Tensor:
        with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            return _difference(walk, index, j, called[j]).square().mean() / power

    before = after = error()
    if not math.isfinite(before):
        raise ValueError(
            "what it puts out, or what it should, holds NaN or infinity: look for weights or "
            "calibration tokens that make them"
        )
    saved = [home.clone() for home in homes]
    try:
        with _deterministic(), _in_float32(walk.blocks[index], pruned) as twins:
            _train(twins, list(called), loss, training)
        after = error()
    finally:
        if not after < before:
            for home, copy in zip(homes, saved, strict=True):
                home.copy_(copy)
    return before, after if after < before else before


def _train(
    pruned: Sequence[PrunedWeight],
    batches: Sequence[int],
    loss: Callable[[int], Tensor],
    training: Training,
) -> None:
    groups = [
        {"params": one.parameters, "lr": training.learning_rate * one.kept_rms} for one in pruned
    ]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    steps = training.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _step_size(done, steps))
    order = torch.Generator().manual_seed(training.seed)
    with hold_masks(optimizer):
        for _ in range(training.epochs):
            for i in torch.randperm(len(batches), generator=order).tolist():
                optimizer.zero_grad()
                loss(batches[i]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()


def _step_size(done: int, steps: int) -> float:
    """As a share of the largest: it rises to 1 in a line, then falls to 0 like a cosine."""
    return min(1.0, (done + 1) / (WARM_UP * steps)) * (1 + math.cos(math.pi * done / steps)) / 2


def _difference(walk: Walk, index: int, j: int, target: Tensor) -> Tensor:
    """The block's output for batch j minus the target, float32 [tokens, features], no padding."""
    out = walk.output(index, j)
    assert out is not None  # what the dense model calls, its twin calls
    return _kept(out.float() - target.to(out.device, torch.float32), walk, j)


def _kept(hidden: Tensor, walk: Walk, j: int) -> Tensor:
    keep = walk.keep[j]
    return hidden.flatten(0, -2) if keep is None else hidden[keep.to(hidden.device)]


def _mean_square(parts: Iterable[Tensor]) -> float:
    """Over all entries of all parts, in float64."""
    sums = [(part.square().sum(dtype=torch.float64), part.numel()) for part in parts]
    return sum(float(total) for total, _ in sums) / sum(count for _, count in sums)


def _whole_weight(target: Linear) -> Tensor:
    """Of a linear, or what an expert's slice is of."""
    if isinstance(target, ExpertSlice):
        whole: Tensor = getattr(target.owner, target.parameter)
        return whole.detach()
    return weight_of(target)


def _parameters(target: Linear) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The weight and the bias of a linear, or the whole weight that an expert's slice is of."""
    if isinstance(target, ExpertSlice):
        weight = getattr(target.owner, target.parameter)
        assert isinstance(weight, nn.Parameter)
        return weight, None
    weight, bias = target.weight, target.bias
    assert isinstance(weight, nn.Parameter)
    assert bias is None or isinstance(bias, nn.Parameter)
    return weight, bias


@contextmanager
def _in_float32(block: nn.Module, pruned: Sequence[PrunedWeight]) -> Iterator[list[PrunedWeight]]:
    """The block on float32 copies of its tensors inside; given are the pruned ones', to train.

    What they became is written home at the end, unless the body raises.
    """
    trained = {id(parameter) for one in pruned for parameter in one.parameters}
    own = [
        (module, name, tensor)
        for module in block.modules()
        for named in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in named
        if tensor.is_floating_point()
    ]
    twins: dict[int, Any] = {}  # by identity, for weights that several modules share
    for _, _, tensor in own:
        train = id(tensor) in trained
        copy = tensor.detach().to(torch.float32, copy=train)
        parameter = isinstance(tensor, nn.Parameter)
        twins[id(tensor)] = nn.Parameter(copy, requires_grad=train) if parameter else copy
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: (_as_float32(args), _as_float32(kwargs)), with_kwargs=True
    )
    try:
        for module, name, tensor in own:
            setattr(module, name, twins[id(tensor)])
        yield [
            PrunedWeight(twins[id(one.weight)], None if one.bias is None else twins[id(one.bias)])
            for one in pruned
        ]
    finally:
        handle.remove()
        for module, name, tensor in own:
            setattr(module, name, tensor)
    for one in pruned:
        for home in one.parameters:
            home.detach().copy_(twins[id(home)].detach())


def _as_float32(value: Any) -> Any:
    """Nested containers of arguments, their 16-bit floats as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_as_float32(item) for item in value)
    if type(value) is dict:
        return {key: _as_float32(item) for key, item in value.items()}
    return value


@contextmanager
def _deterministic() -> Iterator[None]:
    """On a GPU too, where the backward passes of some kernels add up in any order by default."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
