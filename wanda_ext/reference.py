"""Every op of `wanda_ext.ops` again in a few lines of plain PyTorch: slow, readable, the oracle.

Same names, same signatures, same bits (`linear_24`: same values up to the order of summation). Each
is written from the contract in csrc/include/wanda_ext/ops.h and shares no code with the kernels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

ROWS_PER_CHUNK = 32
CHUNKS_PER_GROUP = 8
PADDING_META = 0x4444  # columns 0 and 1 of every group of four

# A device order is the canonical meta [rows, words] seen as small axes (first tuple; -1 is what is
# left of the rows, -2 of the words) and permuted (second). Tiles: 32 rows x 32 columns, 64 x 128.
_AXES = {
    80: ((-1, 2, 2, 8, -2, 2), (4, 0, 3, 1, 5, 2), (32, 2)),
    90: ((-1, 4, 2, 8, -2, 4, 2), (4, 0, 1, 6, 3, 5, 2), (64, 8)),
}


def input_sumsq_(acc: Tensor, x: Tensor, keep: Tensor | None = None) -> None:
    """acc[k] += sum over kept tokens of x[m, k]^2, by the one summation tree.

    fp32 over each 32 rows, fp64 over each 8 such chunks; these sums are added to acc in row order.

    Shapes: acc [k] float64; x [..., k]; keep [...] bool.
    """
    rows = x[None].flatten(0, -2).float()
    squares = rows * rows
    if keep is not None:
        squares = squares.where(keep.reshape(-1, 1), 0.0)
    n_groups = -(-len(squares) // (ROWS_PER_CHUNK * CHUNKS_PER_GROUP))
    tree = squares.new_zeros(n_groups, CHUNKS_PER_GROUP, ROWS_PER_CHUNK, x.shape[-1])
    tree.flatten(0, 2)[: len(squares)] = squares  # the zeros after them change no sum
    chunks = _add_in_order(tree, dim=2).double()
    for group in _add_in_order(chunks, dim=1):
        acc += group


def prune_rows_(
    weight: Tensor, input_norm: Tensor | None, n_prune: int, bad: Tensor | None = None
) -> None:
    """Zero the n_prune lowest |W| * input_norm of each row; ties: the lower column first.

    Shapes: weight [n, k], in place; input_norm [k] float32 or None; bad [1] int32.
    """
    score = _score(weight, input_norm)
    pruned = score.argsort(dim=1, stable=True)[:, :n_prune]
    _write_kept(weight, score, torch.ones_like(score, dtype=torch.bool), pruned, bad)


def prune_nm_(
    weight: Tensor, input_norm: Tensor | None, keep: int, group: int, bad: Tensor | None = None
) -> None:
    """Keep the `keep` highest |W| * input_norm of each `group` columns of a row.

    Shapes: weight [n, k], in place; input_norm [k] float32 or None; bad [1] int32.
    """
    n, k = weight.shape
    score = _score(weight, input_norm)
    groups = score.reshape(n, k // group, group)
    first = torch.arange(0, k, group, device=weight.device).reshape(1, -1, 1)
    pruned = groups.argsort(dim=2, stable=True)[:, :, : group - keep] + first
    kept = torch.ones_like(score, dtype=torch.bool)
    _write_kept(weight, score, kept, pruned.reshape(n, k // group * (group - keep)), bad)


def pack_24(weight: Tensor, bad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The two kept values of every four columns, and which columns they are.

    A group with fewer than two non-zeros is filled up with its highest zero columns; a row with a
    group of three or four is packed as zeros and reported in `bad`.

    Shapes: weight [n, k] -> values [n, k/2], meta [n, k/16] int16; bad [1] int32.
    """
    n, k = weight.shape
    groups = weight.where(weight != 0, 0.0).reshape(n, k // 4, 4)
    overfull = ((groups != 0).sum(dim=2) > 2).any(dim=1)
    groups = groups.where(~overfull[:, None, None], 0.0)
    rank = (groups != 0) * 4 + torch.arange(4, device=weight.device)
    columns = rank.topk(2, dim=2).indices.sort(dim=2).values
    values = groups.gather(2, columns).reshape(n, k // 2)
    nibbles = (columns[..., 0] | columns[..., 1] << 2).reshape(n, k // 16, 4)
    meta = (nibbles << torch.arange(0, 16, 4, device=weight.device)).sum(dim=2)
    _report(bad, overfull)
    return values, meta.to(torch.int16)


def unpack_24(values: Tensor, meta: Tensor, order: int = 0) -> Tensor:
    """The dense weight again.

    Shapes: values [n, k/2], meta [n, k/16] int16 (padded in a device order) -> weight [n, k].
    """
    n, k = values.shape[0], 2 * values.shape[1]
    words = order_meta_24(meta, n, k, order, 0).int()
    nibbles = (words[..., None] >> torch.arange(0, 16, 4, device=meta.device)) & 15
    nibbles = nibbles.reshape(n, k // 4)
    columns = torch.stack([nibbles & 3, nibbles >> 2], dim=2).long()
    groups = values.new_zeros(n, k // 4, 4)
    return groups.scatter_(2, columns, values.reshape(n, k // 4, 2)).reshape(n, k)


def order_meta_24(meta: Tensor, n: int, k: int, src: int, dst: int) -> Tensor:
    """Metadata of an [n, k] matrix moved from order src to dst (0 canonical, 80 sm80, 90 sm90).

    Shapes: meta [padded n, padded k/16] of src -> the same of dst, int16.
    """
    words = k // 16
    if src:
        sizes, permutation = _axes(src, *meta.shape)
        inverse = [permutation.index(axis) for axis in range(len(permutation))]
        moved = meta.reshape([sizes[axis] for axis in permutation]).permute(inverse)
        meta = moved.reshape(meta.shape)[:n, :words]
    if dst:
        tile_rows, tile_words = _AXES[dst][2]
        padding = (0, -words % tile_words, 0, -n % tile_rows)
        meta = torch.nn.functional.pad(meta, padding, value=PADDING_META)
        sizes, permutation = _axes(dst, *meta.shape)
        meta = meta.reshape(sizes).permute(permutation).reshape(meta.shape)
    return meta.clone(memory_format=torch.contiguous_format)


def linear_24(
    x: Tensor, values: Tensor, meta: Tensor, order: int = 0, bias: Tensor | None = None
) -> Tensor:
    """y = x @ W.T (+ bias), accumulated in fp32, rounded once to the dtype of x.

    Shapes: x [..., k]; values [n, k/2]; meta [n, k/16] int16; bias [n] -> y [..., n].
    """
    y = x.float() @ unpack_24(values, meta, order).float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def pack_bitmap(weight: Tensor, bad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The 16 values of every 32 columns, the highest column first, and the bits of their columns.

    Records with fewer than 16 non-zeros are filled up with their highest zero columns; of more, the
    16 lowest stay and the row is reported in `bad`. A tile of 16 x 128 holds the mask of row
    g + 8 h, columns 32 t and on, at [g, t, h], and its values at [h, j // 8, g, t, j % 8].

    Shapes: weight [n, k] -> values [n/16, k/128, 1024], mask [n/16, k/128, 64] int32, both rounded
    up; bad [1] int32.
    """
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.where(weight != 0, 0.0), (0, -k % 128, 0, -n % 16))
    records = padded.reshape(len(padded), padded.shape[1] // 32, 32)
    nonzero = records != 0
    overfull = (nonzero.sum(dim=2) > 16).any(dim=1)[:n]
    column = torch.arange(32, device=weight.device)
    wanted = torch.where(nonzero, 64 - column, column)  # non-zeros from below, zeros from above
    columns = wanted.topk(16, dim=2).indices.sort(dim=2, descending=True).values
    values = records.gather(2, columns)
    masks = (1 << columns).sum(dim=2).to(torch.int32)
    tiles = (-(-n // 16), -(-k // 128))
    axes = tiles[0], 2, 8, tiles[1], 4  # tile, h, g, tile, t
    mask = masks.reshape(axes).permute(0, 3, 2, 4, 1).reshape(*tiles, 64)
    values = values.reshape(*axes, 2, 8).permute(0, 3, 1, 5, 2, 4, 6).reshape(*tiles, 1024)
    _report(bad, overfull)
    return values, mask


def unpack_bitmap(
    values: Tensor,
    mask: Tensor,
    n: int,
    k: int,
    surplus_rows: Tensor | None = None,
    surplus_columns: Tensor | None = None,
    surplus_values: Tensor | None = None,
) -> Tensor:
    """The dense weight again, the surplus written into it.

    Shapes: values [n/16, k/128, 1024], mask [n/16, k/128, 64] int32, both rounded up; surplus_rows
    [n + 1] int32, surplus_columns [s] int16 (unsigned bits), surplus_values [s] -> weight [n, k].
    """
    down, across = mask.shape[:2]
    axes = down, 2, 8, across, 4
    masks = mask.reshape(down, across, 8, 4, 2).permute(0, 4, 2, 1, 3).reshape(*axes, 1)
    bit = masks >> torch.arange(32, device=mask.device) & 1
    rank = (bit.flip(-1).cumsum(-1).flip(-1) - bit).clamp(max=15)  # set bits above
    records = values.reshape(down, across, 2, 2, 8, 4, 8).permute(0, 2, 4, 1, 5, 3, 6)
    dense = records.reshape(*axes, 16).gather(-1, rank).where(bit == 1, 0.0)
    weight = dense.reshape(16 * down, 128 * across)[:n, :k].contiguous()
    if surplus_rows is not None and surplus_columns is not None and surplus_values is not None:
        for row, (first, last) in enumerate(pairwise(surplus_rows.tolist())):
            columns = surplus_columns[first:last].long() & 0xFFFF
            weight[row, columns] = surplus_values[first:last]
    return weight


def linear_bitmap(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    n: int,
    bias: Tensor | None = None,
    surplus_rows: Tensor | None = None,
    surplus_columns: Tensor | None = None,
    surplus_values: Tensor | None = None,
) -> Tensor:
    """y = x @ W.T (+ bias), accumulated in fp32, rounded once to the dtype of x.

    Shapes: x [..., k]; values, mask and surplus as of `unpack_bitmap`; bias [n] -> y [..., n].
    """
    surplus = surplus_rows, surplus_columns, surplus_values
    weight = unpack_bitmap(values, mask, n, x.shape[-1], *surplus)
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def pack_stream(weight: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The non-zeros row by row, the bits of their columns, and where each row starts.

    Shapes: weight [n, k] -> values [count], mask [n, k/8] uint8, rounded up, offsets [n + 1] int64.
    """
    nonzero, (n, k) = weight != 0, weight.shape
    bits = torch.nn.functional.pad(nonzero, (0, -k % 8)).reshape(n, -(-k // 8), 8)
    mask = (bits << torch.arange(8, device=weight.device)).sum(dim=2).to(torch.uint8)
    offsets = torch.nn.functional.pad(nonzero.sum(dim=1).cumsum(0), (1, 0))
    if int(offsets[-1]) != count:
        raise RuntimeError(f"expected the number of non-zeros, {int(offsets[-1])}, got {count}")
    return weight[nonzero], mask, offsets


def unpack_stream(values: Tensor, mask: Tensor, offsets: Tensor, k: int) -> Tensor:
    """The dense weight again.

    Shapes: values [count], mask [n, k/8] uint8, rounded up, offsets [n + 1] -> weight [n, k].
    """
    bits = mask[..., None].int() >> torch.arange(8, device=mask.device) & 1
    nonzero = bits.flatten(1)[:, :k].bool()
    weight = values.new_zeros(nonzero.shape)
    weight[nonzero] = values[int(offsets[0]) : int(offsets[-1])]
    return weight


def linear_stream(
    x: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x @ W.T (+ bias), accumulated in fp32, rounded once to the dtype of x.

    Shapes: x [..., k]; values, mask and offsets as of `unpack_stream`; bias [n] -> y [..., n].
    """
    y = x.float() @ unpack_stream(values, mask, offsets, x.shape[-1]).float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _add_in_order(terms: Tensor, dim: int) -> Tensor:
    total = terms.new_zeros([size for axis, size in enumerate(terms.shape) if axis != dim])
    for term in terms.unbind(dim):
        total = total + term
    return total


def _score(weight: Tensor, input_norm: Tensor | None) -> Tensor:
    score = weight.float().abs()
    return score if input_norm is None else score * input_norm


def _write_kept(
    weight: Tensor, score: Tensor, kept: Tensor, pruned: Tensor, bad: Tensor | None
) -> None:
    bad_rows = ~score.isfinite().all(dim=1)
    kept.scatter_(1, pruned, False)
    zeroed = weight.where(kept & (weight != 0), 0.0)  # weight != 0 is false for -0.0
    weight.copy_(weight.where(bad_rows[:, None], zeroed))
    _report(bad, bad_rows)


def _report(bad: Tensor | None, bad_rows: Tensor) -> None:
    if bad is not None:
        first = bad_rows.nonzero().flatten()[:1]
        bad.copy_(first if len(first) else torch.tensor([-1]))


def _axes(order: int, rows: int, words: int) -> tuple[list[int], tuple[int, ...]]:
    axes, permutation, (tile_rows, tile_words) = _AXES[order]
    outer = {-1: rows // tile_rows, -2: words // tile_words}
    return [outer.get(axis, axis) for axis in axes], permutation
