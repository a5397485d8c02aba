// What AVX2 and AVX-512 share. Included as record_rows.h is.
#pragma once

#include "record_rows.h"

namespace wanda_ext {
namespace {

// A nibble of metadata (low | high << 2) to the mask of its columns; 0 where they do not ascend.
WANDA_EXT_INLINE void masks_24_shuffled(const std::uint16_t* words, std::uint32_t* masks) {
  const __m128i table = _mm_setr_epi8(0, 0, 0, 0, 3, 0, 0, 0, 5, 6, 0, 0, 9, 10, 12, 0);
  const __m128i nibble = _mm_set1_epi8(15);
  const __m128i meta = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
  const __m128i low = _mm_shuffle_epi8(table, _mm_and_si128(meta, nibble));
  const __m128i high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(meta, 4), nibble));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(masks), _mm_or_si128(low, _mm_slli_epi16(high, 4)));
  // From memory a mask gets into a mask register by one instruction; gcc would take two.
  __asm__("" : "+m"(*reinterpret_cast<std::uint32_t (*)[kRecordsPerStep]>(masks)));
}

WANDA_EXT_INLINE float total_of_8(__m256 sum) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

WANDA_EXT_INLINE void ascending_floats(const float* high, const float* low, float* values) {
  const __m256i backwards = _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int i = 0; i < kRecordsPerStep; ++i) {
    const __m256 first = _mm256_loadu_ps(low + 8 * i), then = _mm256_loadu_ps(high + 8 * i);
    _mm256_storeu_ps(values + 16 * i, _mm256_permutevar8x32_ps(first, backwards));
    _mm256_storeu_ps(values + 16 * i + 8, _mm256_permutevar8x32_ps(then, backwards));
  }
}

}  // namespace
}  // namespace wanda_ext
