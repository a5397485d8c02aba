// linear_bitmap for few tokens: y[m,n] = x[m,k] W^T (+ surplus) (+ bias), by the tensor cores.
//
//   add_surplus  sums of the surplus alone, where there is one: a warp a row of W, fp32 [m,n]
//   multiply     a CTA computes groups of rows of W x all tokens. W is operand A of mma, which
//                lanes make in words of shared memory of their own (linear_bitmap.h); x^T is B.
//   add_pieces   the groups whose columns several CTAs share: adds what each has computed, in order
//
// Few tokens are bound by memory: W must stream from it once, at full speed, and nothing may wait.
// So there is a CTA an SM, for the whole call. All turns of all groups (linear_bitmap.h) lie in one
// row, and each CTA takes the next part of it, as long as those of the others: it may begin and end
// in the middle of a group. A piece is what a CTA has of a group. Each warp has two tiles of W in
// its registers, on their way while it multiplies others, 74 KB in an SM; they belong to the next
// turn, be it of this group or the next. x comes from L2 again for every group, 2 m bytes a column
// against the 1 1/8 of each row: groups of 32 rows for 4 tokens, 64 for 8 and 128 for 16 keep it
// below a quarter of W.
//
// Memory: 1 1/8 bytes read a weight, 4 more a surplus entry. A shared group writes and reads 4
// bytes an output and piece.
#include <climits>

#include "core/check_bitmap.h"
#include "linear_bitmap.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace cuda {
namespace {

constexpr const char* kLinearBitmap = "linear_bitmap";
constexpr int kAddThreads = 256;
constexpr int kMaskBytes = kBitmapTileMasks * 4;
constexpr int kValueBytes = kBitmapTileValues * 2;

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// How the turns of all groups are shared among CTAs.
struct Plan {
  unsigned row_tiles, column_tiles;  // of W
  unsigned group_turns, turns;       // of a group; of all
  unsigned part_turns, parts;        // of a CTA; how many there are
  // Whether every group is one piece.
  __host__ __device__ bool is_whole() const { return part_turns % group_turns == 0; }
};

struct Call {
  Plan plan;
  const char* x;
  std::int64_t x_stride;  // bytes from row to row
  const char* values;
  const char* mask;
  const void* bias;      // [n] or null
  const float* surplus;  // [m,n] or null
  float* pieces;         // [2 parts][tokens][rows] of those that are not whole
  void* y;
  int m, n, k;
};

template <typename Shape>
struct Shared {
  XStage<Shape> x[2];
  // Aligned by hand: CUDA promises dynamic shared memory less.
  char room[Shape::kWarps * Scratch::kBytes + Scratch::kRecordBytes - 128];
};

// --- The kernels ---------------------------------------------------------------------------------

template <typename T>
__device__ void write_output(const Call& call, unsigned token, unsigned row, float sum) {
  const std::int64_t place = static_cast<std::int64_t>(token) * call.n + row;
  if (call.surplus != nullptr) sum += call.surplus[place];
  if (call.bias != nullptr) sum += to_float(static_cast<const T*>(call.bias)[row]);
  static_cast<T*>(call.y)[place] = from_float<T>(sum);
}

// Where the two tiles of a warp's next turn come from.
template <typename Shape>
class RecordStream {
 public:
  // `turns`: of the CTA, from turn `first` on.
  __device__ RecordStream(const Call& call, unsigned first, unsigned turns)
      : call_(call),
        row_tile_(first / call.plan.group_turns * Shape::kRowTiles + warp() % Shape::kRowTiles),
        turns_left_(turns) {
    begin_group(first % call.plan.group_turns);
  }

  // Tiles of columns from the warp's first one of the turn on; none in rows that are not there.
  __device__ int tiles() const { return tiles_; }

  __device__ void load(Records& to, int half) const {
    if (tiles_ <= half * Shape::kWarpsOfColumns) return;
    to.load(masks_ + half * Shape::kWarpsOfColumns * kMaskBytes,
            values_ + half * Shape::kWarpsOfColumns * kValueBytes);
  }

  __device__ void advance() {
    tiles_ -= Shape::kTurnTiles;
    masks_ += Shape::kTurnTiles * kMaskBytes;
    values_ += Shape::kTurnTiles * kValueBytes;
    if (--until_ > 0) return;
    row_tile_ += Shape::kRowTiles;
    begin_group(0);
  }

 private:
  __device__ static unsigned warp() { return threadIdx.x / kWarp; }

  __device__ void begin_group(unsigned turn) {
    const unsigned column = warp() / Shape::kRowTiles + turn * Shape::kTurnTiles;
    const std::int64_t tile =
        static_cast<std::int64_t>(row_tile_) * call_.plan.column_tiles + column;
    masks_ = call_.mask + tile * kMaskBytes + threadIdx.x % kWarp * 8;
    values_ = call_.values + tile * kValueBytes + threadIdx.x % kWarp * 16;
    until_ = std::min(call_.plan.group_turns - turn, turns_left_);
    const bool is_there = turns_left_ > 0 && row_tile_ < call_.plan.row_tiles;
    tiles_ = is_there ? static_cast<int>(call_.plan.column_tiles) - static_cast<int>(column) : 0;
    turns_left_ -= until_;
  }

  const Call& call_;
  const char *masks_, *values_;  // of this lane in the warp's first tile
  int tiles_;
  unsigned row_tile_, until_, turns_left_;
};

// Adds what the warps have of a group, and writes it: outputs, or a piece.
template <typename T, typename Shape>
__device__ void write_sums(const Call& call, const float (&sums)[Shape::kTokenTiles][4],
                           char* scratch, unsigned group, float* piece) {
  const auto of_warp = [&](int warp) {
    return reinterpret_cast<float*>(scratch + warp * Scratch::kBytes);
  };
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  float* mine = of_warp(static_cast<int>(threadIdx.x) / kWarp);
#pragma unroll
  for (int i = 0; i < Shape::kTokenTiles; ++i) {
#pragma unroll
    for (int s = 0; s < 4; ++s) mine[(i * 4 + s) * kWarp + lane] = sums[i][s];
  }
  __syncthreads();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < Shape::kRows * Shape::kTokens;
       i += Shape::kThreads) {
    const int in_group = i % Shape::kRows, token = i / Shape::kRows;
    const unsigned row = group * Shape::kRows + static_cast<unsigned>(in_group);
    if (token >= call.m || row >= static_cast<unsigned>(call.n)) continue;
    const int r = in_group % kTileRows, t = token % kTokensOfMma;
    const int place = (token / kTokensOfMma * 4 + r / 8 * 2 + t % 2) * kWarp + r % 8 * 4 + t / 2;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < Shape::kWarpsOfColumns; ++w) {
      sum += of_warp(w * Shape::kRowTiles + in_group / kTileRows)[place];
    }
    if (piece != nullptr) {
      piece[i] = sum;
    } else {
      write_output<T>(call, static_cast<unsigned>(token), row, sum);
    }
  }
}

// Grid: parts.
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) multiply(const Call call) {
  auto& shared = *static_cast<Shared<Shape>*>(dynamic_shared());
  if (!call.plan.is_whole()) allow_next_kernel();
  char* scratch = shared.room + (0 - to_shared(shared.room)) % Scratch::kRecordBytes;
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  SharedAddress words = to_shared(scratch + warp * Scratch::kBytes + lane * 4);
  keep(words);

  const Plan& plan = call.plan;
  const unsigned first = blockIdx.x * plan.part_turns;
  const unsigned end = std::min(first + plan.part_turns, plan.turns);
  RecordStream<Shape> w(call, first, end - first);
  Records a, b;
  w.load(a, 0);
  w.load(b, 1);
  XStream<Shape> x(shared.x, call.x, call.x_stride, call.m, call.k,
                   first % plan.group_turns * Shape::kTurnStages,
                   plan.group_turns * Shape::kTurnStages, (end - first) * Shape::kTurnStages);

  const int tile = static_cast<int>(warp) / Shape::kRowTiles;  // of columns, in a stage
  unsigned stage = 0;
  for (unsigned turn = first; turn < end;) {
    const unsigned group = turn / plan.group_turns, group_begin = group * plan.group_turns;
    const unsigned group_end = group_begin + plan.group_turns;
    const unsigned piece_begin = turn, piece_end = std::min(group_end, end);
    float sums[Shape::kTokenTiles][4] = {};
#pragma unroll 1
    for (; turn < piece_end; ++turn) {
      const int tiles = w.tiles();
      w.advance();
      x.next(stage);
      if (tiles > 0) multiply_tile<T, Shape>(sums, a, words, shared.x[stage], tile);
      w.load(a, 0);
      if constexpr (Shape::kTurnStages == 2) x.next(stage ^= 1);
      if (tiles > Shape::kWarpsOfColumns) {
        constexpr int kBehind = Shape::kTurnStages == 2 ? 0 : Shape::kWarpsOfColumns;
        multiply_tile<T, Shape>(sums, b, words, shared.x[stage], tile + kBehind);
      }
      w.load(b, 1);
      stage ^= 1;
    }
    // A part has two pieces at most: one that its group's begin is not in, one that the end is not.
    float* piece = nullptr;
    if (piece_begin != group_begin || piece_end != group_end) {
      const unsigned slot = 2 * blockIdx.x + (piece_begin == group_begin);
      piece = call.pieces + static_cast<std::int64_t>(slot) * (Shape::kRows * Shape::kTokens);
    }
    write_sums<T, Shape>(call, sums, scratch, group, piece);
  }
}

// A thread adds the pieces of an output, in order of columns. Grid: of m n.
template <typename T, typename Shape>
__global__ void __launch_bounds__(kAddThreads) add_pieces(const Call call) {
  await_previous_kernel();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (i >= static_cast<std::int64_t>(call.m) * call.n) return;
  const auto token = static_cast<unsigned>(i / call.n), row = static_cast<unsigned>(i % call.n);
  const Plan& plan = call.plan;
  const unsigned begin = row / Shape::kRows * plan.group_turns;  // of the group
  const unsigned first = begin / plan.part_turns;
  const unsigned last = (begin + plan.group_turns - 1) / plan.part_turns;
  if (first == last) return;
  const auto piece = [&](unsigned slot) {
    const std::int64_t place = static_cast<std::int64_t>(slot) * Shape::kTokens + token;
    return call.pieces[place * Shape::kRows + row % Shape::kRows];
  };
  float sum = piece(2 * first + 1);
  for (unsigned part = first + 1; part <= last; ++part) sum += piece(2 * part);
  write_output<T>(call, token, row, sum);
}

// sums [m,n] = x S^T. A lane adds every 32nd entry of a row, then the lanes meet. Grid: of n.
template <typename T>
__global__ void __launch_bounds__(kAddThreads)
    add_surplus(const T* __restrict__ x, std::int64_t x_ld, int m, int n, int k, Surplus surplus,
                float* __restrict__ sums) {
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (kAddThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= n) return;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  // Offsets and columns that are wrong must not lead out of the lists and of x.
  const std::int64_t begin = std::max(surplus.rows[row], 0);
  const std::int64_t end = std::min<std::int64_t>(surplus.rows[row + 1], surplus.count);
  float sum[kMaxBitmapTokens] = {};
  for (std::int64_t e = begin + lane; e < end; e += kWarp) {
    const int column = surplus.columns[e];
    if (column >= k) continue;
    const float value = to_float(static_cast<const T*>(surplus.values)[e]);
#pragma unroll
    for (int t = 0; t < kMaxBitmapTokens; ++t) {
      if (t < m) sum[t] += value * to_float(x[t * x_ld + column]);
    }
  }
#pragma unroll
  for (int t = 0; t < kMaxBitmapTokens; ++t) {
    if (t >= m) break;
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
      sum[t] += __shfl_xor_sync(~0u, sum[t], apart);
    }
    if (lane == 0) sums[static_cast<std::int64_t>(t) * n + row] = sum[t];
  }
}

// --- The launch ----------------------------------------------------------------------------------

// visit(shape) with the shape that serves m tokens.
template <typename Visit>
auto with_shape(std::int64_t m, Visit visit) {
  if (m <= 4) return visit(BitmapShape<2, 1>());
  if (m <= 8) return visit(BitmapShape<4, 1>());
  return visit(BitmapShape<8, 2>());
}

template <typename Shape>
Status make_plan(std::int64_t n, std::int64_t k, Plan* plan) {
  Device device;
  if (Status status = current_device(&device); !status.ok()) return status;
  const std::int64_t row_tiles = bitmap_row_tiles(n), column_tiles = bitmap_column_tiles(k);
  const std::int64_t group_turns =
      std::max<std::int64_t>(divide_up(column_tiles, Shape::kTurnTiles), 1);
  const std::int64_t turns = divide_up(row_tiles, Shape::kRowTiles) * group_turns;
  if (n > INT_MAX || k > INT_MAX / 2 || turns > INT_MAX) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: n %lld and k %lld are too large for one call; split its rows",
                      kLinearBitmap, static_cast<long long>(n), static_cast<long long>(k));
  }
  plan->row_tiles = static_cast<unsigned>(row_tiles);
  plan->column_tiles = static_cast<unsigned>(column_tiles);
  plan->group_turns = static_cast<unsigned>(group_turns);
  plan->turns = static_cast<unsigned>(turns);
  plan->part_turns = static_cast<unsigned>(divide_up(turns, device.sms));
  plan->parts = static_cast<unsigned>(divide_up(turns, plan->part_turns));
  return {};
}

template <typename Shape>
std::size_t piece_floats(const Plan& plan) {
  return plan.is_whole() ? 0 : std::size_t{2} * plan.parts * Shape::kRows * Shape::kTokens;
}

template <typename T, typename Shape>
Status run(const ConstMatrixView& x, Call call, const Surplus& surplus, float* workspace,
           cudaStream_t stream) {
  if (Status status = make_plan<Shape>(call.n, call.k, &call.plan); !status.ok()) return status;
  call.pieces = workspace;
  if (surplus.rows != nullptr) {
    float* sums = workspace + piece_floats<Shape>(call.plan);
    call.surplus = sums;
    const auto blocks = static_cast<unsigned>(divide_up(call.n, kAddThreads / kWarp));
    if (Status status =
            launch(kLinearBitmap, add_surplus<T>, dim3(blocks), dim3(kAddThreads), stream,
                   static_cast<const T*>(x.data), x.ld, call.m, call.n, call.k, surplus, sums);
        !status.ok()) {
      return status;
    }
  }
  LaunchConfig config;
  config.grid = dim3(call.plan.parts);
  config.block = dim3(Shape::kThreads);
  config.stream = stream;
  config.shared_bytes = sizeof(Shared<Shape>);
  const Status multiplied = launch(kLinearBitmap, multiply<T, Shape>, config, call);
  if (!multiplied.ok() || call.plan.is_whole()) return multiplied;
  config.grid = dim3(static_cast<unsigned>(divide_up(std::int64_t{call.m} * call.n, kAddThreads)));
  config.block = dim3(kAddThreads);
  config.shared_bytes = 0;
  config.overlaps = true;
  return launch(kLinearBitmap, add_pieces<T, Shape>, config, call);
}

Status check(const ConstMatrixView& x, const void* values, const std::int32_t* mask,
             const Surplus& surplus, const MatrixView& y) {
  if (Status status = check_linear_bitmap(x, values, mask, surplus, y); !status.ok()) return status;
  if (x.rows > kMaxBitmapTokens || (y.rows > 1 && y.ld != y.cols)) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: x must have at most %lld rows, and y ld equal to its columns, got %lld "
                      "rows and ld %lld for %lld columns; for more rows, multiply with what "
                      "unpack_bitmap gives",
                      kLinearBitmap, static_cast<long long>(kMaxBitmapTokens),
                      static_cast<long long>(x.rows), static_cast<long long>(y.ld),
                      static_cast<long long>(y.cols));
  }
  if (!is_aligned(x.data) || !is_aligned(values) || !is_aligned(mask) ||
      (x.rows > 1 && x.ld % 8 != 0)) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: x, values and mask must start on 16 bytes and ld of x be a multiple of "
                      "8, got ld %lld; pass an aligned copy",
                      kLinearBitmap, static_cast<long long>(x.ld));
  }
  Device device;
  if (Status status = current_device(&device); !status.ok()) return status;
  if (device.arch < 80 || (x.dtype != DType::kBFloat16 && x.dtype != DType::kFloat16)) {
    return make_error(StatusCode::kUnsupported,
                      "%s: expected sm_80 or newer and bfloat16 or float16, got sm_%d and %s; "
                      "convert the model, or unswap the linear",
                      kLinearBitmap, device.arch, name_of(x.dtype));
  }
  return {};
}

}  // namespace

std::size_t linear_bitmap_workspace(std::int64_t m, std::int64_t n, std::int64_t k) {
  if (m <= 0 || m > kMaxBitmapTokens || n <= 0 || k < 0) return 0;
  return with_shape(m, [&](auto shape) -> std::size_t {
    using Shape = decltype(shape);
    Plan plan;
    if (!make_plan<Shape>(n, k, &plan).ok()) return 0;  // linear_bitmap says why
    return (piece_floats<Shape>(plan) + static_cast<std::size_t>(m * n)) * sizeof(float);
  });
}

Status linear_bitmap(ConstMatrixView x, const void* values, const std::int32_t* mask,
                     const Surplus& surplus, const void* bias, MatrixView y, void* workspace,
                     cudaStream_t stream) {
  if (Status status = check(x, values, mask, surplus, y); !status.ok()) return status;
  if (x.rows == 0 || y.cols == 0) return {};
  if (workspace == nullptr || !is_aligned(workspace)) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: workspace must be %zu bytes of device memory on 16 bytes, got %p",
                      kLinearBitmap, linear_bitmap_workspace(x.rows, y.cols, x.cols), workspace);
  }
  Call call = {};
  call.x = static_cast<const char*>(x.data);
  call.x_stride = x.ld * 2;
  call.values = static_cast<const char*>(values);
  call.mask = reinterpret_cast<const char*>(mask);
  call.bias = bias;
  call.y = y.data;
  call.m = static_cast<int>(x.rows);
  call.n = static_cast<int>(y.cols);
  call.k = static_cast<int>(x.cols);
  return with_shape(x.rows, [&](auto shape) {
    using Shape = decltype(shape);
    auto* floats = static_cast<float*>(workspace);
    return x.dtype == DType::kFloat16 ? run<__half, Shape>(x, call, surplus, floats, stream)
                                      : run<__nv_bfloat16, Shape>(x, call, surplus, floats, stream);
  });
}

}  // namespace cuda
}  // namespace wanda_ext
