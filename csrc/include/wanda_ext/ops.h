// The contract of every op: shapes, order of arithmetic, what happens to bad input.
//
//   y[m,n] = x[m,k] @ W[n,k]^T    m tokens, k in-features, n out-features
//   S[n,k] = |W[n,k]| * input_norm[k],  input_norm[k] = sqrt(sum over tokens of x[m,k]^2)
//                                       (Wanda, arXiv:2306.11695, section 3)
//
// Every function checks its arguments and returns a Status; none throws, allocates device memory or
// synchronises. Masks, packed data and input_sumsq have the same bits on every thread count, ISA
// and device: nothing is contracted to fma, and every sum follows the tree written here. Products
// (linear_*) do not: see there.
//
// Sparsity is keep of group: 2:4 keeps 2 of every 4 consecutive columns of a row. Scores compare as
// fp32 |W| * norm (one rounding). Of equal scores the lower column is pruned first. A kept -0.0 is
// written +0.0. `bad`, where given, receives the lowest row that holds a NaN or infinite score, or
// -1; such a row is left unchanged.
#pragma once

#include <cstddef>
#include <cstdint>

#include "wanda_ext/bitmap.h"
#include "wanda_ext/matrix_view.h"
#include "wanda_ext/nm24.h"
#include "wanda_ext/parallel.h"
#include "wanda_ext/status.h"

typedef struct CUstream_st* cudaStream_t;  // as in cuda_runtime_api.h, which is not needed here

namespace wanda_ext {

// The tree of input_sumsq. Squares are rounded to fp32 and added in fp32, row by row, from +0 over
// each kRowsPerChunk rows; the chunk sums of a group of kChunksPerGroup are added in fp64 in row
// order from 0; each group's sum is added to acc, in row order. A dropped token adds nothing but
// keeps its place, so it splits no chunk differently.
constexpr std::int64_t kRowsPerChunk = 32;
constexpr std::int64_t kChunksPerGroup = 8;

constexpr std::int64_t kMaxCols = 131072;        // of the row selection
constexpr int kMaxGroup = 32;                    // of the keep:group selection
constexpr std::int64_t kMaxSurplusCols = 65536;  // of a weight that has a surplus

// acc[k] += sum over tokens of x[m,k]^2.   x [m,k]; acc [k] fp64; keep [m] or null (all).
Status input_sumsq(double* acc, ConstMatrixView x, const bool* keep, const ParallelFor& parallel);

// Zeroes the n_prune lowest scores of each row of weight [n,k] in place; input_norm [k] fp32 or
// null (magnitude: S = |W|). 0 <= n_prune <= k <= kMaxCols. workspace holds one row of keys a
// thread: prune_rows_workspace(k, parallel.threads) bytes, 64-byte aligned.
std::size_t prune_rows_workspace(std::int64_t k, int threads);
Status prune_rows(MatrixView weight, const float* input_norm, std::int64_t n_prune,
                  std::int32_t* bad, void* workspace, const ParallelFor& parallel);

// Keeps the `keep` highest scores of each `group` consecutive columns, in place.
// 0 < keep <= group <= kMaxGroup, k % group == 0.
Status prune_nm(MatrixView weight, const float* input_norm, int keep, int group, std::int32_t* bad,
                const ParallelFor& parallel);

// values [n,k/2] and canonical meta [n,k/16], both contiguous, from a weight that is 2:4; k % 16
// == 0. Any zero is stored +0.0. A row with three or more non-zeros in a group is reported in `bad`
// (lowest such row, or -1) and packed as zeros.
Status pack_24(ConstMatrixView weight, void* values, std::int16_t* meta, std::int32_t* bad,
               const ParallelFor& parallel);

// The exact inverse: weight [n,k] from values [n,k/2] and meta in `order`. Where meta is not what
// pack_24 makes nothing outside of the arguments is read, but the weight is up to the op.
Status unpack_24(const void* values, const std::int16_t* meta, MetaOrder order, MatrixView weight,
                 const ParallelFor& parallel);

// Rewrites the metadata of an n x k matrix from one order to another. src holds padded_rows_24(src_
// order, n) * padded_cols_24(src_order, k) / 16 words, dst likewise; padding is kPaddingMeta.
Status order_meta_24(const std::int16_t* src, MetaOrder src_order, std::int16_t* dst,
                     MetaOrder dst_order, std::int64_t n, std::int64_t k,
                     const ParallelFor& parallel);

// The products. One kernel family for all formats, one set of kernels for each instruction set;
// which kernel of a set runs depends on dtype, m and k. The same bits for any number of threads,
// and within rounding (fp32 accumulation) of those of another set. A pruned column of x may meet
// its zero or not: an infinite or NaN element of x reaches y through the columns that are not zero,
// and may through others. bf16 denormals may count as zeros.
//
// The sets: "amx", "avx512_bf16", "avx512", "avx2", "plain". The fastest that the processor has is
// used, until another is asked for, while no product runs.
Status use_cpu_kernels(const char* name);
const char* cpu_kernels();

// y [m,n] = x [m,k] @ W^T (+ bias [n]), W packed as by pack_24 with meta in `order`; x, values,
// bias and y of one dtype.
// workspace: linear_24_workspace(m, n, k, parallel.threads) bytes, 64-byte aligned.
std::size_t linear_24_workspace(std::int64_t m, std::int64_t n, std::int64_t k, int threads);
Status linear_24(ConstMatrixView x, const void* values, const std::int16_t* meta, MetaOrder order,
                 const void* bias, MatrixView y, void* workspace, const ParallelFor& parallel);

// The non-zeros that a bitmap's records have no room for: a CSR list, sorted by row, then column.
// Row r of the matrix owns the entries [rows[r], rows[r + 1]); rows[0] need not be 0, so that a
// view of some rows is rows + first. No surplus: rows is null. With one, k <= kMaxSurplusCols: a
// column has 16 bits, so that half of a matrix, chosen row by row, costs 0.64 of it.
struct Surplus {
  const std::int32_t* rows = nullptr;      // [n + 1]
  const std::uint16_t* columns = nullptr;  // [count], in [0, k)
  const void* values = nullptr;            // [count], of the dtype of the matrix
  std::int64_t count = 0;
};

// values [n16,k128,1024] and mask [n16,k128,64] (bitmap.h), both contiguous, from a weight with at
// most 16 non-zeros in each record; any n and k. Any zero is stored +0.0. Of a record with more the
// 16 lowest columns are kept; the lowest row that holds one is reported in `bad`, or -1.
Status pack_bitmap(ConstMatrixView weight, void* values, std::int32_t* mask, std::int32_t* bad,
                   const ParallelFor& parallel);

// Whatever takes a bitmap takes masks with exactly 16 bits set, padding included, as pack_bitmap
// writes them; whoever loads one from elsewhere checks that. With another mask nothing outside of
// the arguments is read or written, but what a record then holds is up to the op and the device.

// The exact inverse: weight [n,k], the surplus written into it. Of a matrix in row tiles, rows
// [16 * i, ...) start at tile i * k128 of values and mask.
Status unpack_bitmap(const void* values, const std::int32_t* mask, const Surplus& surplus,
                     MatrixView weight, const ParallelFor& parallel);

// y [m,n] = x [m,k] @ W^T (+ bias [n]), W packed as by pack_bitmap, with its surplus; x, values,
// surplus, bias and y of one dtype.
// workspace: linear_bitmap_workspace(m, n, k, parallel.threads) bytes, 64-byte aligned.
std::size_t linear_bitmap_workspace(std::int64_t m, std::int64_t n, std::int64_t k, int threads);
Status linear_bitmap(ConstMatrixView x, const void* values, const std::int32_t* mask,
                     const Surplus& surplus, const void* bias, MatrixView y, void* workspace,
                     const ParallelFor& parallel);

// Any weight as the stream of its non-zeros: those of a row one after the other, columns ascending;
// a bit for each column, the lowest column of eight in the lowest bit; where the values of a row
// start. The layout that compressed-tensors published as sparse-bitmask. offsets[0] need not be 0:
// of a view of some rows it is offsets + first. Where offsets and mask disagree nothing outside of
// the arguments is read, but what such a row then holds is up to the op.
struct Stream {
  const void* values = nullptr;           // [count]
  const std::uint8_t* mask = nullptr;     // [n, k/8 rounded up]
  const std::int64_t* offsets = nullptr;  // [n + 1]
  std::int64_t count = 0;
};

// values [count], mask and offsets from a weight with `count` non-zeros; another number of them is
// an error. -0.0 is a zero.
Status pack_stream(ConstMatrixView weight, std::int64_t count, void* values, std::uint8_t* mask,
                   std::int64_t* offsets, const ParallelFor& parallel);

// The exact inverse: weight [n,k].
Status unpack_stream(const Stream& stream, MatrixView weight, const ParallelFor& parallel);

// y [m,n] = x [m,k] @ W^T (+ bias [n]), W packed as by pack_stream; x, values, bias and y of one
// dtype. workspace: linear_stream_workspace(m, n, k, parallel.threads) bytes, 64-byte aligned.
std::size_t linear_stream_workspace(std::int64_t m, std::int64_t n, std::int64_t k, int threads);
Status linear_stream(ConstMatrixView x, const Stream& stream, const void* bias, MatrixView y,
                     void* workspace, const ParallelFor& parallel);

// The same ops (but for streams) on device memory and the caller's stream, capturable in a CUDA
// graph.
namespace cuda {

// workspace: input_sumsq_workspace(m, k) bytes of device memory.
std::size_t input_sumsq_workspace(std::int64_t m, std::int64_t k);
Status input_sumsq(double* acc, ConstMatrixView x, const bool* keep, void* workspace,
                   cudaStream_t stream);

Status prune_rows(MatrixView weight, const float* input_norm, std::int64_t n_prune,
                  std::int32_t* bad, cudaStream_t stream);
Status prune_nm(MatrixView weight, const float* input_norm, int keep, int group, std::int32_t* bad,
                cudaStream_t stream);
Status pack_24(ConstMatrixView weight, void* values, std::int16_t* meta, std::int32_t* bad,
               cudaStream_t stream);
Status unpack_24(const void* values, const std::int16_t* meta, MetaOrder order, MatrixView weight,
                 cudaStream_t stream);
Status order_meta_24(const std::int16_t* src, MetaOrder src_order, std::int16_t* dst,
                     MetaOrder dst_order, std::int64_t n, std::int64_t k, cudaStream_t stream);

// prune_nm with 2:4, then pack_24, in one pass that leaves the weight as it is. A row that prune_nm
// would report in `bad` is reported, and packed as zeros. k % 16 == 0.
Status prune_pack_24(ConstMatrixView weight, const float* input_norm, void* values,
                     std::int16_t* meta, std::int32_t* bad, cudaStream_t stream);

// linear_24 on a device has several kernels, each best for some m; all read one packed weight.
// Which one runs is a choice: found by linear_24_choose, or forced by the caller.
struct Device {
  int arch;  // compute capability: 90 for 9.0
  int sms;   // streaming multiprocessors
};
struct Linear24Choice {
  int kernel = 0;      // in [0, linear_24_kernels())
  int splits = 1;      // parts of k, computed apart and added in order
  bool tuned = false;  // by a rule, not by default
};
// Of all calls with these device, dtype, n and k, and m <= last_m (the nearest such rule wins).
// With kLinear24Default as its kernel these run by default, whatever rules there are for larger m.
constexpr int kLinear24Default = -1;
struct Linear24Rule {
  Device device;
  DType dtype;
  std::int64_t n, k, last_m;
  Linear24Choice choice;
};

Status current_device(Device* device);
int linear_24_kernels();
const char* linear_24_kernel_name(int kernel);  // "mma_sp_128x16", or "" where there is none
// Replaces all rules in one step. Copies them; safe beside running calls.
Status set_linear_24_rules(const Linear24Rule* rules, std::int64_t count);
// By the rules, or else a default that depends on the arguments alone. Fails where no kernel of
// this program runs on such a device, or reads that dtype or order.
Status linear_24_choose(Device device, std::int64_t m, std::int64_t n, std::int64_t k, DType dtype,
                        MetaOrder order, Linear24Choice* choice);
// Whether `choice.kernel` can run that problem with that many splits; the Status says why not.
Status linear_24_check(Linear24Choice choice, Device device, std::int64_t m, std::int64_t n,
                       std::int64_t k, DType dtype, MetaOrder order);

// y [m,n] = x [m,k] @ W^T (+ bias [n]); bf16 or fp16, fp32 accumulation; order 80 or 90. x, values,
// meta and y start on 16 bytes, x.ld % 8 == 0, y is contiguous (y.ld == n).
// workspace: linear_24_workspace(choice, m, n, k) bytes of device memory on 16 bytes.
std::size_t linear_24_workspace(Linear24Choice choice, std::int64_t m, std::int64_t n,
                                std::int64_t k);
Status linear_24(ConstMatrixView x, const void* values, const std::int16_t* meta, MetaOrder order,
                 const void* bias, MatrixView y, Linear24Choice choice, void* workspace,
                 cudaStream_t stream);

// A surplus lies in device memory too; what of it points outside [0, count) or [0, k) is skipped.
Status pack_bitmap(ConstMatrixView weight, void* values, std::int32_t* mask, std::int32_t* bad,
                   cudaStream_t stream);
Status unpack_bitmap(const void* values, const std::int32_t* mask, const Surplus& surplus,
                     MatrixView weight, cudaStream_t stream);

// y [m,n] = x [m,k] @ W^T (+ bias [n]) for m <= kMaxBitmapTokens; more tokens are better served by
// a dense product with what unpack_bitmap gives, some rows at a time. bf16 or fp16, fp32
// accumulation in an order that depends on m, n, k and the device's number of SMs alone, one
// rounding. x, values and mask start on 16 bytes, x.ld % 8 == 0 (columns past k are not read), y is
// contiguous (y.ld == n). workspace: linear_bitmap_workspace(m, n, k) bytes of device memory on 16
// bytes, asked while the device is the current one.
constexpr std::int64_t kMaxBitmapTokens = 16;
std::size_t linear_bitmap_workspace(std::int64_t m, std::int64_t n, std::int64_t k);
Status linear_bitmap(ConstMatrixView x, const void* values, const std::int32_t* mask,
                     const Surplus& surplus, const void* bias, MatrixView y, void* workspace,
                     cudaStream_t stream);

// "4.2.0": the CUTLASS headers this library was compiled with.
const char* cutlass_version();

}  // namespace cuda
}  // namespace wanda_ext
