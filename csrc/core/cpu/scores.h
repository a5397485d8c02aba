// What the two pruning ops share: scores as integer keys, what a kept or pruned weight is written
// as, and the report of bad rows.
#pragma once

#include <atomic>
#include <cstdint>

#include "dtype.h"
#include "simd.h"

namespace wanda_ext {

// Keys order as scores do; NaN and infinity lie at or above kNonFiniteKey.
constexpr std::int32_t kNonFiniteKey = 0x7f800000;

template <typename T>
WANDA_EXT_INLINE std::int32_t score_key(T weight, float norm) {
  return static_cast<std::int32_t>(bits_of(to_float(weight) * norm) & 0x7fffffff);
}

// A kept zero loses its sign. On bits: a denormals-are-zero mode must not prune a denormal.
WANDA_EXT_INLINE float kept_or_zero(float weight, bool kept) {
  const std::uint32_t bits = bits_of(weight);
  const bool zero = (bits & 0x7fffffff) == 0;
  return float_of(kept && !zero ? bits : 0);
}

template <typename T>
WANDA_EXT_INLINE T kept_or_zero(T weight, bool kept) {
  const bool zero = (weight.bits & 0x7fff) == 0;
  return {static_cast<std::uint16_t>(kept && !zero ? weight.bits : 0)};
}

// The lowest row reported by any thread, or -1.
class FirstBadRow {
 public:
  void report(std::int64_t row) {
    std::int64_t lowest = row_.load(std::memory_order_relaxed);
    while (row < lowest && !row_.compare_exchange_weak(lowest, row, std::memory_order_relaxed)) {
    }
  }

  std::int32_t row() const {
    const std::int64_t row = row_.load(std::memory_order_relaxed);
    return row == kNone ? -1 : static_cast<std::int32_t>(row);
  }

 private:
  static constexpr std::int64_t kNone = INT64_MAX;
  std::atomic<std::int64_t> row_{kNone};
};

}  // namespace wanda_ext
