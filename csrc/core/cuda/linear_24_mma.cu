// linear_24 by mma.sp, for every architecture from sm_80 on: y[m,n] = x[m,k] W^T (+ bias).
//
//   multiply    a CTA computes a tile of rows of W x tokens. W is the sparse operand A of mma.sp,
//               x^T is B. Its warps share the tile by rows and tokens and, where the tile is small,
//               by columns: each takes its blocks of every stage, and their sums meet in shared
//               memory, in the order of the warps.
//   add_splits  where the tiles are too few for the device, grid.y parts of k are computed apart,
//               in fp32 in the workspace, and added here, in order.
//
// Stages of W and x stream through a ring in shared memory (linear_24_mma.h). The tensor core
// multiplies what the metadata selects: NaN or infinity in a pruned column of x reaches nothing.
//
// Few tokens are bound by memory. W must stream from it once, at full speed, for which the fastest
// devices want some 40 KB under way in each SM (bandwidth times latency; not measured). A ring
// holds 37 to 55 KB of W, and x beside. x comes from L2 again for every tile of rows, 2 m bytes a
// column against the 1 1/8 of each row: with 32 rows for 4 tokens, 64 for 8 and 128 for 16 it is
// less than a quarter of W. Fewer rows make more tiles, which keeps small matrices from being
// split; more make less of x, where many tokens meet a large matrix. Hundreds of tokens are bound
// by the tensor cores and by the shared memory that feeds them: there a warp takes 64 x 64, and one
// load of a fragment serves four products or eight.
//
// Memory: 1 1/8 bytes read a weight. A split call writes and reads 4 bytes an output and split.
#include <climits>
#include <iterator>

#include "linear_24_kernels.h"
#include "linear_24_mma.h"

namespace wanda_ext {
namespace cuda {
namespace {

constexpr int kMaxSplits = 32;
constexpr int kTokenTilesTogether = 8;  // run side by side, so that they meet their W in L2
constexpr int kAddThreads = 256;
constexpr int kAddOutputs = 4;  // a thread

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Call {
  const char* x;
  std::int64_t x_stride;  // bytes from row to row
  const char* values;
  const char* meta;
  const void* bias;
  void* y;
  float* partial;           // [splits][split_size], or null: the sums are whole
  std::int64_t split_size;  // m n, rounded up
  unsigned m, n, k;
  unsigned row_tiles, token_tiles;
  unsigned split_tiles, longer_splits;  // tiles of k in a split; how many have one more
};

// --- The kernels ---------------------------------------------------------------------------------

// Eight outputs of a token: whole in y, or a split's in the workspace.
template <typename T>
__device__ void write_outputs(const Call& call, unsigned token, unsigned row, float (&sum)[8]) {
  const std::int64_t place = static_cast<std::int64_t>(token) * call.n + row;
  const bool whole = call.n % 8 == 0;  // and so aligned
  if (call.partial != nullptr) {
    float* to = call.partial + blockIdx.y * call.split_size + place;
    if (whole) {
      store_tile<float, 4, 16>(to, {sum[0], sum[1], sum[2], sum[3]});
      store_tile<float, 4, 16>(to + 4, {sum[4], sum[5], sum[6], sum[7]});
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (row + i < call.n) to[i] = sum[i];
      }
    }
    return;
  }
  Tile<T, 8, 16> out;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (call.bias != nullptr && row + i < call.n) {
      sum[i] += to_float(static_cast<const T*>(call.bias)[row + i]);
    }
    out.at[i] = from_float<T>(sum[i]);
  }
  T* to = static_cast<T*>(call.y) + place;
  if (whole) {
    store_tile<T, 8, 16>(to, out);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (row + i < call.n) to[i] = out.at[i];
    }
  }
}

// Grid: tiles, splits. Of many tiles, a few tiles of tokens run through all rows together.
template <typename T, typename Shape, MetaOrder kOrder>
__global__ void __launch_bounds__(Shape::kThreads) multiply(const Call call) {
  constexpr int kStages = Shape::kStages;
  auto* stages = static_cast<Stage<Shape, kOrder>*>(dynamic_shared());
  if (call.partial != nullptr) allow_next_kernel();

  unsigned row_tile = blockIdx.x, token_tile = 0;
  if (call.token_tiles > 1) {
    const unsigned turn = row_tile / (kTokenTilesTogether * call.row_tiles) * kTokenTilesTogether;
    const unsigned together = std::min<unsigned>(kTokenTilesTogether, call.token_tiles - turn);
    const unsigned in_turn = row_tile - turn * call.row_tiles;
    token_tile = turn + in_turn % together;
    row_tile = in_turn / together;
  }
  const unsigned first_row = row_tile * Shape::kRows, first_token = token_tile * Shape::kTokens;
  const unsigned split = blockIdx.y;
  const unsigned first = split * call.split_tiles + std::min(split, call.longer_splits);
  const unsigned end = first + call.split_tiles + (split < call.longer_splits);

  const TileCopy<Shape::kRows, Shape::kColumns, Shape::kThreads> values(call.values, call.k, call.k,
                                                                        first_row, call.n);
  const TileCopy<Shape::kTokens, 2 * Shape::kColumns, Shape::kThreads> x(
      call.x, call.x_stride, 2 * call.k, first_token, call.m);
  const MetaCopy<Shape, kOrder> meta(call.meta, call.n, call.k, first_row);
  // A group of copies for each tile, some of them empty; kStages - 1 are under way.
  const auto copy = [&](unsigned tile) {
    if (tile < end) {
      auto& stage = stages[(tile - first) % kStages];
      values.copy(stage.values, tile);
      x.copy(stage.x, tile);
      meta.copy(stage.meta, tile);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy(first + i);
  WarpTile<T, Shape, kOrder> warp_tile;
  for (unsigned tile = first; tile < end; ++tile) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this tile is there, and the one before it no longer in use
    copy(tile + kStages - 1);
    warp_tile.multiply(stages[(tile - first) % kStages], tile);
  }

  __syncthreads();
  auto& sums = *static_cast<Sums<Shape>*>(dynamic_shared());
  warp_tile.store(sums);
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x * 8; i < Shape::kTokens * Shape::kRows; i += Shape::kThreads * 8) {
    const int token = i / Shape::kRows, row = i % Shape::kRows;
    if (first_token + token >= call.m || first_row + row >= call.n) continue;
    float sum[8] = {};
#pragma unroll
    for (int w = 0; w < Shape::kWarpsOfColumns; ++w) {
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const auto part = load_tile<float, 4, 16>(&sums.at[w][token][row + j]);
#pragma unroll
        for (int p = 0; p < 4; ++p) sum[j + p] += part.at[p];
      }
    }
    write_outputs<T>(call, first_token + token, first_row + row, sum);
  }
}

// partial [splits][split_size] -> y [m,n], count = m n.
template <typename T>
__global__ void __launch_bounds__(kAddThreads)
    add_splits(const float* __restrict__ partial, int splits, std::int64_t split_size,
               const T* __restrict__ bias, T* __restrict__ y, std::int64_t count, unsigned n) {
  await_previous_kernel();
  const std::int64_t first =
      (static_cast<std::int64_t>(blockIdx.x) * kAddThreads + threadIdx.x) * kAddOutputs;
  if (first >= count) return;
  auto sum = load_tile<float, kAddOutputs, 16>(partial + first);
#pragma unroll 4  // loads in flight
  for (int s = 1; s < splits; ++s) {
    const auto more = load_tile<float, kAddOutputs, 16>(partial + s * split_size + first);
#pragma unroll
    for (int i = 0; i < kAddOutputs; ++i) sum.at[i] += more.at[i];
  }
  Tile<T, kAddOutputs, kAddOutputs * sizeof(T)> out;
  unsigned row = static_cast<unsigned>(first % n);
#pragma unroll
  for (int i = 0; i < kAddOutputs; ++i) {
    if (bias != nullptr) sum.at[i] += to_float(bias[row]);
    row = row + 1 < n ? row + 1 : 0;
    out.at[i] = from_float<T>(sum.at[i]);
  }
  if (first + kAddOutputs <= count) return store_tile(y + first, out);
#pragma unroll  // else `out` lies in local memory
  for (int i = 0; i < kAddOutputs; ++i) {
    if (first + i < count) y[first + i] = out.at[i];
  }
}

// --- The table -----------------------------------------------------------------------------------

template <typename Shape>
std::int64_t tiles_of(std::int64_t m, std::int64_t n) {
  return divide_up(n, Shape::kRows) * divide_up(m, Shape::kTokens);
}

// As few as give almost every SM a CTA, whose ring alone keeps it busy. Each more costs workspace.
template <typename Shape>
int default_splits(Device device, std::int64_t m, std::int64_t n, std::int64_t k) {
  const std::int64_t tiles = tiles_of<Shape>(m, n);
  const std::int64_t most = std::min<std::int64_t>(kMaxSplits, divide_up(k, Shape::kColumns));
  int splits = 1;
  while (splits < most && splits * tiles * 8 < std::int64_t{device.sms} * 7) ++splits;
  return splits;
}

std::int64_t split_size(std::int64_t m, std::int64_t n) {
  return divide_up(m * n, kAddOutputs) * kAddOutputs;
}

std::size_t workspace(std::int64_t m, std::int64_t n, std::int64_t, int splits) {
  return splits > 1 ? static_cast<std::size_t>(split_size(m, n) * splits) * sizeof(float) : 0;
}

template <typename T, typename Shape, MetaOrder kOrder>
Status run(const Linear24Problem& problem, int splits, void* workspace, cudaStream_t stream) {
  const std::int64_t m = problem.m, n = problem.n, k = problem.k;
  if (tiles_of<Shape>(m, n) > INT_MAX) {
    return make_error(StatusCode::kInvalidArgument,
                      "linear_24: m %lld and n %lld are too large for one call; split its rows",
                      static_cast<long long>(m), static_cast<long long>(n));
  }
  Call call = {};
  call.x = static_cast<const char*>(problem.x);
  call.x_stride = problem.ld_x * static_cast<std::int64_t>(sizeof(T));
  call.values = static_cast<const char*>(problem.values);
  call.meta = reinterpret_cast<const char*>(problem.meta);
  call.bias = problem.bias;
  call.y = problem.y;
  call.partial = splits > 1 ? static_cast<float*>(workspace) : nullptr;
  call.split_size = split_size(m, n);
  call.m = static_cast<unsigned>(m);
  call.n = static_cast<unsigned>(n);
  call.k = static_cast<unsigned>(k);
  call.row_tiles = static_cast<unsigned>(divide_up(n, Shape::kRows));
  call.token_tiles = static_cast<unsigned>(divide_up(m, Shape::kTokens));
  const auto k_tiles = static_cast<unsigned>(divide_up(k, Shape::kColumns));
  call.split_tiles = k_tiles / static_cast<unsigned>(splits);
  call.longer_splits = k_tiles % static_cast<unsigned>(splits);
  LaunchConfig config;
  config.grid = dim3(call.row_tiles * call.token_tiles, static_cast<unsigned>(splits));
  config.block = dim3(Shape::kThreads);
  config.stream = stream;
  config.shared_bytes = shared_bytes<Shape, kOrder>();
  const Status multiplied = launch("linear_24", multiply<T, Shape, kOrder>, config, call);
  if (!multiplied.ok() || splits == 1) return multiplied;

  config.grid = dim3(static_cast<unsigned>(divide_up(m * n, kAddThreads * kAddOutputs)));
  config.block = dim3(kAddThreads);
  config.shared_bytes = 0;
  config.overlaps = true;
  return launch("linear_24", add_splits<T>, config, static_cast<const float*>(call.partial), splits,
                call.split_size, static_cast<const T*>(problem.bias), static_cast<T*>(problem.y),
                m * n, call.n);
}

template <typename Shape>
Status run(const Linear24Problem& problem, int splits, void* workspace, cudaStream_t stream) {
  const bool half = problem.dtype == DType::kFloat16, sm80 = problem.order == MetaOrder::kSm80;
  const auto kernel =
      half ? (sm80 ? run<__half, Shape, MetaOrder::kSm80> : run<__half, Shape, MetaOrder::kSm90>)
           : (sm80 ? run<__nv_bfloat16, Shape, MetaOrder::kSm80>
                   : run<__nv_bfloat16, Shape, MetaOrder::kSm90>);
  return kernel(problem, splits, workspace, stream);
}

template <typename Shape>
constexpr Linear24Kernel row(const char* name, std::int64_t last_m) {
  Linear24Kernel kernel = {};
  kernel.name = name;
  kernel.first_arch = 80;
  kernel.last_arch = INT_MAX;
  kernel.reads_80 = kernel.reads_90 = kernel.float16 = kernel.bfloat16 = true;
  kernel.n_multiple = 1;
  kernel.last_m = last_m;
  kernel.max_splits = kMaxSplits;
  kernel.default_splits = default_splits<Shape>;
  kernel.workspace = workspace;
  kernel.run = run<Shape>;
  return kernel;
}

// Rows, tokens, columns and number of stages; warps along rows, tokens and columns. Every ring fits
// the 99 KB that sm_86 gives a CTA. Of two with one last_m the later is the default.
constexpr Linear24Kernel kKernels[] = {
    row<Shape<32, 8, 256, 7, 1, 1, 4>>("mma_sp_32x8", 4),
    row<Shape<64, 16, 128, 7, 2, 1, 2>>("mma_sp_64x16", 8),
    row<Shape<128, 16, 128, 4, 4, 1, 1>>("mma_sp_128x16", 16),
    row<Shape<128, 32, 64, 7, 4, 1, 1>>("mma_sp_128x32", 32),
    row<Shape<256, 64, 64, 3, 4, 2, 1>>("mma_sp_256x64", 64),
    row<Shape<128, 64, 64, 5, 2, 2, 1>>("mma_sp_128x64", 64),
    row<Shape<128, 128, 64, 3, 2, 2, 1>>("mma_sp_128x128", INT64_MAX),
};

}  // namespace

const Linear24Kernels kMmaSpKernels = {kLinear24Abi, static_cast<int>(std::size(kKernels)),
                                       kKernels};

}  // namespace cuda
}  // namespace wanda_ext
