// N:M pruning of groups of 16 and 32 columns: the highest key that is pruned is found, not the rank
// of every key.
//
// The lanes of a register are groups, so that a row is transposed into one register for each column
// of a group. Both halves of the columns are sorted, by Batcher's odd-even merge sort; of two
// sorted halves a and b, the p-th lowest key of all is the lowest of max(a[i - 1], b[p - i - 1])
// over i. Where several columns hold just that key, the lower ones are pruned.
#pragma once

#include <cstdint>
#include <cstring>

#include "nm_registers.h"
#include "scores.h"
#include "simd.h"

namespace wanda_ext {

template <typename V>
WANDA_EXT_INLINE void exchange(V& low, V& high) {
  const V a = low;
  low = a < high ? a : high;
  high = a < high ? high : a;
}

// Of kCount keys from kFirst on, those kStep apart, of which both halves are sorted.
template <int kFirst, int kCount, int kStep, typename V>
WANDA_EXT_INLINE void merge_sorted(V* keys) {
  if constexpr (2 * kStep < kCount) {
    merge_sorted<kFirst, kCount, 2 * kStep>(keys);
    merge_sorted<kFirst + kStep, kCount, 2 * kStep>(keys);
#pragma GCC unroll 16
    for (int i = kFirst + kStep; i + kStep < kFirst + kCount; i += 2 * kStep) {
      exchange(keys[i], keys[i + kStep]);
    }
  } else {
    exchange(keys[kFirst], keys[kFirst + kStep]);
  }
}

template <int kFirst, int kCount, typename V>
WANDA_EXT_INLINE void sort(V* keys) {
  if constexpr (kCount > 1) {
    sort<kFirst, kCount / 2>(keys);
    sort<kFirst + kCount / 2, kCount / 2>(keys);
    merge_sorted<kFirst, kCount, 1>(keys);
  }
}

// As many registers as they have lanes. Each round rotates a key's register and lane, one binary
// number, by a bit.
template <int kLanes, typename V>
WANDA_EXT_INLINE void transpose(V* block) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    V turned[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      merge(block[i], block[i + kLanes / 2], turned[2 * i], turned[2 * i + 1],
            Vector<sizeof(V)>::kEach);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = turned[i];
  }
}

// The prune-th lowest of the keys of each lane; below all keys where none is pruned.
template <int kGroup, typename V>
WANDA_EXT_INLINE void select_pruned(const V* columns, int prune, V& highest) {
  constexpr int kHalf = kGroup / 2;
  V sorted[2][kHalf + 1];
  for (int half = 0; half < 2; ++half) {
    V keys[kHalf];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) keys[i] = columns[half * kHalf + i];
    sort<0, kHalf>(keys);
    sorted[half][0] = V{} - 1;
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) sorted[half][i + 1] = keys[i];
  }
  highest = V{} + INT32_MAX;
  const int last = prune < kHalf ? prune : kHalf;
  for (int i = prune - last; i <= last; ++i) {
    const V a = sorted[0][i], b = sorted[1][prune - i];
    const V both = a > b ? a : b;
    highest = both < highest ? both : highest;
  }
}

// In: the keys of a group a lane. Out: bit c is set where column c of the lane's group stays.
template <int kGroup, typename V>
WANDA_EXT_INLINE void stay_bits(const V* columns, int prune, V& bits) {
  V highest;
  select_pruned<kGroup>(columns, prune, highest);
  V left = V{} + prune;  // of the columns that hold `highest`, how many are still to prune
  for (int c = 0; c < kGroup; ++c) left += columns[c] < highest;
  bits = V{};
  for (int c = 0; c < kGroup; ++c) {
    const V tied = columns[c] == highest;
    const V stays = (columns[c] > highest) | (tied & (left < 1));
    left += tied;
    bits |= stays & static_cast<std::int32_t>(1u << c);
  }
}

// Prunes a group for each lane of a register of kBytes, of finite scores.
template <int kGroup, int kBytes, typename T>
WANDA_EXT_INLINE void prune_groups(T* w, const float* input_norm, int prune) {
  using V = Vector<kBytes>;
  constexpr int kLanes = V::kLanes;
  std::int32_t keys[kLanes * kGroup];
  for (int c = 0; c < kLanes * kGroup; ++c) keys[c] = score_key(w[c], input_norm[c]);
  typename V::Ints columns[kGroup];
  for (int first = 0; first < kGroup; first += kLanes) {
    typename V::Ints block[kLanes];
    for (int g = 0; g < kLanes; ++g) std::memcpy(&block[g], keys + g * kGroup + first, kBytes);
    transpose<kLanes>(block);
    for (int i = 0; i < kLanes; ++i) columns[first + i] = block[i];
  }
  typename V::Ints bits;
  stay_bits<kGroup>(columns, prune, bits);
  std::uint32_t stays[kLanes];
  std::memcpy(stays, &bits, kBytes);
  for (int g = 0; g < kLanes; ++g) {
    for (int c = 0; c < kGroup; ++c) {
      keys[g * kGroup + c] = static_cast<std::int32_t>(stays[g] >> c & 1);
    }
  }
  for (int c = 0; c < kLanes * kGroup; ++c) w[c] = kept_or_zero(w[c], keys[c] != 0);
}

}  // namespace wanda_ext
