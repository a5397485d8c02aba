// What the AVX-512 files share: records expanded by VBMI2. Included after their targets are set.
#pragma once

#include "record_kernels.h"
#include "records_x86.h"

namespace wanda_ext {
namespace {

// A record of 16 bits an element. No more is loaded than a record has room for: a load that goes
// on past what `ascending` has just stored would wait for it.
template <RecordFormat kFormat>
WANDA_EXT_INLINE __m512i expand_halves(const void* values, std::uint32_t mask) {
  const __m512i record =
      has_room_for_16(kFormat)
          ? _mm512_zextsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(values)))
          : _mm512_loadu_si512(values);
  return _mm512_maskz_expand_epi16(mask, record);
}

// A record's 16 values in 16 bits each, the last in memory first.
WANDA_EXT_INLINE void ascending_halves(const void* high, const void* low, void* values) {
  const __m512i backwards = _mm512_set_epi16(
      // Of a record: eight of `low`, then eight of `high` (+ 32).
      40, 41, 42, 43, 44, 45, 46, 47, 8, 9, 10, 11, 12, 13, 14, 15,  //
      32, 33, 34, 35, 36, 37, 38, 39, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
  auto* to = static_cast<char*>(values);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, backwards, b));
  const __m512i next = _mm512_add_epi16(backwards, _mm512_set1_epi16(16));
  _mm512_storeu_si512(to + 64, _mm512_permutex2var_epi16(a, next, b));
}

// Elements computed with in fp32.
template <typename T>
struct Avx512Lanes {
  using Element = T;
  using X = float;
  using Vector = __m512;
  using Sum = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kSums = 16;

  template <RecordFormat kFormat>
  static WANDA_EXT_INLINE void expand(const T* values, std::uint32_t mask, __m512 (&vectors)[2]) {
    if constexpr (sizeof(T) == 4) {
      vectors[0] = _mm512_maskz_expand_ps(mask & 0xffff, _mm512_loadu_ps(values));
      values += count_bits(mask & 0xffff);
      vectors[1] = _mm512_maskz_expand_ps(mask >> 16, _mm512_loadu_ps(values));
    } else {
      const __m512i columns = expand_halves<kFormat>(values, mask);
      vectors[0] = widen(_mm512_castsi512_si256(columns));
      vectors[1] = widen(_mm512_extracti64x4_epi64(columns, 1));
    }
  }

  template <RecordFormat kFormat>
  static WANDA_EXT_INLINE void spread(const T* values, std::uint32_t mask, T* to) {
    if constexpr (sizeof(T) == 4) {
      __m512 vectors[2];
      expand<kFormat>(values, mask, vectors);
      _mm512_storeu_ps(to, vectors[0]);
      _mm512_storeu_ps(to + kWidth, vectors[1]);
    } else {
      _mm512_storeu_si512(to, expand_halves<kFormat>(values, mask));
    }
  }

  static WANDA_EXT_INLINE __m512 widen(__m256i halves) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    } else {
      return _mm512_cvtph_ps(halves);
    }
  }

  static WANDA_EXT_INLINE float to_x(T value) { return to_float(value); }
  static WANDA_EXT_INLINE __m512 load(const float* from) { return _mm512_loadu_ps(from); }
  static WANDA_EXT_INLINE void store(float* to, __m512 vector) { _mm512_storeu_ps(to, vector); }
  static WANDA_EXT_INLINE void add(__m512& sum, __m512 a, __m512 b) {
    sum = _mm512_fmadd_ps(a, b, sum);
  }
  static WANDA_EXT_INLINE float total(__m512 sum) {
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, sum);
    return total_of_8(_mm256_add_ps(_mm256_load_ps(lanes), _mm256_load_ps(lanes + 8)));
  }

  static WANDA_EXT_INLINE void masks_24(const std::uint16_t* words, std::uint32_t* masks) {
    masks_24_shuffled(words, masks);
  }
  static WANDA_EXT_INLINE void ascending(const T* high, const T* low, T* values) {
    if constexpr (sizeof(T) == 4) {
      ascending_floats(high, low, values);
    } else {
      ascending_halves(high, low, values);
    }
  }
};

}  // namespace
}  // namespace wanda_ext
