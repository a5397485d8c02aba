// Records by AVX2, FMA and F16C: Haswell, Zen and newer. Eight columns at a time, a byte of the
// mask being an index into a table of where their values are.
#include <type_traits>

#include "dtype.h"
#include "records.h"
#include "simd.h"

#if defined(WANDA_EXT_X86_FILES)
#include <algorithm>
#include <cstring>

#include "intrinsics.h"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2")
#include "record_kernels.h"
#include "records_x86.h"

namespace wanda_ext {
namespace {

struct ByteTables {
  // Of each of eight columns its value's bytes, for 16 bits; its value, for 32. 0x80: it has none.
  alignas(64) std::uint8_t bytes[256][16];
  alignas(64) std::uint8_t words[256][8];

  constexpr ByteTables() : bytes(), words() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int c = 0; c < 8; ++c) {
        const bool kept = mask >> c & 1;
        words[mask][c] = static_cast<std::uint8_t>(kept ? count : 0x80);
        bytes[mask][2 * c] = static_cast<std::uint8_t>(kept ? 2 * count : 0x80);
        bytes[mask][2 * c + 1] = static_cast<std::uint8_t>(kept ? 2 * count + 1 : 0x80);
        count += kept;
      }
    }
  }
};
constexpr ByteTables kByteTables;

template <typename T>
struct Avx2Lanes {
  using Element = T;
  using X = float;
  using Vector = __m256;
  using Sum = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kSums = 8;

  static WANDA_EXT_INLINE __m128i expand_halves(const T* values, unsigned byte) {
    const auto* table = reinterpret_cast<const __m128i*>(kByteTables.bytes[byte]);
    return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)),
                            _mm_load_si128(table));
  }

  static WANDA_EXT_INLINE __m256 expand_byte(const T* values, unsigned byte) {
    if constexpr (sizeof(T) == 4) {
      const auto* table = reinterpret_cast<const __m128i*>(kByteTables.words[byte]);
      const __m256i index = _mm256_cvtepi8_epi32(_mm_loadl_epi64(table));
      const __m256 columns = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), index);
      return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(index, 31)), columns);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      const __m256i wide = _mm256_cvtepu16_epi32(expand_halves(values, byte));
      return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    } else {
      return _mm256_cvtph_ps(expand_halves(values, byte));
    }
  }

  template <RecordFormat>
  static WANDA_EXT_INLINE void expand(const T* values, std::uint32_t mask, __m256 (&vectors)[4]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const unsigned byte = mask >> (8 * i) & 0xff;
      vectors[i] = expand_byte(values, byte);
      values += count_bits(byte);
    }
  }

  template <RecordFormat>
  static WANDA_EXT_INLINE void spread(const T* values, std::uint32_t mask, T* to) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const unsigned byte = mask >> (8 * i) & 0xff;
      if constexpr (sizeof(T) == 4) {
        _mm256_storeu_ps(to + 8 * i, expand_byte(values, byte));
      } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * i), expand_halves(values, byte));
      }
      values += count_bits(byte);
    }
  }

  static WANDA_EXT_INLINE float to_x(T value) { return to_float(value); }
  static WANDA_EXT_INLINE __m256 load(const float* from) { return _mm256_loadu_ps(from); }
  static WANDA_EXT_INLINE void store(float* to, __m256 vector) { _mm256_storeu_ps(to, vector); }
  static WANDA_EXT_INLINE void add(__m256& sum, __m256 a, __m256 b) {
    sum = _mm256_fmadd_ps(a, b, sum);
  }
  static WANDA_EXT_INLINE float total(__m256 sum) { return total_of_8(sum); }

  static WANDA_EXT_INLINE void masks_24(const std::uint16_t* words, std::uint32_t* masks) {
    masks_24_shuffled(words, masks);
  }
  static WANDA_EXT_INLINE void ascending(const T* high, const T* low, T* values) {
    if constexpr (sizeof(T) == 4) {
      ascending_floats(high, low, values);
    } else {
      const __m128i backwards = _mm_setr_epi8(14, 15, 12, 13, 10, 11, 8, 9, 6, 7, 4, 5, 2, 3, 0, 1);
#pragma GCC unroll 4
      for (int i = 0; i < kRecordsPerStep; ++i) {
        auto* to = reinterpret_cast<__m128i*>(values) + 2 * i;
        const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low) + i);
        const __m128i then = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high) + i);
        _mm_storeu_si128(to, _mm_shuffle_epi8(first, backwards));
        _mm_storeu_si128(to + 1, _mm_shuffle_epi8(then, backwards));
      }
    }
  }
};

}  // namespace
}  // namespace wanda_ext
#pragma GCC pop_options

namespace wanda_ext {

const RecordKernels* avx2_kernels() {
  static constexpr RecordKernels kernels = Kernels<Avx2Lanes>::table("avx2");
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                 __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2")
             ? &kernels
             : nullptr;
}

}  // namespace wanda_ext
#else
const wanda_ext::RecordKernels* wanda_ext::avx2_kernels() { return nullptr; }
#endif
