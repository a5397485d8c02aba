// What the kernels of the bitmap format need beside CUDA C++, one PTX instruction a function: bits
// of a mask, a lane's own words of shared memory, loads that pass the L1 cache by, and the dense
// tensor core of sm_80. Their host twins are in tests/simt/bitmap_ptx.h.
#pragma once

#include <type_traits>

#include "device.h"
#include "mma_sp.h"

namespace wanda_ext {
namespace cuda {

#if defined(__CUDACC__)

// Of the highest set bit; ~0 without one.
__device__ inline unsigned highest_bit(unsigned bits) {
  unsigned place;
  asm("bfind.u32 %0, %1;" : "=r"(place) : "r"(bits));
  return place;
}

// The bits below `place`, by one instruction (SGXT) where a shift and an AND are two; all of them
// from place 32 on.
__device__ inline unsigned bits_below(unsigned bits, unsigned place) {
  unsigned below;
  asm("szext.clamp.u32 %0, %1, %2;" : "=r"(below) : "r"(bits), "r"(place));
  return below;
}

// Byte i of the result is byte s of low (0-3) and high (4-7), or with s + 8 its sign, eight times;
// s is digit i of `selector`.
__device__ inline unsigned select_bytes(unsigned low, unsigned high, unsigned selector) {
  unsigned bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
  return bytes;
}

// The low half of `bits`.
__device__ inline void store_half(SharedAddress to, unsigned bits) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(static_cast<unsigned short>(bits))
               : "memory");
}

__device__ inline unsigned load_word(SharedAddress from) {
  unsigned word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
  return word;
}

// Of what no kernel writes meanwhile and nobody reads twice.
__device__ inline void load_once(Tile<unsigned, 2, 8>& to, const void* from) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
               : "=r"(to.at[0]), "=r"(to.at[1])
               : "l"(from));
}
__device__ inline void load_once(Tile<unsigned, 4, 16>& to, const void* from) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.at[0]), "=r"(to.at[1]), "=r"(to.at[2]), "=r"(to.at[3])
               : "l"(from));
}

// Hides from the compiler how a value came about, so that it stays in a register. Else it is made
// anew at every use.
template <typename Value>
__device__ void keep(Value& value) {
  if constexpr (sizeof(Value) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
}

// A warp multiplies A[16,16] with B[16,8] and adds to D[16,8]. Lane 4 g + t holds (PTX ISA, "Matrix
// fragments for mma.m16n8k16", 16-bit types)
//   a0, a1     rows g and g + 8 of A, columns 2t, 2t + 1
//   a2, a3     the same 8 columns further
//   b0, b1     column g of B, rows 2t, 2t + 1; the same 8 rows further
//   sum[0..3]  rows g (0, 1) and g + 8 (2, 3) of D, columns 2t, 2t + 1
template <typename T>
__device__ void mma(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                    unsigned b0, unsigned b1) {
#define WANDA_EXT_MULTIPLY(types)                                        \
  asm("mma.sync.aligned.m16n8k16.row.col" types                          \
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])           \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, __half>) {
    WANDA_EXT_MULTIPLY(".f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    WANDA_EXT_MULTIPLY(".f32.bf16.bf16.f32");
  }
#undef WANDA_EXT_MULTIPLY
}

#else

using simt::bits_below;
using simt::highest_bit;
using simt::keep;
using simt::load_once;
using simt::load_word;
using simt::mma;
using simt::select_bytes;
using simt::store_half;

#endif

}  // namespace cuda
}  // namespace wanda_ext
