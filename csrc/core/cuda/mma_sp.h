// The sparse tensor core of sm_80 and its helpers, one PTX instruction a function: asynchronous
// copies into shared memory, loads of matrix fragments, the product itself, and the overlap of one
// kernel with the next. Their host twins are in tests/simt/mma_sp.h.
//
// A warp multiplies A[16,32], 2:4 and kept as A'[16,16], with B[32,8] and adds to D[16,8]. Lane
// 4 g + t holds (PTX ISA, "Matrix fragments for mma.m16n8k32", sparse, 16-bit types)
//
//   a[0..3]   rows g, g + 8, g, g + 8 of A', columns 2t, 2t + 1 (a[2], a[3]: 8 further)
//   b[0..3]   column g of B, rows 8 i + 2t, 8 i + 2t + 1
//   sum[0..3] rows g (0, 1) and g + 8 (2, 3) of D, columns 2t, 2t + 1
//   meta      in lanes t = 2 selector + h: of the columns [16 h, 16 h + 16) of A, the 16-bit words
//             (nm24.h) of row g, low half, and row g + 8
//
// so that one register of metadata serves two products, selectors 0 and 1.
#pragma once

#include <type_traits>

#include "launch.h"

namespace wanda_ext {
namespace cuda {

#if defined(__CUDACC__)

// `ordered_metadata` promises low < high in every nibble, which newer devices are faster with. It
// came with CUDA 12.5.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1205
#define WANDA_EXT_MMA_SP "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col"
#else
#define WANDA_EXT_MMA_SP "mma.sp.sync.aligned.m16n8k32.row.col"
#endif

// An address as loads and stores of shared memory take it: a register, and not two.
using SharedAddress = unsigned;

__device__ inline SharedAddress to_shared(const void* memory) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(memory));
}

// 16 bytes, or as many zeros without a look at `global`. They lie in shared memory once the thread
// that copies has waited for them; for other threads, after a barrier.
__device__ inline void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to_shared(shared)),
               "l"(global), "r"(inside ? 16 : 0)
               : "memory");
}

// Ends a group of copies, which may be empty.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the kPending latest groups are under way.
template <int kPending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l brings the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(unsigned (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(to_shared(row))
               : "memory");
}

template <typename T, int kSelector>
__device__ void mma_sp(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[4],
                       unsigned meta) {
#define WANDA_EXT_MULTIPLY(types)                                                               \
  asm(WANDA_EXT_MMA_SP types                                                                    \
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, "             \
      "%12, %13;"                                                                               \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), \
        "r"(meta), "n"(kSelector))
  if constexpr (std::is_same_v<T, __half>) {
    WANDA_EXT_MULTIPLY(".f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    WANDA_EXT_MULTIPLY(".f32.bf16.bf16.f32");
  }
#undef WANDA_EXT_MULTIPLY
}

// From here on the next kernel of the stream may start, if its launch overlaps (launch.h).
__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before this one is done and what it wrote can be read.
__device__ inline void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#else

using simt::allow_next_kernel;
using simt::await_previous_kernel;
using simt::commit_copies;
using simt::copy_async;
using simt::load_matrices;
using simt::mma_sp;
using simt::SharedAddress;
using simt::to_shared;
using simt::wait_copies;

#endif

}  // namespace cuda
}  // namespace wanda_ext
