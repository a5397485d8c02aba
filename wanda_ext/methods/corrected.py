"""The corrected update: what a method keeps makes up for all that pruning did to the outputs.

With x the input of a linear in the pruned model and x0 in the dense one, over the calibration
tokens, H = sum of x x^T and D = sum of (x0 - x) x^T. A row w of the weight should put out w x0,
and reads x. In three steps:

1. The target W1 = W + W D (H + ridge)^-1 is the weight, of no sparsity, whose outputs on x come
   nearest to those of W on x0 (GPTAQ, arXiv:2504.02692, corrects quantization so).
2. The method chooses from W1 and H.
3. The kept weights V are solved for by least squares: minimize tr (V - W1)(H + damping)(V - W1)^T,
   row by row over its own kept columns, by conjugate gradients preconditioned by the diagonal
   (as ALPS does, arXiv:2406.07831). They start at what the method left.

Both shares are of H's mean diagonal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wanda_ext.interrupt import step
from wanda_ext.methods.method import Method
from wanda_ext.methods.sparsity import Sparsity
from wanda_ext.methods.statistic import InputStatistic, Reads, full_precision


@dataclass(frozen=True)
class Corrected:
    """ridge: of the target; more trusts the calibration text less. damping: of the least squares.
    steps: of conjugate gradients; 0 leaves the kept weights as the method left them."""

    ridge: float = 0.1
    damping: float = 0.01
    steps: int = 20

    def __post_init__(self) -> None:
        shares = (self.ridge, self.damping)
        whole = isinstance(self.steps, int) and not isinstance(self.steps, bool)
        if not all(0 <= share < math.inf for share in shares) or not whole or self.steps < 0:
            raise ValueError(
                f"Corrected needs ridge >= 0, damping >= 0 and a whole number of steps >= 0; got "
                f"{self}. Its defaults are {Corrected()}"
            )


UPDATES = {"corrected": Corrected}


def get_update(update: str | Corrected | None) -> Corrected | None:
    """The update of that name with its default options, or the update itself.

    Raises ValueError (no such name) or TypeError (nothing that updates).
    """
    if isinstance(update, str):
        if update not in UPDATES:
            raise ValueError(
                f"there is no update {update!r}: pass one of {', '.join(UPDATES)}, or None"
            )
        return UPDATES[update]()
    if update is not None and not isinstance(update, Corrected):
        raise TypeError(
            f"update must be None, a name ({', '.join(UPDATES)}) or Corrected(...), not {update!r}"
        )
    return update


@dataclass(frozen=True)
class Updated:
    """A method that is followed by an update: a method, too.

    Everything is computed in fp32 and rounded to the weight's dtype once, at the end. Where the
    inputs' drift is not known (experts, see TwoStreams.stages) the target is W.
    """

    method: Method
    update: Corrected
    reads: Reads = "gram"

    @property
    def name(self) -> str:
        return f"{self.method.name}, corrected"

    @property
    def kernels(self) -> tuple[str, ...]:
        return self.method.kernels

    def check(self, name: str, sparsity: Sparsity) -> None:
        """Raises what the method raises."""
        self.method.check(name, sparsity)

    def prune_(
        self, weight: Tensor, sparsity: Sparsity, inputs: InputStatistic | None, bad: Tensor
    ) -> None:
        """Shapes: weight [n, k]; bad [1] int32."""
        if inputs is None or inputs.gram is None:
            raise TypeError("Corrected needs the inputs' gram matrix: none was collected")
        gram = inputs.gram.to(weight.device)
        target = weight.float()
        if inputs.drift is not None:
            drift = inputs.drift.to(weight.device)
            if not drift.isfinite().all():
                raise ValueError(
                    "NaN or infinite activations enter it in the dense model: look for the layer "
                    "before it that makes them, or for bad calibration tokens"
                )
            target = corrected_target(target, gram, drift, self.update.ridge)
        kept = target.clone()
        self.method.prune_(kept, sparsity, inputs, bad)
        if int(bad) >= 0:
            return
        solve_kept_(kept, target, gram, self.update.damping, self.update.steps)
        rounded = kept.to(weight.dtype)
        bad_rows = (~rounded.isfinite().all(dim=1)).nonzero().flatten()
        if len(bad_rows):
            bad.copy_(bad_rows[:1])
            return
        weight.copy_(rounded).add_(0.0)  # a kept -0.0 becomes +0.0, as in every op


def with_update(method: Method, update: Corrected | None) -> Method:
    """The method, followed by the update where there is one."""
    return method if update is None else Updated(method, update)


def corrected_target(weight: Tensor, gram: Tensor, drift: Tensor, ridge: float) -> Tensor:
    """W + W D (H + ridge * mean diagonal of H)^-1. Raises ValueError where that has no inverse.

    Shapes: weight [n, k], gram H [k, k], drift D [k, k], all float32 -> [n, k] float32.
    """
    with full_precision():
        lower, info = torch.linalg.cholesky_ex(damped(gram, ridge))
        if int(info):
            raise ValueError(
                f"the gram matrix of its inputs, with ridge={ridge} of its mean diagonal added, is "
                "not positive definite: pass a larger ridge, such as Corrected(ridge=0.1), or more "
                "calibration data"
            )
        moved: Tensor = torch.cholesky_solve((weight @ drift).t(), lower)
    return weight + moved.t()


def solve_kept_(weight: Tensor, target: Tensor, gram: Tensor, damping: float, steps: int) -> None:
    """Steps from W towards the V, zero where W is, that minimizes tr (V - T) H (V - T)^T, in place.

    H has `damping` times its mean diagonal added. Rows are independent, each with its own step
    sizes. Entries that are zero stay exactly zero.

    Shapes: weight [n, k], target T [n, k], gram H [k, k], all float32.
    """
    if not steps:
        return
    kept = (weight != 0).float()
    with full_precision():
        hessian = damped(gram, damping)
        scale = hessian.diagonal().sqrt()
        hessian /= scale[:, None] * scale  # with a diagonal of ones it needs no preconditioner
        residual = (((target - weight) * scale) @ hessian).mul_(kept)
        direction, size = residual.clone(), _dot(residual, residual)
        moved = torch.zeros_like(weight)
        floor = size * torch.finfo(size.dtype).eps ** 2  # below it a row is solved, the rest noise
        for _ in range(steps):
            step()
            unsolved = size > floor
            image = (direction @ hessian).mul_(kept)
            length = torch.where(unsolved, size / _dot(direction, image), 0.0)
            moved.addcmul_(direction, length)
            residual.addcmul_(image, length, value=-1)
            before, size = size, _dot(residual, residual)
            direction.mul_(torch.where(unsolved, size / before, 0.0)).add_(residual)
        weight.addcdiv_(moved, scale)


def damped(gram: Tensor, share: float) -> Tensor:
    """The gram matrix with `share` of its mean diagonal added to its diagonal.

    A feature that is always 0 meets no other, so its entry may be any positive number: 1.

    Shapes: gram [k, k] float32 -> [k, k] float32.
    """
    gram = gram.clone()
    diagonal = gram.diagonal()
    damping = share * diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping
    return gram


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Of each row. Shapes: [n, k], [n, k] -> [n, 1]."""
    product: Tensor = torch.linalg.vecdot(one, other)
    return product[:, None]
