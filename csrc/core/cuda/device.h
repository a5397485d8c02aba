// What kernels share: elements and scores as numbers, tiles of a row, shared memory, bad rows.
#pragma once

#include <cstdint>

#include "launch.h"
#include "wanda_ext/matrix_view.h"

namespace wanda_ext {
namespace cuda {

constexpr int kWarp = 32;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// To the nearest, ties to even.
template <typename T>
__device__ T from_float(float value);
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Scores as integers that order as they do; NaN and infinity lie at or above kNonFiniteKey.
constexpr unsigned kNonFiniteKey = 0x7f800000;

template <typename T>
__device__ unsigned score_key(T weight, float norm) {
  return __float_as_uint(__fmul_rn(to_float(weight), norm)) & 0x7fffffff;
}

// A kept zero loses its sign.
template <typename T>
__device__ T kept_or_zero(T weight, bool kept) {
  return kept && to_float(weight) != 0.0f ? weight : T{};
}

// kCount neighbouring elements, moved at once as far as kAlign lets.
template <typename T, int kCount, int kAlign>
struct alignas(kAlign) Tile {
  T at[kCount];
};

template <typename T, int kCount, int kAlign>
__device__ Tile<T, kCount, kAlign> load_tile(const T* from) {
  return *reinterpret_cast<const Tile<T, kCount, kAlign>*>(from);
}

template <typename T, int kCount, int kAlign>
__device__ void store_tile(T* to, const Tile<T, kCount, kAlign>& tile) {
  *reinterpret_cast<Tile<T, kCount, kAlign>*>(to) = tile;
}

// Hides from the compiler what the tile holds. Else it keeps conversions of the elements for the
// next use, twice the registers, and spills; to convert anew costs less.
template <typename T, int kCount>
__device__ void forget(Tile<T, kCount, 16>& tile) {
#if defined(__CUDACC__)
  uint4* words = reinterpret_cast<uint4*>(&tile);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(tile) / 16); ++i) {
    asm volatile("" : "+r"(words[i].x), "+r"(words[i].y), "+r"(words[i].z), "+r"(words[i].w));
  }
#else
  static_cast<void>(tile);
#endif
}

inline bool is_aligned(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

// The CTA's one object of type T, uninitialised; and what its launch gave it beside, on 128 bytes.
#if defined(__CUDACC__)
template <typename T>
__device__ T& block_shared() {
  __shared__ T object;
  return object;
}
__device__ inline void* dynamic_shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
#else
using simt::block_shared;
using simt::dynamic_shared;
#endif

// `bad` starts at -1, the largest unsigned value, so that the lowest bad row is a plain minimum.
inline Status clear_bad(const char* op, std::int32_t* bad, cudaStream_t stream) {
  if (bad == nullptr) return {};
  return status_of(op, cudaMemsetAsync(bad, 0xff, sizeof(*bad), stream));
}

__device__ inline void report_bad(std::int32_t* bad, unsigned row) {
  if (bad != nullptr && threadIdx.x == 0) atomicMin(reinterpret_cast<unsigned*>(bad), row);
}

}  // namespace cuda
}  // namespace wanda_ext
