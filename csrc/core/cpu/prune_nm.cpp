// Keeps the `keep` highest scores of each `group` consecutive columns, in place.
//
// A weight's rank is the number of weights of its group with a lower score, or an equal one and a
// lower column; it stays where rank >= group - keep. A row is read once to see that all its scores
// are finite, then again, out of the cache, to be ranked and written: kLanes groups at a time, one
// group a vector lane.
#include <cstring>

#include "check_args.h"
#include "dtype.h"
#include "parallel_chunks.h"
#include "scores.h"
#include "simd.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

constexpr int kLanes = 64;

// The groups in hand. `keys` lies as the row does; lane[i][g] is column i of group g. After the
// ranking both hold whether a column stays instead.
struct Block {
  std::int32_t keys[kLanes * kMaxGroup];
  std::int32_t lane[kMaxGroup][kLanes];
};

WANDA_EXT_INLINE std::int32_t max_key(const float* row, std::int64_t k) {
  std::int32_t max = 0;
  for (std::int64_t c = 0; c < k; ++c) {
    const std::int32_t key = score_key(row[c], 1.0f);
    max = key > max ? key : max;
  }
  return max;
}

// The same of 16-bit weights, whose bits order as their values do.
template <typename T>
WANDA_EXT_INLINE std::int32_t max_key(const T* row, std::int64_t k) {
  std::int16_t max = 0;
  for (std::int64_t c = 0; c < k; ++c) {
    const auto magnitude = static_cast<std::int16_t>(row[c].bits & 0x7fff);
    max = magnitude > max ? magnitude : max;
  }
  return score_key(T{static_cast<std::uint16_t>(max)}, 1.0f);
}

// Whether all scores are finite. Rounding is monotone, so nearly always the largest weight and the
// largest norm alone prove it.
template <typename T>
WANDA_EXT_INLINE bool is_finite_row(const T* row, const float* input_norm, float max_norm,
                                    std::int64_t k) {
  const float max_weight = float_of(static_cast<std::uint32_t>(max_key(row, k)));
  if (score_key(max_weight, max_norm) < kNonFiniteKey) return true;
  for (std::int64_t c = 0; c < k; ++c) {
    const float norm = input_norm == nullptr ? 1.0f : input_norm[c];
    if (score_key(row[c], norm) >= kNonFiniteKey) return false;
  }
  return true;
}

WANDA_EXT_INLINE void keys_to_lanes(Block& block, int group) {
  for (int g = 0; g < kLanes; ++g) {
    for (int i = 0; i < group; ++i) block.lane[i][g] = block.keys[g * group + i];
  }
}

WANDA_EXT_INLINE void lanes_to_keys(Block& block, int group) {
  for (int g = 0; g < kLanes; ++g) {
    for (int i = 0; i < group; ++i) block.keys[g * group + i] = block.lane[i][g];
  }
}

// Every pair is compared once, in registers.
template <int kGroup>
WANDA_EXT_INLINE void rank_lanes(Block& block, int prune) {
  for (int g = 0; g < kLanes; ++g) {
    std::int32_t key[kGroup];
    std::int32_t rank[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      key[i] = block.lane[i][g];
      rank[i] = kGroup - 1 - i;  // as if all columns after i had lower scores
    }
#pragma GCC unroll 8
    for (int j = 1; j < kGroup; ++j) {
#pragma GCC unroll 8
      for (int i = 0; i < j; ++i) {
        const std::int32_t i_first = key[i] <= key[j];
        rank[j] += i_first;
        rank[i] -= i_first;
      }
    }
    for (int i = 0; i < kGroup; ++i) block.lane[i][g] = rank[i] >= prune;
  }
}

WANDA_EXT_INLINE void rank_lanes(Block& block, int group, int prune) {
  std::int32_t kept[kMaxGroup][kLanes];
  for (int j = 0; j < group; ++j) {
    std::int32_t rank[kLanes] = {};
    for (int i = 0; i < j; ++i) {
      for (int g = 0; g < kLanes; ++g) rank[g] += block.lane[i][g] <= block.lane[j][g];
    }
    for (int i = j + 1; i < group; ++i) {
      for (int g = 0; g < kLanes; ++g) rank[g] += block.lane[i][g] < block.lane[j][g];
    }
    for (int g = 0; g < kLanes; ++g) kept[j][g] = rank[g] >= prune;
  }
  std::memcpy(block.lane, kept, sizeof(kept[0]) * static_cast<std::size_t>(group));
}

WANDA_EXT_INLINE void rank_block(Block& block, int group, int prune) {
  if (group == 4) {
    keys_to_lanes(block, 4);
    rank_lanes<4>(block, prune);
    lanes_to_keys(block, 4);
  } else if (group == 8) {
    keys_to_lanes(block, 8);
    rank_lanes<8>(block, prune);
    lanes_to_keys(block, 8);
  } else {
    keys_to_lanes(block, group);
    rank_lanes(block, group, prune);
    lanes_to_keys(block, group);
  }
}

// The next row's columns, so that memory is busy while this row is ranked.
template <typename T>
WANDA_EXT_INLINE void prefetch(const T* row, std::int64_t cols) {
  constexpr std::int64_t kCacheLine = 64 / sizeof(T);
  for (std::int64_t c = 0; c < cols; c += kCacheLine) __builtin_prefetch(row + c);
}

// Returns the first bad row of [begin, end), or end.
template <typename T>
WANDA_EXT_INLINE std::int64_t prune_range(const MatrixView& weight, const float* input_norm,
                                          int keep, int group, std::int64_t begin,
                                          std::int64_t end) {
  const std::int64_t k = weight.cols;
  const std::int64_t step = std::int64_t{kLanes} * group;
  const float max_norm =
      input_norm == nullptr ? 1.0f : float_of(static_cast<std::uint32_t>(max_key(input_norm, k)));
  std::int64_t first_bad = end;
  Block block = {};
  for (std::int64_t r = begin; r < end; ++r) {
    T* row = static_cast<T*>(weight.data) + r * weight.ld;
    if (!is_finite_row(row, input_norm, max_norm, k)) {
      first_bad = r < first_bad ? r : first_bad;
      continue;
    }
    for (std::int64_t first = 0; first < k; first += step) {
      const std::int64_t cols = step < k - first ? step : k - first;
      T* w = row + first;
      if (r + 1 < end) prefetch(w + weight.ld, cols);
      for (std::int64_t c = 0; c < cols; ++c) {
        const float norm = input_norm == nullptr ? 1.0f : input_norm[first + c];
        block.keys[c] = score_key(w[c], norm);
      }
      rank_block(block, group, group - keep);
      for (std::int64_t c = 0; c < cols; ++c) w[c] = kept_or_zero(w[c], block.keys[c] != 0);
    }
  }
  return first_bad;
}

WANDA_EXT_CLONES std::int64_t prune_range_any(const MatrixView& weight, const float* input_norm,
                                              int keep, int group, std::int64_t begin,
                                              std::int64_t end) {
  switch (weight.dtype) {
    case DType::kFloat32:
      return prune_range<float>(weight, input_norm, keep, group, begin, end);
    case DType::kBFloat16:
      return prune_range<BFloat16>(weight, input_norm, keep, group, begin, end);
    default:
      return prune_range<Float16>(weight, input_norm, keep, group, begin, end);
  }
}

}  // namespace

Status prune_nm(MatrixView weight, const float* input_norm, int keep, int group, std::int32_t* bad,
                const ParallelFor& parallel) {
  if (Status status = check_prune_nm(weight, keep, group); !status.ok()) return status;
  FirstBadRow first_bad;
  for_each_range(parallel, weight.rows, 1, [&](std::int64_t begin, std::int64_t end, std::int64_t) {
    const std::int64_t row = prune_range_any(weight, input_norm, keep, group, begin, end);
    if (row < end) first_bad.report(row);
  });
  if (bad != nullptr) *bad = first_bad.row();
  return {};
}

}  // namespace wanda_ext
