// Zeroes the n_prune lowest scores of each row, in place.
//
// A score is never negative, so the bits of its fp32 value, as an integer, order as the scores do:
// the row's keys. The cut, the key below which all is pruned, is found by counting keys below a
// guess: the guesses narrow a bracket, interpolated where that works and halved where it does not,
// so at most 62 passes over a row that lies in the cache (about 10 on usual weights). One more
// pass writes the row. Which guesses were made never shows: the set of pruned columns is unique.
#include "core/check_args.h"
#include "dtype.h"
#include "parallel_chunks.h"
#include "scores.h"
#include "simd.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

// Prunes every key below `key` and the first `ties` columns whose key is `key`. All keys of a row
// that is pruned lie below kNonFiniteKey, and so does every cut but the one above them all.
struct Cut {
  std::int32_t key;
  std::int64_t ties;
};

// All keys of a row lie in [min, max] and are multiples of 1 << shift. Without a norm the keys of
// 16-bit weights have 13 or 16 zero bits, which no guess needs to resolve.
struct KeyRange {
  std::int32_t min;
  std::int32_t max;
  int shift;
};

template <typename T>
WANDA_EXT_INLINE KeyRange make_keys(const T* row, const float* input_norm, std::int64_t k,
                                    std::int32_t* __restrict keys) {
  std::int32_t min = 0x7fffffff;
  std::int32_t max = 0;
  std::int32_t any = 0;
  for (std::int64_t c = 0; c < k; ++c) {
    const std::int32_t key = score_key(row[c], input_norm == nullptr ? 1.0f : input_norm[c]);
    any |= key;
    min = key < min ? key : min;
    max = key > max ? key : max;
    keys[c] = key;
  }
  return {min, max, any == 0 ? 0 : __builtin_ctz(static_cast<unsigned>(any))};
}

WANDA_EXT_INLINE std::int64_t count_below(const std::int32_t* keys, std::int64_t k,
                                          std::int32_t limit) {
  std::int32_t count = 0;
  for (std::int64_t c = 0; c < k; ++c) count += keys[c] < limit;
  return count;
}

WANDA_EXT_INLINE std::int64_t count_equal(const std::int32_t* keys, std::int64_t k,
                                          std::int32_t value) {
  std::int32_t count = 0;
  for (std::int64_t c = 0; c < k; ++c) count += keys[c] == value;
  return count;
}

WANDA_EXT_INLINE Cut find_cut(const std::int32_t* keys, std::int64_t k, std::int64_t n_prune,
                              KeyRange range) {
  if (n_prune == 0) return {range.min, 0};
  // Fewer than n_prune keys lie below low << shift, at least n_prune below high << shift.
  std::int32_t low = range.min >> range.shift;
  std::int32_t high = (range.max >> range.shift) + 1;
  std::int64_t below_low = 0;
  std::int64_t below_high = k;
  bool halve = false;
  while (below_high > n_prune && high - low > 1) {
    const std::int32_t width = high - low;
    std::int32_t step = width / 2;
    if (!halve) {
      step = static_cast<std::int32_t>(static_cast<double>(width) *
                                       static_cast<double>(n_prune - below_low) /
                                       static_cast<double>(below_high - below_low));
      step = step < 1 ? 1 : step > width - 1 ? width - 1 : step;
    }
    const std::int32_t guess = low + step;
    const std::int64_t below = count_below(keys, k, guess << range.shift);
    if (below < n_prune) {
      low = guess;
      below_low = below;
    } else {
      high = guess;
      below_high = below;
    }
    halve = high - low > width / 2;
  }
  if (below_high == n_prune) {
    // One above the highest key, if nothing was narrowed: it need not fit an int32.
    const std::int64_t above = static_cast<std::int64_t>(high) << range.shift;
    return {above < kNonFiniteKey ? static_cast<std::int32_t>(above) : kNonFiniteKey, 0};
  }
  return {low << range.shift, n_prune - below_low};
}

// The end of the shortest prefix of the row that holds `ties` keys equal to `key`.
WANDA_EXT_INLINE std::int64_t find_ties_end(const std::int32_t* keys, std::int64_t k,
                                            std::int32_t key, std::int64_t ties) {
  constexpr std::int64_t kBlock = 256;
  std::int64_t end = 0;
  while (end + kBlock <= k) {
    const std::int64_t equal = count_equal(keys + end, kBlock, key);
    if (equal >= ties) break;
    ties -= equal;
    end += kBlock;
  }
  for (; ties > 0; ++end) ties -= keys[end] == key;
  return end;
}

template <typename T>
WANDA_EXT_INLINE void zero_below(T* __restrict row, const std::int32_t* __restrict keys,
                                 std::int64_t k, std::int32_t limit) {
  for (std::int64_t c = 0; c < k; ++c) row[c] = kept_or_zero(row[c], keys[c] >= limit);
}

// Returns the first bad row of [begin, end), or end.
template <typename T>
WANDA_EXT_INLINE std::int64_t prune_range(const MatrixView& weight, const float* input_norm,
                                          std::int64_t n_prune, std::int32_t* keys,
                                          std::int64_t begin, std::int64_t end) {
  const std::int64_t k = weight.cols;
  std::int64_t first_bad = end;
  for (std::int64_t r = begin; r < end; ++r) {
    T* row = static_cast<T*>(weight.data) + r * weight.ld;
    const KeyRange range = make_keys(row, input_norm, k, keys);
    if (range.max >= kNonFiniteKey) {
      first_bad = r < first_bad ? r : first_bad;
      continue;
    }
    const Cut cut = find_cut(keys, k, n_prune, range);
    const std::int64_t ties_end = cut.ties == 0 ? 0 : find_ties_end(keys, k, cut.key, cut.ties);
    zero_below(row, keys, ties_end, cut.key + 1);
    zero_below(row + ties_end, keys + ties_end, k - ties_end, cut.key);
  }
  return first_bad;
}

WANDA_EXT_CLONES std::int64_t prune_range_any(const MatrixView& weight, const float* input_norm,
                                              std::int64_t n_prune, std::int32_t* keys,
                                              std::int64_t begin, std::int64_t end) {
  switch (weight.dtype) {
    case DType::kFloat32:
      return prune_range<float>(weight, input_norm, n_prune, keys, begin, end);
    case DType::kBFloat16:
      return prune_range<BFloat16>(weight, input_norm, n_prune, keys, begin, end);
    default:
      return prune_range<Float16>(weight, input_norm, n_prune, keys, begin, end);
  }
}

// One row of keys, rounded up to whole cache lines.
std::int64_t keys_per_thread(std::int64_t k) { return (k + 15) / 16 * 16; }

}  // namespace

std::size_t prune_rows_workspace(std::int64_t k, int threads) {
  if (k < 0 || threads < 1) return 0;
  return static_cast<std::size_t>(keys_per_thread(k)) * static_cast<std::size_t>(threads) *
         sizeof(std::int32_t);
}

Status prune_rows(MatrixView weight, const float* input_norm, std::int64_t n_prune,
                  std::int32_t* bad, void* workspace, const ParallelFor& parallel) {
  if (Status status = check_prune_rows(weight, n_prune); !status.ok()) return status;
  const std::int64_t k = weight.cols;
  if (reinterpret_cast<std::uintptr_t>(workspace) % 64 != 0 ||
      (workspace == nullptr && weight.rows > 0 && k > 0)) {
    return make_error(StatusCode::kInvalidArgument,
                      "prune_rows: workspace must be prune_rows_workspace(k, threads) bytes, "
                      "64-byte aligned, got %p",
                      workspace);
  }
  FirstBadRow first_bad;
  if (k > 0) {
    for_each_range(
        parallel, weight.rows, 1, [&](std::int64_t begin, std::int64_t end, std::int64_t range) {
          std::int32_t* keys = static_cast<std::int32_t*>(workspace) + range * keys_per_thread(k);
          const std::int64_t row = prune_range_any(weight, input_norm, n_prune, keys, begin, end);
          if (row < end) first_bad.report(row);
        });
  }
  if (bad != nullptr) *bad = first_bad.row();
  return {};
}

}  // namespace wanda_ext
