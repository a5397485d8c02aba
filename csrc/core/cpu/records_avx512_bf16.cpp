// Records by AVX-512 with VBMI2 and BF16: as records_avx512.cpp, but bf16 is multiplied as it is,
// two columns at once. Denormal elements count as zeros then.
#include <type_traits>

#include "dtype.h"
#include "records.h"
#include "simd.h"

#if defined(WANDA_EXT_X86_FILES)
#include <algorithm>
#include <cstring>

#include "intrinsics.h"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2")
#pragma GCC target("avx512bf16")
#include "records_avx512.h"

namespace wanda_ext {
namespace {

template <typename T>
struct Avx512Bf16Lanes : Avx512Lanes<T> {};

template <>
struct Avx512Bf16Lanes<BFloat16> : Avx512Lanes<BFloat16> {
  using X = BFloat16;
  using Vector = __m512i;
  static constexpr int kWidth = 32;

  template <RecordFormat kFormat>
  static WANDA_EXT_INLINE void expand(const BFloat16* values, std::uint32_t mask,
                                      __m512i (&vectors)[1]) {
    vectors[0] = expand_halves<kFormat>(values, mask);
  }
  static WANDA_EXT_INLINE BFloat16 to_x(BFloat16 value) { return value; }
  static WANDA_EXT_INLINE __m512i load(const BFloat16* from) { return _mm512_loadu_si512(from); }
  static WANDA_EXT_INLINE void store(BFloat16* to, __m512i vector) {
    _mm512_storeu_si512(to, vector);
  }
  static WANDA_EXT_INLINE void add(__m512& sum, __m512i a, __m512i b) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

}  // namespace
}  // namespace wanda_ext
#pragma GCC pop_options

namespace wanda_ext {

const RecordKernels* avx512_bf16_kernels() {
  static constexpr RecordKernels kernels = Kernels<Avx512Bf16Lanes>::table("avx512_bf16");
  return avx512_kernels() != nullptr && __builtin_cpu_supports("avx512bf16") ? &kernels : nullptr;
}

}  // namespace wanda_ext
#else
const wanda_ext::RecordKernels* wanda_ext::avx512_bf16_kernels() { return nullptr; }
#endif
