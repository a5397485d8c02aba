// N:M pruning of groups of 4 and 8 columns in vector registers, in GCC's and clang's vector
// extensions, which lower to the ISA of the function they are inlined into.
//
// Even columns lie in one register and odd ones in another. Turned by t within its half of the
// group, each column meets the one t further on, counted around. Every pair meets once, in integer
// compares; what one column learns is turned back to the other.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "dtype.h"
#include "simd.h"

namespace wanda_ext {

// A register of kBytes, by what its lanes hold. Functions take them by reference: the ABI of
// passing one by value depends on the ISA.
template <int kBytes>
struct Vector {
  using Ints __attribute__((vector_size(kBytes))) = std::int32_t;
  using Floats __attribute__((vector_size(kBytes))) = float;
  using Shorts __attribute__((vector_size(kBytes))) = std::int16_t;
  static constexpr int kLanes = kBytes / 4;
  static constexpr auto kEach = std::make_integer_sequence<int, kLanes>();
};

template <typename From, typename To>
WANDA_EXT_INLINE void copy_bits(const From& from, To& to) {
  static_assert(sizeof(from) == sizeof(to));
  std::memcpy(&to, &from, sizeof(to));
}

// Picks lanes of a followed by b.
template <int... kFrom, typename V>
WANDA_EXT_INLINE void shuffle(const V& a, const V& b, V& to) {
#ifdef __clang__
  to = __builtin_shufflevector(a, b, kFrom...);
#else
  using Ints = typename Vector<sizeof(V)>::Ints;
  to = __builtin_shuffle(a, b, Ints{kFrom...});
#endif
}

// Columns a then b to even and odd columns; merge is the inverse.
template <typename V, int... kLane>
WANDA_EXT_INLINE void split(const V& a, const V& b, V& even, V& odd,
                            std::integer_sequence<int, kLane...>) {
  shuffle<(2 * kLane)...>(a, b, even);
  shuffle<(2 * kLane + 1)...>(a, b, odd);
}

template <typename V, int... kLane>
WANDA_EXT_INLINE void merge(const V& even, const V& odd, V& a, V& b,
                            std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  shuffle<(kLane / 2 + kLane % 2 * kLanes)...>(even, odd, a);
  shuffle<(kLane / 2 + kLane % 2 * kLanes + kLanes / 2)...>(even, odd, b);
}

// Gives each lane of a half group what the one kTurn further on holds.
template <int kHalf, int kTurn, typename V, int... kLane>
WANDA_EXT_INLINE void turn(const V& from, V& to, std::integer_sequence<int, kLane...>) {
  shuffle<(kLane / kHalf * kHalf + (kLane + kTurn) % kHalf)...>(from, from, to);
}

// All pairs of keys, at turns kTurn and up. A column's count gets -1 if it outranks the one it
// meets, or 1 if it is outranked by the one it is met by. Of equal keys the higher column's ranks
// higher: the one that meets the other around the end.
template <int kHalf, int kTurn, typename V, int... kLane>
WANDA_EXT_INLINE void count_within(const V& keys, V& count,
                                   std::integer_sequence<int, kLane...> each) {
  V other;
  turn<kHalf, kTurn>(keys, other, each);
  const V outranks = keys + V{(kLane % kHalf + kTurn >= kHalf)...} > other;  // -1 where true
  count += outranks;
  if constexpr (2 * kTurn < kHalf) {
    turn<kHalf, kHalf - kTurn>(outranks, other, each);
    count -= other;
    count_within<kHalf, kTurn + 1>(keys, count, each);
  }
}

// All pairs of an even and an odd column likewise: the even meets, the odd is met.
template <int kHalf, int kTurn, typename V, int... kLane>
WANDA_EXT_INLINE void count_across(const V& even, const V& odd, V& even_count, V& odd_count,
                                   std::integer_sequence<int, kLane...> each) {
  V other;
  turn<kHalf, kTurn>(odd, other, each);
  const V outranks = even + V{(kLane % kHalf + kTurn >= kHalf)...} > other;
  even_count += outranks;
  turn<kHalf, kHalf - kTurn>(outranks, other, each);
  odd_count -= other;
  if constexpr (kTurn + 1 < kHalf) {
    count_across<kHalf, kTurn + 1>(even, odd, even_count, odd_count, each);
  }
}

// In: the keys of whole groups. Out: -1 where at least `prune` columns of the group are outranked,
// 0 elsewhere.
template <int kGroup, typename V>
WANDA_EXT_INLINE void rank(V& even, V& odd, int prune) {
  constexpr int kHalf = kGroup / 2;
  constexpr int kMetBy = (kHalf - 1) / 2;  // columns of its own half that meet a column
  constexpr auto kEach = Vector<sizeof(V)>::kEach;
  V even_count = {}, odd_count = {};
  count_within<kHalf, 1>(even, even_count, kEach);
  count_within<kHalf, 1>(odd, odd_count, kEach);
  count_across<kHalf, 0>(even, odd, even_count, odd_count, kEach);
  even = even_count < kMetBy + 1 - prune;  // count = met by - outranked
  odd = odd_count < kMetBy + kHalf + 1 - prune;
}

// The bits in fp32 of finite weights, given theirs without the sign.
template <typename Ints>
WANDA_EXT_INLINE void widen(BFloat16, Ints& bits) {
  bits <<= 16;
}

template <typename Ints>
WANDA_EXT_INLINE void widen(Float16, Ints& bits) {
  using Floats = typename Vector<sizeof(Ints)>::Floats;
  Ints denormal;
  copy_bits(__builtin_convertvector(bits, Floats) * 0x1p-24f, denormal);
  bits = bits < 0x0400 ? denormal : (bits << 13) + (112 << 23);
}

// scores.h's score_key.
template <typename Ints, typename Floats>
WANDA_EXT_INLINE void score_keys(const Ints& weight, const Floats& norm, Ints& keys) {
  Floats floats;
  copy_bits(weight, floats);
  copy_bits(floats * norm, keys);
  keys &= 0x7fffffff;
}

// Prunes kBytes / 2 columns, of finite scores. As in kept_or_zero, a kept -0.0 loses its sign.
template <int kGroup, int kBytes>
WANDA_EXT_INLINE void prune_columns(float* w, const float* input_norm, int prune) {
  using V = Vector<kBytes>;
  typename V::Floats norm[2];
  typename V::Ints weight[2], keys[2], even, odd;
  for (int i = 0; i < 2; ++i) {
    std::memcpy(&norm[i], input_norm + i * V::kLanes, kBytes);
    std::memcpy(&weight[i], w + i * V::kLanes, kBytes);
    score_keys(weight[i], norm[i], keys[i]);
  }
  split(keys[0], keys[1], even, odd, V::kEach);
  rank<kGroup>(even, odd, prune);
  merge(even, odd, keys[0], keys[1], V::kEach);
  for (int i = 0; i < 2; ++i) {
    weight[i] &= keys[i] & (weight[i] != INT32_MIN);
    std::memcpy(w + i * V::kLanes, &weight[i], kBytes);
  }
}

// The same of 16-bit weights, an even and an odd one a lane.
template <int kGroup, int kBytes, typename T>
WANDA_EXT_INLINE void prune_columns(T* w, const float* input_norm, int prune) {
  using V = Vector<kBytes>;
  typename V::Floats norm[2], even_norm, odd_norm;
  typename V::Shorts weight, stays;
  typename V::Ints pairs;
  std::memcpy(&norm[0], input_norm, kBytes);
  std::memcpy(&norm[1], input_norm + V::kLanes, kBytes);
  std::memcpy(&weight, w, kBytes);
  split(norm[0], norm[1], even_norm, odd_norm, V::kEach);
  copy_bits(weight, pairs);
  typename V::Ints even = pairs & 0x7fff;
  typename V::Ints odd = (pairs >> 16) & 0x7fff;
  widen(T{}, even);
  widen(T{}, odd);
  score_keys(even, even_norm, even);
  score_keys(odd, odd_norm, odd);
  rank<kGroup>(even, odd, prune);
  copy_bits((even & 0x0000ffff) | (odd & ~0x0000ffff), stays);
  weight &= stays & (weight != INT16_MIN);
  std::memcpy(w, &weight, kBytes);
}

}  // namespace wanda_ext
