// Records by AVX-512 with VBMI2: Ice Lake, Zen 4 and newer.
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
#include "records_avx512.h"
#pragma GCC pop_options

namespace wanda_ext {

const RecordKernels* avx512_kernels() {
  static constexpr RecordKernels kernels = Kernels<Avx512Lanes>::table("avx512");
  return __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
             ? &kernels
             : nullptr;
}

}  // namespace wanda_ext
#else
const wanda_ext::RecordKernels* wanda_ext::avx512_kernels() { return nullptr; }
#endif
