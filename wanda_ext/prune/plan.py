"""What to prune and what not: every linear of every block, with its sparsity or why it has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from wanda_ext.checkpoint import shared_names, stay_dense
from wanda_ext.methods import Sparsity, SparsitySpec, check_globs, matches, sparsity_for
from wanda_ext.models import (
    ExpertSlice,
    Linear,
    check_weight,
    find_blocks,
    targets_of_block,
    weight_identity,
    weight_of,
    weight_shape,
)
from wanda_ext.ops import MAX_SURPLUS_COLS
from wanda_ext.packed import expected_bytes, fits_records
from wanda_ext.report import PruneReport, versions

MOST_KEPT = 0.7  # of a weight: packed, more would take about as many bytes as dense


@dataclass(frozen=True)
class PlannedLinear:
    name: str  # in the model
    module: Linear  # or one expert's part of a fused weight
    sparsity: Sparsity | None  # None: it stays as it is
    status: str  # "planned", or why it stays

    @property
    def is_expert(self) -> bool:
        """It is a part of a fused weight, and no module that another could replace."""
        return isinstance(self.module, ExpertSlice)


@dataclass(frozen=True)
class PlannedBlock:
    name: str
    module: nn.Module
    linears: dict[str, PlannedLinear]  # by name in the block

    @property
    def targets(self) -> dict[str, PlannedLinear]:
        """The linears to prune."""
        return {name: linear for name, linear in self.linears.items() if linear.sparsity}


def plan_blocks(
    model: nn.Module,
    spec: SparsitySpec,
    ignore: Sequence[str] = (),
    blocks: str | nn.ModuleList | None = None,
) -> list[PlannedBlock]:
    """Decides for every linear before any is touched; a weight that several share counts once.

    Raises ValueError, naming the module, where no blocks are found, a glob matches nothing, a
    sparsity does not fit a shape, a weight is no plain float matrix, or nothing is left to prune.
    """
    found = [(path, block, targets_of_block(block)) for path, block in find_blocks(model, blocks)]
    names = [f"{path}.{name}" for path, _, linears in found for name in linears]
    modules = [name for name, _ in model.named_modules()]
    check_globs(ignore, [*names, *modules], "ignore glob")
    if isinstance(spec, Mapping):
        check_globs(spec, names, "sparsity glob")
    owners: dict[tuple[int, int], str] = {}
    plan = []
    for path, block, linears in found:
        planned = {}
        for short, module in linears.items():
            name = f"{path}.{short}"
            planned[short] = _planned(name, module, spec, ignore, owners)
        plan.append(PlannedBlock(path, block, planned))
    if not any(block.targets for block in plan):
        raise ValueError("there is nothing to prune: every linear is ignored or left dense")
    return plan


def _planned(
    name: str,
    module: Linear,
    spec: SparsitySpec,
    ignore: Sequence[str],
    owners: dict[tuple[int, int], str],
) -> PlannedLinear:
    if any(matches(glob, name) for glob in ignore):
        return PlannedLinear(name, module, None, "ignored")
    sparsity = sparsity_for(spec, name, module)
    if sparsity is None:
        return PlannedLinear(name, module, None, "left dense")
    check_weight(name, module)
    owner = owners.setdefault(weight_identity(module), name)
    if owner != name:
        return PlannedLinear(name, module, None, f"shares the weight of {owner}")
    sparsity.check(name, *weight_shape(module))
    return PlannedLinear(name, module, sparsity, "planned")


def report_of(model: nn.Module, plan: Iterable[PlannedBlock]) -> PruneReport:
    """A report that knows the model's size, and nothing else yet."""
    report = PruneReport(versions=versions())
    report.block_weights = sum(p.numel() for block in plan for p in block.module.parameters())
    report.model_weights = sum(p.numel() for p in model.parameters())
    names = shared_names(dict(model.named_parameters(remove_duplicate=False)))
    report.shared = [of_one for of_one in names if len(of_one) > 1]
    return report


def targets_of(plan: Iterable[PlannedBlock]) -> list[PlannedLinear]:
    """The linears to prune, of all blocks."""
    return [linear for block in plan for linear in block.targets.values()]


def check_unshared(plan: Iterable[PlannedBlock]) -> None:
    """Raises ValueError, naming the linear, where a weight to prune is another block's too.

    An update runs each block dense before it is pruned, while those before it are pruned already.
    """
    first: dict[int, str] = {}
    pruned: dict[int, str] = {}
    for block in plan:
        for parameter in block.module.parameters():
            owner = first.setdefault(id(parameter), block.name)
            if owner != block.name and id(parameter) in pruned:
                raise ValueError(
                    f"{pruned[id(parameter)]} shares its weight with {block.name}, which would "
                    "not run dense any more once it is pruned: prune without an update, or ignore "
                    "it"
                )
        for linear in block.targets.values():
            pruned[weight_identity(linear.module)[0]] = linear.name


def check_packable(model: nn.Module, plan: Iterable[PlannedBlock]) -> None:
    """Raises ValueError where a linear keeps too many weights to be packed, or none can be."""
    targets = targets_of(plan)
    for linear in targets:
        if linear.sparsity is not None and linear.sparsity.keep_fraction > MOST_KEPT:
            raise ValueError(
                f"only linears of which at least {1 - MOST_KEPT:.0%} is pruned can be packed, and "
                f"{linear.name} becomes {linear.sparsity}: prune more, or do not ask for packing"
            )
    reasons = stay_dense(model)
    reasons |= {one.name: "fused experts stay dense" for one in targets if one.is_expert}
    small = {one.name: _cannot_fit(one) for one in targets if one.name not in reasons}
    reasons |= {name: why for name, why in small.items() if why}
    if all(one.name in reasons for one in targets):
        name = targets[0].name
        raise ValueError(
            f"no linear can be packed ({name}: {reasons[name]}; ...): do not ask for packing"
        )


def _cannot_fit(linear: PlannedLinear) -> str:
    """Why a linear cannot be packed when it is pruned, in a clause; "" where it most likely can."""
    n, k = weight_shape(linear.module)
    itemsize = weight_of(linear.module).element_size()
    nbytes = expected_bytes(linear.sparsity, n, k, itemsize)
    if nbytes >= n * k * itemsize:
        return f"a bitmap of [{n}, {k}] takes {nbytes} bytes, dense {n * k * itemsize}"
    if k > MAX_SURPLUS_COLS and not fits_records(linear.sparsity):
        return f"its {k} columns are over {MAX_SURPLUS_COLS}, the most with a surplus"
    return ""
