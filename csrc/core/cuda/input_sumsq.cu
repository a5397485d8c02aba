// input_sumsq on the device: acc[k] += sum over tokens of x[m,k]^2, one pass over x.
//
//   group_sums  a CTA takes one group of 256 rows over a tile of columns. Each of its 8 warps sums
//               one chunk of 32 rows in fp32, its lanes side by side along the row, 16 bytes each.
//               The chunk sums meet in shared memory and are folded in fp64, in row order.
//   add_groups  a thread per column adds the group sums to acc in row order.
//
// Memory: x is read once; the workspace holds one fp64 per group and column, 1/64 of a 16-bit x.
// The order of every addition is the tree of ops.h, so the bits are those of the CPU op.
#include <cstdint>

#include "core/check_args.h"
#include "device.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace cuda {
namespace {

constexpr int kThreads = kChunksPerGroup * kWarp;
constexpr std::int64_t kRowsPerGroup = kRowsPerChunk * kChunksPerGroup;
constexpr int kFoldThreads = 64;  // few, so that the columns of one matrix reach many SMs

static_assert(kRowsPerChunk == kWarp, "a ballot holds the kept rows of a chunk");

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <typename T, int kVec>
__device__ void add_squares(const T* x, float (&sums)[kVec]) {
  const auto values = load_tile<T, kVec, kVec * sizeof(T)>(x);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float value = to_float(values.at[i]);
    sums[i] = __fadd_rn(sums[i], __fmul_rn(value, value));
  }
}

// Bit r: row + r lies inside x and its token is kept.
__device__ unsigned kept_rows(const bool* keep, std::int64_t row, std::int64_t m, int lane) {
  const std::int64_t mine = row + lane;
  return __ballot_sync(~0u, mine < m && (keep == nullptr || keep[mine]));
}

template <int kTile>
struct ChunkSums {
  float at[kChunksPerGroup][kTile];
};

// x [m,k], keep [m] or null -> groups [ceil(m/256),k]. Grid: groups * tiles, tiles fastest, so that
// neighbouring CTAs read neighbouring columns.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    group_sums(const T* __restrict__ x, std::int64_t m, std::int64_t k, std::int64_t ld,
               const bool* __restrict__ keep, unsigned tiles, double* __restrict__ groups) {
  constexpr int kTile = kWarp * kVec;
  auto& chunk_sums = block_shared<ChunkSums<kTile>>().at;

  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t group = blockIdx.x / tiles;
  const std::int64_t first_column = static_cast<std::int64_t>(blockIdx.x % tiles) * kTile;
  const std::int64_t column = first_column + lane * kVec;
  const std::int64_t row = group * kRowsPerGroup + warp * kRowsPerChunk;

  float sums[kVec] = {};
  const unsigned kept = kept_rows(keep, row, m, lane);
  if (column < k) {
    const T* chunk = x + row * ld + column;
    if (kept == ~0u) {
#pragma unroll 8  // loads in flight
      for (int r = 0; r < kRowsPerChunk; ++r) add_squares(chunk + r * ld, sums);
    } else {
      for (unsigned rows = kept; rows != 0; rows &= rows - 1) {
        add_squares(chunk + (__ffs(rows) - 1) * ld, sums);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) chunk_sums[warp][lane * kVec + i] = sums[i];
  __syncthreads();

  for (int i = threadIdx.x; i < kTile && first_column + i < k; i += kThreads) {
    double total = 0;
#pragma unroll
    for (int c = 0; c < kChunksPerGroup; ++c) {
      total = __dadd_rn(total, static_cast<double>(chunk_sums[c][i]));
    }
    groups[group * k + first_column + i] = total;
  }
}

// groups [count,k] -> acc [k]
__global__ void __launch_bounds__(kFoldThreads)
    add_groups(const double* __restrict__ groups, std::int64_t count, std::int64_t k,
               double* __restrict__ acc) {
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kFoldThreads + threadIdx.x;
  if (column >= k) return;
  double total = acc[column];
#pragma unroll 8  // loads in flight
  for (std::int64_t g = 0; g < count; ++g) total = __dadd_rn(total, groups[g * k + column]);
  acc[column] = total;
}

template <typename T, int kVec>
Status run(double* acc, ConstMatrixView x, const bool* keep, double* groups, cudaStream_t stream) {
  const std::int64_t count = divide_up(x.rows, kRowsPerGroup);
  const std::int64_t tiles = divide_up(x.cols, kWarp * kVec);
  if (count > INT32_MAX / tiles) {
    return make_error(StatusCode::kInvalidArgument,
                      "input_sumsq: x is %lld x %lld, too large for one call; split its rows",
                      static_cast<long long>(x.rows), static_cast<long long>(x.cols));
  }
  const Status summed =
      launch("input_sumsq", group_sums<T, kVec>, dim3(static_cast<unsigned>(count * tiles)),
             dim3(kThreads), stream, static_cast<const T*>(x.data), x.rows, x.cols, x.ld, keep,
             static_cast<unsigned>(tiles), groups);
  if (!summed.ok()) return summed;
  const std::int64_t fold_blocks = divide_up(x.cols, kFoldThreads);
  return launch("input_sumsq", add_groups, dim3(static_cast<unsigned>(fold_blocks)),
                dim3(kFoldThreads), stream, static_cast<const double*>(groups), count, x.cols, acc);
}

// 16-byte loads where every row starts and ends on 16 bytes, else one element a lane.
template <typename T>
Status dispatch(double* acc, ConstMatrixView x, const bool* keep, double* groups,
                cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const bool aligned = is_aligned(x.data) && x.ld % kVec == 0 && x.cols % kVec == 0;
  return aligned ? run<T, kVec>(acc, x, keep, groups, stream)
                 : run<T, 1>(acc, x, keep, groups, stream);
}

}  // namespace

std::size_t input_sumsq_workspace(std::int64_t m, std::int64_t k) {
  return static_cast<std::size_t>(divide_up(m, kRowsPerGroup) * k) * sizeof(double);
}

Status input_sumsq(double* acc, ConstMatrixView x, const bool* keep, void* workspace,
                   cudaStream_t stream) {
  if (Status status = check_matrix("input_sumsq", "x", x); !status.ok()) return status;
  if (x.rows == 0 || x.cols == 0) return {};
  if (acc == nullptr || workspace == nullptr) {
    return make_error(StatusCode::kInvalidArgument,
                      "input_sumsq: %s is a null pointer; pass device memory of %lld doubles",
                      acc == nullptr ? "acc" : "workspace",
                      static_cast<long long>(
                          acc == nullptr ? x.cols : divide_up(x.rows, kRowsPerGroup) * x.cols));
  }
  double* groups = static_cast<double*>(workspace);
  switch (x.dtype) {
    case DType::kFloat32:
      return dispatch<float>(acc, x, keep, groups, stream);
    case DType::kFloat16:
      return dispatch<__half>(acc, x, keep, groups, stream);
    case DType::kBFloat16:
      return dispatch<__nv_bfloat16>(acc, x, keep, groups, stream);
  }
  return {};  // check_matrix admits no other dtype
}

}  // namespace cuda
}  // namespace wanda_ext
