// prune_nm on the device: keeps the `keep` highest scores of each `group` columns, in place.
//
// Groups of 4, 8, 16 and 32 in rows that lie on 16 bytes: a CTA takes a row, a thread whole groups
// of it, in registers. In 4 and 8 it ranks a weight by counting the lower ones. Counting takes the
// square of the group; 16 and 32 it sorts, by min and max, to find the lowest key that stays. Every
// other group: the lanes of a warp take a column each, as many whole groups as fit, and see each
// other's keys by shuffles; a row is read twice, the second time out of the cache.
//
// Memory: 2 bytes read and 2 written a weight of a 16-bit type; the norms come from the L1 cache.
#include <algorithm>
#include <cstdint>

#include "check_rows.h"
#include "core/check_args.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace cuda {
namespace {

// Batcher's odd-even merge sort, ascending: 63 exchanges of 16 keys, 191 of 32.
template <int kCount>
__device__ void sort_keys(unsigned (&keys)[kCount]) {
#pragma unroll
  for (int sorted = 1; sorted < kCount; sorted *= 2) {
#pragma unroll
    for (int apart = sorted; apart > 0; apart /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int low = i, high = i + apart;
        const bool meet = low % (2 * apart) >= apart % sorted &&
                          (low - apart % sorted) % (2 * apart) < apart && high < kCount &&
                          low / (2 * sorted) == high / (2 * sorted);
        if (!meet) continue;
        const unsigned lower = std::min(keys[low], keys[high]),
                       upper = std::max(keys[low], keys[high]);
        keys[low] = lower;
        keys[high] = upper;
      }
    }
  }
}

// kept_of_group for large groups: whatever is higher than the lowest key that stays; of those equal
// to it the higher columns.
template <int kGroup>
__device__ unsigned kept_of_large_group(const unsigned* keys, int prune) {
  unsigned sorted[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) sorted[i] = keys[i];
  sort_keys(sorted);
  unsigned lowest = sorted[0];
#pragma unroll
  for (int i = 1; i < kGroup; ++i) lowest = i == prune ? sorted[i] : lowest;
  unsigned kept = 0, equal = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    kept |= static_cast<unsigned>(keys[i] > lowest) << i;
    equal |= static_cast<unsigned>(keys[i] == lowest) << i;
  }
  for (int extra = __popc(kept) + __popc(equal) - (kGroup - prune); extra > 0; --extra) {
    equal &= equal - 1;
  }
  return kept | equal;
}

template <typename T, typename Shape, int kGroup>
struct PruneGroups {
  using Values = typename Row<T, Shape>::Values;

  T* weight;
  std::int64_t ld;
  const float* input_norm;
  int prune;  // of each group

  __device__ bool refuses(const Values& values, int column) const {
    return !Keys<Shape>(values, input_norm, column).all_finite();
  }
  __device__ void write(unsigned row, int column, const Values& values, bool is_bad) const {
    if (is_bad) return;
    const Keys<Shape> keys(values, input_norm, column);
    Values kept;
#pragma unroll
    for (int first = 0; first < Shape::kVec; first += kGroup) {
      const unsigned mask = kGroup <= 8 ? kept_of_group<kGroup>(keys.at + first, prune)
                                        : kept_of_large_group<kGroup>(keys.at + first, prune);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        kept.at[first + i] = kept_or_zero(values.at[first + i], mask >> i & 1);
      }
    }
    store_tile<T, Shape::kVec, Shape::kAlign>(weight + row * ld + column, kept);
  }
};

// Grid: n.
template <typename T>
__global__ void __launch_bounds__(1024)
    prune_any_group(T* weight, std::int64_t ld, int k, const float* __restrict__ input_norm,
                    int prune, int group, std::int32_t* bad) {
  T* const row = weight + static_cast<std::int64_t>(blockIdx.x) * ld;
  const auto key_at = [&](int column) {
    return score_key(row[column], input_norm == nullptr ? 1.0f : input_norm[column]);
  };
  bool finite = true;
  for (int c = static_cast<int>(threadIdx.x); c < k; c += static_cast<int>(blockDim.x)) {
    finite = finite && key_at(c) < kNonFiniteKey;
  }
  if (__syncthreads_or(!finite)) return report_bad(bad, blockIdx.x);

  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int busy_lanes = kWarp / group * group;
  const int first_lane = lane / group * group;  // of this lane's group
  const int step = static_cast<int>(blockDim.x) / kWarp * busy_lanes;
  for (int begin = warp * busy_lanes; begin < k; begin += step) {
    const int column = begin + lane;
    const bool busy = lane < busy_lanes && column < k;
    const unsigned key = busy ? key_at(column) : 0;
    int rank = 0;
    for (int i = 0; i < group; ++i) {
      const int other_lane = first_lane + i;
      const unsigned other = __shfl_sync(~0u, key, other_lane % kWarp);
      rank += other < key || (other == key && other_lane < lane);
    }
    if (busy) row[column] = kept_or_zero(row[column], rank >= prune);
  }
}

template <typename T, int kGroup>
Status prune_groups(MatrixView weight, const float* input_norm, int prune, std::int32_t* bad,
                    cudaStream_t stream) {
  const auto start = [&](auto shape, unsigned threads) {
    using Shape = decltype(shape);
    const PruneGroups<T, Shape, kGroup> work{static_cast<T*>(weight.data), weight.ld, input_norm,
                                             prune};
    return launch_check_then_write<T, Shape>("prune_nm", weight, work, bad, threads, stream);
  };
  if constexpr (kGroup <= kColumnsPerTile) {
    return with_tiles(weight.cols, start);
  } else {  // a tile is a group, and a thread has registers for one
    const std::int64_t groups = weight.cols / kGroup;
    const unsigned threads = threads_for(groups, 1, 512);
    if (groups <= 512) return start(RowShape<kGroup, 1, 16, 512>(), threads);
    return start(RowShape<kGroup, 0, 16, 512>(), threads);
  }
}

}  // namespace

Status prune_nm(MatrixView weight, const float* input_norm, int keep, int group, std::int32_t* bad,
                cudaStream_t stream) {
  const char* op = "prune_nm";
  if (Status status = check_prune_nm(weight, keep, group); !status.ok()) return status;
  if (Status status = check_grid(op, weight); !status.ok()) return status;
  if (Status status = clear_bad(op, bad, stream); !status.ok()) return status;
  if (weight.rows == 0 || weight.cols == 0) return {};
  const bool aligned = has_aligned_tiles(weight) && is_aligned(input_norm);
  const int prune = group - keep;
  return with_element(weight.dtype, [&](auto element) {
    using T = decltype(element);
    if (aligned && group == 4) return prune_groups<T, 4>(weight, input_norm, prune, bad, stream);
    if (aligned && group == 8) return prune_groups<T, 8>(weight, input_norm, prune, bad, stream);
    if (aligned && group == 16) return prune_groups<T, 16>(weight, input_norm, prune, bad, stream);
    if (aligned && group == 32) return prune_groups<T, 32>(weight, input_norm, prune, bad, stream);
    return launch(op, prune_any_group<T>, dim3(static_cast<unsigned>(weight.rows)),
                  dim3(threads_for(weight.cols, 4, 1024)), stream, static_cast<T*>(weight.data),
                  weight.ld, static_cast<int>(weight.cols), input_norm, prune, group, bad);
  });
}

}  // namespace cuda
}  // namespace wanda_ext
