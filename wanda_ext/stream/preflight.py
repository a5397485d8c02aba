"""What a streamed prune needs before it begins: memory, disk, and blocks that can run alone."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wanda_ext.calibration import Batch
from wanda_ext.checkpoint import Made
from wanda_ext.models import preserved, weight_of, weight_shape
from wanda_ext.packed import expected_bytes, fits_records
from wanda_ext.prune import PlannedBlock, PlannedLinear
from wanda_ext.runner import PROBE_TOKENS, GlueError, Walk
from wanda_ext.stream.meta_model import IN_MEMORY, NamesError
from wanda_ext.stream.skeleton import Skeleton

MARGIN = 1.05  # of the disk: headers, JSON, blocks of the file system
ACTIVATIONS = 24  # hidden states that one batch leaves inside a block at a time, at most


@dataclass(frozen=True)
class Needs:
    """Bytes at the peak, and what is there. str() is a line for a person."""

    memory: int
    disk: int
    free_memory: int
    free_disk: int

    def check(self) -> None:
        """Raises ValueError where one of them is short."""
        for what, needed, there, advice in (
            (
                "memory",
                self.memory,
                self.free_memory,
                "a smaller nsamples or batch_size, or states='files',",
            ),
            ("disk space", self.disk, self.free_disk, "another place for the output"),
        ):
            if needed > there:
                raise ValueError(
                    f"this needs about {_size(needed)} of {what}, and {_size(there)} are free: "
                    f"{advice} may do"
                )

    def __str__(self) -> str:
        return (
            f"needs about {_size(self.memory)} of memory ({_size(self.free_memory)} free) and "
            f"{_size(self.disk)} on disk ({_size(self.free_disk)} free)"
        )


def needs_of(
    skeleton: Skeleton,
    plan: Sequence[PlannedBlock],
    batches: Sequence[Batch] | None,
    folder: Path,
    packed: bool,
    in_files: bool,
    ranks: int = 1,
    gram: bool = False,
    update: bool = False,
) -> Needs:
    """What this process will need beside what it has now; `folder` holds what is written already.

    Memory: at the start the embeddings with the first block, later two blocks; and the hidden
    states. gram: whether the method reads the inputs' gram matrices, too; update: whether a dense
    stream runs beside, and blocks are held on all batches. Disk: the checkpoint in pieces; beside
    it the states twice where they lie in files, and after them the largest file as it is joined.
    """
    made = [one.joined_bytes for one in skeleton.stored.values() if isinstance(one, Made)]
    sizes = {name: stored.nbytes for name, stored in skeleton.stored.items()}
    blocks = [sum(sizes[name] for name in skeleton.names(block.name)) for block in plan]
    outside = [sizes[name] for name in skeleton.outside([block.name for block in plan])]
    head = _head_bytes(skeleton)
    memory = max(
        sum(outside) - head + blocks[0],
        max(a + b for a, b in zip(blocks, [*blocks[1:], blocks[-1]], strict=True)),
    )
    memory += max(made, default=0)  # the pieces, beside what they become
    files = _file_bytes(skeleton, plan if packed else ())
    disk, beside = sum(files.values()), max(files.values())
    if batches is not None:
        width = _hidden_bytes(skeleton)
        tokens = [batch["input_ids"].numel() for batch in batches]
        states = sum(tokens) * width * (1 + update)
        memory += max(tokens) * width * ACTIVATIONS
        if gram:
            memory += max(_gram_bytes(block) for block in plan)
        if update:
            held = max(_held_bytes(block) for block in plan)
            memory += sum(tokens) * (held + 2 * width) + max(_drift_bytes(block) for block in plan)
        if in_files:
            beside = max(beside, 2 * states)
        else:
            memory += states // ranks
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Needs(
        memory=memory,
        disk=max(0, int(MARGIN * (disk + beside)) - written),
        free_memory=_free_memory(),
        free_disk=shutil.disk_usage(_existing(folder)).free,
    )


def check_alone(skeleton: Skeleton, plan: Sequence[PlannedBlock], batch: Batch) -> None:
    """Raises NamesError where a few tokens show that the blocks cannot run one by one."""
    names = [block.name for block in plan]
    first = skeleton.read(skeleton.names(names[0]))
    ids = batch["input_ids"][:1, :PROBE_TOKENS]
    model = skeleton.model
    with preserved(model), skeleton.holding(first), skeleton.read_when_called(names):
        try:
            Walk(model, [(block.name, block.module) for block in plan], [{"input_ids": ids}])
        except (GlueError, RuntimeError) as error:
            if not isinstance(error, GlueError) and "meta" not in str(error):
                raise  # else the model asks for weights that are not read: Idefics 3 for its device
            raise NamesError(
                f"the blocks of {type(model).__name__} cannot run alone ({error}); {IN_MEMORY}"
            ) from error


def _file_bytes(skeleton: Skeleton, packed: Sequence[PlannedBlock]) -> dict[str, int]:
    """Of the tensors in each file of the checkpoint, as they are written; `packed`: those blocks
    whose linears are packed."""
    less = {
        f"{linear.name}.weight": _packed_less(linear)
        for block in packed
        for linear in block.linears.values()
    }
    sizes: Counter[str] = Counter()
    for group in skeleton.conversion.groups:
        made = skeleton.stored[skeleton.first(group.first)].dtype  # what is pruned is written so
        for stored in skeleton.source(group).values():
            sizes[stored.file.name] += stored.numel * max(stored.dtype.itemsize, made.itemsize)
        file = group.file_of(group.first, skeleton.files)
        sizes[file] -= sum(less.get(name, 0) for name in skeleton.made(group))
    for stored in skeleton.unknown.values():
        sizes[stored.file.name] += stored.nbytes
    return sizes


def _packed_less(linear: PlannedLinear) -> int:
    """How many bytes fewer a linear takes packed, as far as its sparsity tells."""
    if not fits_records(linear.sparsity):
        return 0
    n, k = weight_shape(linear.module)
    itemsize = weight_of(linear.module).element_size()
    return max(0, n * k * itemsize - expected_bytes(linear.sparsity, n, k, itemsize))


def _gram_bytes(block: PlannedBlock) -> int:
    """Of SparseGPT: a gram matrix and a factor in fp32 for each linear, as if none shared its
    inputs, and three matrices in fp64 for the largest while it is factorised."""
    columns = [weight_shape(linear.module)[1] for linear in block.targets.values()]
    return sum(8 * k * k for k in columns) + 24 * max(columns, default=0) ** 2


def _held_bytes(block: PlannedBlock) -> int:
    """Of one token inside a block that is held: what its linears read in the dense stream, as if
    none shared its inputs, and what the widest of them reads in the pruned one."""
    read = [
        weight_shape(linear.module)[1] * weight_of(linear.module).element_size()
        for linear in block.targets.values()
        if not linear.is_expert
    ]
    return sum(read) + max(read, default=0)


def _drift_bytes(block: PlannedBlock) -> int:
    """Of an update: drift, damped gram and factor of the widest linear, and six of its largest
    weight, all in fp32."""
    shapes = [weight_shape(linear.module) for linear in block.targets.values()]
    widest = max((k for _, k in shapes), default=0)
    return 12 * widest**2 + 24 * max((n * k for n, k in shapes), default=0)


def _head_bytes(skeleton: Skeleton) -> int:
    """The output embeddings are never loaded, unless they are the input ones too."""
    head = skeleton.model.get_output_embeddings()
    if head is None or head.weight is skeleton.model.get_input_embeddings().weight:
        return 0
    return int(head.weight.nbytes)


def _hidden_bytes(skeleton: Skeleton) -> int:
    """Of one token."""
    config = skeleton.model.config
    text = config.get_text_config(decoder=True)
    weight = skeleton.model.get_input_embeddings().weight
    width = getattr(text, "hidden_size", None) or weight.shape[1]
    return int(width) * int(weight.dtype.itemsize)


def _free_memory() -> int:
    """What the machine could give now, or the control group's limit lets it."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = next(iter(_lines("/sys/fs/cgroup/memory.max")), "max").strip()
    used = next(iter(_lines("/sys/fs/cgroup/memory.current")), "0").strip()
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
