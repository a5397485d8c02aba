"""What packed linears and pruning kernels are to reach on a GPU."""

from __future__ import annotations

DENSE, CUSPARSELT = "torch.mm", "cuSPARSELt"

# Of m: the geometric mean over all shapes of the rival's time over linear_24's.
LINEAR_24: dict[str, tuple[range, dict[str, float]]] = {
    "m <= 16": (range(1, 17), {DENSE: 1.5}),
    "m 32 to 64": (range(32, 65), {DENSE: 1.25}),
    "m >= 2048": (range(2048, 1 << 30), {DENSE: 1.3, CUSPARSELT: 1.0}),
}
# The lowest of dense's time over linear_bitmap's, over these m and the shapes that decide.
BITMAP_TOKENS = range(1, 9)
LEAST_BITMAP_RATIO = 1.3
# The part of the speed of a copy of as many bytes.
COPY = {
    "prune_rows 50%": 0.9,
    "prune_nm 2:4": 0.9,
    "prune_nm 4:8": 0.9,
    "prune_nm 16:32": 0.9,
    "prune_pack_24": 0.8,
    "pack_24": 0.9,
    "input_sumsq": 0.9,
}
