// The two passes of an op that leaves a row alone, or writes it as zeros, where it finds it bad.
#pragma once

#include "row.h"

namespace wanda_ext {
namespace cuda {

// `work` is a small struct with
//   bool refuses(const Values& values, int column)                             a tile makes its row
//   bad void write(unsigned row, int column, const Values& values, bool is_bad)
// Grid: n. The row is held on chip between the passes, so that memory is read once.
template <typename T, typename Shape, typename Work>
__global__ void __launch_bounds__(Shape::kThreads)
    check_then_write(const T* weight, std::int64_t ld, int k, Work work, std::int32_t* bad) {
  using Values = typename Row<T, Shape>::Values;
  Row<T, Shape> row(weight + static_cast<std::int64_t>(blockIdx.x) * ld, k);
  bool refused = false;
  row.for_each(
      [&](const Values& values, int column) { refused = refused || work.refuses(values, column); });
  const bool is_bad = __syncthreads_or(refused) != 0;
  if (is_bad) report_bad(bad, blockIdx.x);
  row.for_each(
      [&](const Values& values, int column) { work.write(blockIdx.x, column, values, is_bad); });
}

template <typename T, typename Shape, typename Work>
Status launch_check_then_write(const char* op, const ConstMatrixView& weight, const Work& work,
                               std::int32_t* bad, unsigned threads, cudaStream_t stream) {
  return launch(op, check_then_write<T, Shape, Work>, dim3(static_cast<unsigned>(weight.rows)),
                dim3(threads), stream, static_cast<const T*>(weight.data), weight.ld,
                static_cast<int>(weight.cols), work, bad);
}

// Bit i: the i-th of kGroup keys is not among the `prune` lowest; of equals the lower are first.
template <int kGroup>
__device__ unsigned kept_of_group(const unsigned* keys, int prune) {
  int rank[kGroup] = {};
#pragma unroll
  for (int j = 1; j < kGroup; ++j) {
#pragma unroll
    for (int i = 0; i < j; ++i) {
      const bool i_first = keys[i] <= keys[j];
      rank[j] += i_first;
      rank[i] += !i_first;
    }
  }
  unsigned kept = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) kept |= static_cast<unsigned>(rank[i] >= prune) << i;
  return kept;
}

// The keys of a tile.
template <typename Shape>
struct Keys {
  unsigned at[Shape::kVec];

  template <typename Values>
  __device__ Keys(const Values& values, const float* input_norm, int column) {
    const auto norms = norms_at<Shape>(input_norm, column);
#pragma unroll
    for (int i = 0; i < Shape::kVec; ++i) at[i] = score_key(values.at[i], norms.at[i]);
  }

  __device__ bool all_finite() const {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < Shape::kVec; ++i) finite = finite && at[i] < kNonFiniteKey;
    return finite;
  }
};

}  // namespace cuda
}  // namespace wanda_ext
