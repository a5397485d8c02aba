// pack_24 and prune_pack_24 on the device: a weight [n,k] as values [n,k/2] and metadata [n,k/16].
//
// A CTA takes a row, a thread tiles of 8 columns of it: two groups, four values, one byte of
// metadata. The two ops differ in which columns of a group stay: the non-zero ones, or those with
// the two highest scores. A tile stays in registers while the CTA agrees whether the row is bad.
//
// Memory: 2 bytes read and 1 1/8 written a weight of a 16-bit type; where scores are wanted, the
// norms come from the L1 cache.
#include <cstdint>

#include "check_rows.h"
#include "core/check_args.h"
#include "core/check_packed.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace cuda {
namespace {

// Which columns of a group hold something: more than two make the row bad.
template <typename T, typename Shape>
struct NonZeros {
  using Values = typename Row<T, Shape>::Values;

  __device__ static unsigned of(const T* group) {
    unsigned mask = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) mask |= static_cast<unsigned>(to_float(group[i]) != 0.0f) << i;
    return mask;
  }
  __device__ bool refuses(const Values& values, int) const {
    return __popc(of(values.at)) > 2 || __popc(of(values.at + 4)) > 2;
  }
  __device__ void find(const Values& values, int, unsigned (&masks)[2]) const {
    masks[0] = of(values.at);
    masks[1] = of(values.at + 4);
  }
};

// Which columns of a group have the two highest scores: NaN and infinity make the row bad.
template <typename T, typename Shape>
struct HighestScores {
  using Values = typename Row<T, Shape>::Values;

  const float* input_norm;

  __device__ bool refuses(const Values& values, int column) const {
    return !Keys<Shape>(values, input_norm, column).all_finite();
  }
  __device__ void find(const Values& values, int column, unsigned (&masks)[2]) const {
    const Keys<Shape> keys(values, input_norm, column);
    masks[0] = kept_of_group<4>(keys.at, 2);
    masks[1] = kept_of_group<4>(keys.at + 4, 2);
  }
};

template <typename T>
__device__ T pick(const T* group, unsigned column) {
  const T low = column & 1 ? group[1] : group[0];
  const T high = column & 1 ? group[3] : group[2];
  return kept_or_zero(column & 2 ? high : low, true);
}

template <typename T, typename Shape, typename Columns>
struct Pack {
  using Values = typename Row<T, Shape>::Values;
  static constexpr int kAlign = Shape::kAlign < 4 * sizeof(T) ? Shape::kAlign : 4 * sizeof(T);

  Columns columns;
  T* packed;
  std::uint8_t* meta;
  std::int64_t k;

  __device__ bool refuses(const Values& values, int column) const {
    return columns.refuses(values, column);
  }
  __device__ void write(unsigned row, int column, const Values& values, bool is_bad) const {
    unsigned masks[2] = {0, 0};
    if (!is_bad) columns.find(values, column, masks);
    Tile<T, 4, kAlign> pairs;
    unsigned nibbles = 0;
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const unsigned nibble = nibble_24(masks[g]);
      pairs.at[2 * g] = is_bad ? T{} : pick(values.at + 4 * g, nibble & 3);
      pairs.at[2 * g + 1] = is_bad ? T{} : pick(values.at + 4 * g, nibble >> 2);
      nibbles |= nibble << 4 * g;
    }
    const std::int64_t tile = (row * k + column) / kColumnsPerTile;
    store_tile<T, 4, kAlign>(packed + tile * 4, pairs);
    meta[tile] = static_cast<std::uint8_t>(nibbles);
  }
};

// `columns_of(element, shape)` makes the NonZeros or HighestScores.
template <typename ColumnsOf>
Status pack(const char* op, ConstMatrixView weight, void* values, std::int16_t* meta, bool aligned,
            std::int32_t* bad, cudaStream_t stream, ColumnsOf columns_of) {
  if (Status status = check_matrix(op, "weight", weight); !status.ok()) return status;
  if (Status status = check_packed(op, values, meta, weight.rows, weight.cols); !status.ok()) {
    return status;
  }
  if (Status status = check_grid(op, weight); !status.ok()) return status;
  if (Status status = clear_bad(op, bad, stream); !status.ok()) return status;
  if (weight.rows == 0 || weight.cols == 0) return {};
  return with_element(weight.dtype, [&](auto element) {
    using T = decltype(element);
    const auto start = [&](auto shape, unsigned threads) {
      using Shape = decltype(shape);
      using Columns = decltype(columns_of(element, shape));
      const Pack<T, Shape, Columns> work{columns_of(element, shape), static_cast<T*>(values),
                                         reinterpret_cast<std::uint8_t*>(meta), weight.cols};
      return launch_check_then_write<T, Shape>(op, weight, work, bad, threads, stream);
    };
    if (aligned && has_aligned_tiles(weight) && is_aligned(values)) {
      return with_tiles(weight.cols, start);
    }
    return start(RowShape<kColumnsPerTile, 0, sizeof(T), 1024>(),
                 threads_for(weight.cols / kColumnsPerTile, 4, 1024));
  });
}

}  // namespace

Status pack_24(ConstMatrixView weight, void* values, std::int16_t* meta, std::int32_t* bad,
               cudaStream_t stream) {
  return pack("pack_24", weight, values, meta, true, bad, stream, [](auto element, auto shape) {
    return NonZeros<decltype(element), decltype(shape)>();
  });
}

Status prune_pack_24(ConstMatrixView weight, const float* input_norm, void* values,
                     std::int16_t* meta, std::int32_t* bad, cudaStream_t stream) {
  return pack("prune_pack_24", weight, values, meta, is_aligned(input_norm), bad, stream,
              [=](auto element, auto shape) {
                return HighestScores<decltype(element), decltype(shape)>{input_norm};
              });
}

}  // namespace cuda
}  // namespace wanda_ext
