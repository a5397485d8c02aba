// Keeps the `keep` highest scores of each `group` consecutive columns, in place.
//
// A weight's rank is the number of weights of its group with a lower score, or an equal one and a
// lower column; it stays where rank >= group - keep. A row is read once to see that all its scores
// are finite, then again, out of the cache, to be ranked and written.
//
// Groups of 4 and 8 are ranked in vector registers, at little more than the cost of the memory
// traffic (nm_registers.h); of 16 and 32, the highest score that is pruned is selected there
// (nm_selection.h). Other groups are ranked kLanes at a time, one a vector lane.
#include <cstring>
#include <vector>

#include "core/check_args.h"
#include "dtype.h"
#include "nm_registers.h"
#include "nm_selection.h"
#include "parallel_chunks.h"
#include "scores.h"
#include "simd.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

struct Range {
  MatrixView weight;
  const float* input_norm;
  int keep;
  int group;
  std::int64_t begin;
  std::int64_t end;
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
    if (score_key(row[c], input_norm[c]) >= kNonFiniteKey) return false;
  }
  return true;
}

// How many columns of a row are pruned at once.
template <int kGroup, int kBytes>
constexpr int kColumnsAtOnce = kGroup <= 8 ? kBytes / 2 : kGroup * kBytes / 4;

template <int kGroup, int kBytes, typename T>
WANDA_EXT_INLINE void prune_at_once(T* w, const float* input_norm, int prune) {
  if constexpr (kGroup <= 8) {
    prune_columns<kGroup, kBytes>(w, input_norm, prune);
  } else {
    prune_groups<kGroup, kBytes>(w, input_norm, prune);
  }
}

template <int kGroup, int kBytes, typename T>
WANDA_EXT_INLINE void prune_in_registers(T* row, const T* next_row, const float* input_norm,
                                         int prune, std::int64_t k) {
  constexpr int kColumns = kColumnsAtOnce<kGroup, kBytes>;
  constexpr int kPerLine = 64 / static_cast<int>(sizeof(T));
  std::int64_t c = 0;
  for (; c + kColumns <= k; c += kColumns) {
    // Into L2: L1 holds this row and the norms.
    for (int i = 0; i < kColumns; i += kPerLine) __builtin_prefetch(next_row + c + i, 0, 2);
    prune_at_once<kGroup, kBytes>(row + c, input_norm + c, prune);
  }
  if (c == k) return;
  T rest[kColumns] = {};
  float rest_norm[kColumns] = {};
  const auto columns = static_cast<std::size_t>(k - c);
  std::memcpy(rest, row + c, columns * sizeof(T));
  std::memcpy(rest_norm, input_norm + c, columns * sizeof(float));
  prune_at_once<kGroup, kBytes>(rest, rest_norm, prune);
  std::memcpy(row + c, rest, columns * sizeof(T));
}

constexpr int kLanes = 64;

// In: the keys of kLanes groups. Out: 1 where a weight stays, 0 elsewhere.
WANDA_EXT_INLINE void rank_in_lanes(std::int32_t* keys, int group, int prune) {
  std::int32_t lane[kMaxGroup][kLanes];  // lane[i][g] is column i of group g
  for (int g = 0; g < kLanes; ++g) {
    for (int i = 0; i < group; ++i) lane[i][g] = keys[g * group + i];
  }
  std::int32_t kept[kMaxGroup][kLanes];
  for (int j = 0; j < group; ++j) {
    std::int32_t rank[kLanes] = {};
    for (int i = 0; i < j; ++i) {
      for (int g = 0; g < kLanes; ++g) rank[g] += lane[i][g] <= lane[j][g];
    }
    for (int i = j + 1; i < group; ++i) {
      for (int g = 0; g < kLanes; ++g) rank[g] += lane[i][g] < lane[j][g];
    }
    for (int g = 0; g < kLanes; ++g) kept[j][g] = rank[g] >= prune;
  }
  for (int g = 0; g < kLanes; ++g) {
    for (int i = 0; i < group; ++i) keys[g * group + i] = kept[i][g];
  }
}

template <typename T>
WANDA_EXT_INLINE void prune_in_lanes(T* row, const float* input_norm, int group, int prune,
                                     std::int64_t k) {
  std::int32_t keys[kLanes * kMaxGroup] = {};
  const std::int64_t step = std::int64_t{kLanes} * group;
  for (std::int64_t first = 0; first < k; first += step) {
    const std::int64_t cols = step < k - first ? step : k - first;
    T* w = row + first;
    for (std::int64_t c = 0; c < cols; ++c) keys[c] = score_key(w[c], input_norm[first + c]);
    rank_in_lanes(keys, group, prune);
    for (std::int64_t c = 0; c < cols; ++c) w[c] = kept_or_zero(w[c], keys[c] != 0);
  }
}

// Returns the first bad row, or end.
template <int kBytes, typename T>
WANDA_EXT_INLINE std::int64_t prune_range(const Range& range) {
  const auto& [weight, input_norm, keep, group, begin, end] = range;
  const std::int64_t k = weight.cols;
  const float max_norm = float_of(static_cast<std::uint32_t>(max_key(input_norm, k)));
  std::int64_t first_bad = end;
  for (std::int64_t r = begin; r < end; ++r) {
    T* row = static_cast<T*>(weight.data) + r * weight.ld;
    // Prefetched, so that memory is busy while this row is ranked.
    const T* next_row = r + 1 < end ? row + weight.ld : row;
    if (!is_finite_row(row, input_norm, max_norm, k)) {
      first_bad = r < first_bad ? r : first_bad;
    } else if (group == 4) {
      prune_in_registers<4, kBytes>(row, next_row, input_norm, group - keep, k);
    } else if (group == 8) {
      prune_in_registers<8, kBytes>(row, next_row, input_norm, group - keep, k);
    } else if (group == 16) {
      prune_in_registers<16, kBytes>(row, next_row, input_norm, group - keep, k);
    } else if (group == 32) {
      prune_in_registers<32, kBytes>(row, next_row, input_norm, group - keep, k);
    } else {
      prune_in_lanes(row, input_norm, group, group - keep, k);
    }
  }
  return first_bad;
}

template <int kBytes>
WANDA_EXT_INLINE std::int64_t prune_range(const Range& range) {
  switch (range.weight.dtype) {
    case DType::kFloat32:
      return prune_range<kBytes, float>(range);
    case DType::kBFloat16:
      return prune_range<kBytes, BFloat16>(range);
    default:
      return prune_range<kBytes, Float16>(range);
  }
}

// Registers wider than the ISA's would be taken apart lane by lane. 64 bytes gain nothing: their
// compares make masks, to be widened again.
#ifdef __AVX2__
constexpr int kDefaultBytes = 32;
#else
constexpr int kDefaultBytes = 16;
#endif

#ifdef WANDA_EXT_TARGET
WANDA_EXT_TARGET("avx2") std::int64_t prune_range_any(const Range& range) {
  return prune_range<32>(range);
}
#ifdef WANDA_EXT_HAS_X86_64_V4
WANDA_EXT_TARGET("arch=x86-64-v4") std::int64_t prune_range_any(const Range& range) {
  return prune_range<32>(range);
}
#endif
WANDA_EXT_TARGET("default")
#endif
std::int64_t prune_range_any(const Range& range) { return prune_range<kDefaultBytes>(range); }

}  // namespace

Status prune_nm(MatrixView weight, const float* input_norm, int keep, int group, std::int32_t* bad,
                const ParallelFor& parallel) {
  if (Status status = check_prune_nm(weight, keep, group); !status.ok()) return status;
  std::vector<float> ones;
  if (input_norm == nullptr) {
    ones.assign(static_cast<std::size_t>(weight.cols), 1.0f);
    input_norm = ones.data();
  }
  FirstBadRow first_bad;
  for_each_range(parallel, weight.rows, 1, [&](std::int64_t begin, std::int64_t end, std::int64_t) {
    const std::int64_t row = prune_range_any({weight, input_norm, keep, group, begin, end});
    if (row < end) first_bad.report(row);
  });
  if (bad != nullptr) *bad = first_bad.row();
  return {};
}

}  // namespace wanda_ext
