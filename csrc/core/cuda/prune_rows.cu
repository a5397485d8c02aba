// prune_rows on the device: zeroes the n_prune lowest scores of each row of weight [n,k] in place.
//
// A CTA takes a row. Its 8-column tiles stay in registers up to k = 32768; longer rows, and rows
// that do not lie on 16 bytes, are read again from the L2 cache for every pass. Scores are computed
// anew each time, which is cheaper than to hold them.
//
// A weight's place is its score's 31 bits followed by its column's 17: no two are equal, and in
// their order ties fall to the lower column. The n_prune-th lowest place is found digit by digit,
// from the highest down: count the digits of the row's places that share those found so far, and
// see in which one the wanted place lies. Counts are integers, so the order of the atomics does not
// show. The search ends as soon as the whole of a digit is to be pruned: after two digits on usual
// weights, after five at most.
//
// Memory: 2 bytes read and 2 written a weight of a 16-bit type; the norms come from the L1 cache.
#include <cstdint>

#include "core/check_args.h"
#include "row.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace cuda {
namespace {

constexpr int kLevels = 5;
constexpr int kMaxBins = 2048;
constexpr int kBinsPerChunk = 2 * kWarp;

// Prunes the scores below `key`, and of those equal to it the columns below `column`.
struct Cut {
  unsigned key;
  unsigned column;
};

// The counts of one level, by turns, and their sums over chunks of bins.
struct Counts {
  unsigned even_bins[kMaxBins];
  unsigned odd_bins[kMaxBins / 2];
  unsigned chunks[kWarp];

  template <int kLevel>
  __device__ unsigned* bins() {
    return kLevel % 2 == 0 ? even_bins : odd_bins;
  }
};

// The digits of a place, high to low: three of the key, then two of the column.
template <int kLevel>
struct Digit {
  static constexpr bool kOfKey = kLevel < 3;
  static constexpr int kShift = kLevel == 0 ? 20 : kLevel == 1 ? 10 : kLevel == 3 ? 11 : 0;
  static constexpr int kBits = kLevel == 0 || kLevel == 4 ? 11 : kLevel == 3 ? 6 : 10;
  static constexpr int kBins = 1 << kBits;

  __device__ static unsigned of(unsigned key, unsigned column) {
    return (kOfKey ? key : column) >> kShift & (kBins - 1);
  }
  // Whether the digits above this one are those of `prefix`.
  __device__ static bool follows(const Cut& prefix, unsigned key, unsigned column) {
    if constexpr (kLevel == 0) return true;
    if constexpr (kOfKey) return (key ^ prefix.key) >> (kShift + kBits) == 0;
    return key == prefix.key && (column ^ prefix.column) >> (kShift + kBits) == 0;
  }
  __device__ static Cut append(Cut prefix, unsigned digit) {
    (kOfKey ? prefix.key : prefix.column) += digit << kShift;
    return prefix;
  }
};

template <int kLevel>
__device__ void clear_bins(Counts& counts) {
  unsigned* bins = counts.bins<kLevel>();
  for (unsigned i = threadIdx.x; i < Digit<kLevel>::kBins; i += blockDim.x) bins[i] = 0;
}

__device__ unsigned sum_of_lanes_to(unsigned lane, unsigned value) {
#pragma unroll
  for (unsigned by = 1; by < kWarp; by *= 2) {
    const unsigned lower = __shfl_up_sync(~0u, value, by);
    if (lane >= by) value += lower;
  }
  return value;
}

struct Bin {
  unsigned digit;
  unsigned count;
  unsigned below;  // in the bins before it
};

// The bin that holds the wanted-th lowest of all that was counted (from 1), known to every thread.
// Every warp ends the search for itself, so that no barrier is needed to tell the others.
template <int kLevel>
__device__ Bin find_bin(Counts& counts, unsigned wanted) {
  constexpr unsigned kChunks = Digit<kLevel>::kBins / kBinsPerChunk;
  const unsigned* bins = counts.bins<kLevel>();
  const unsigned lane = threadIdx.x % kWarp;
  for (unsigned c = threadIdx.x / kWarp; c < kChunks; c += blockDim.x / kWarp) {
    const unsigned* pair = bins + c * kBinsPerChunk + 2 * lane;
    const unsigned sum = __reduce_add_sync(~0u, pair[0] + pair[1]);
    if (lane == 0) counts.chunks[c] = sum;
  }
  if constexpr (kLevel + 1 < kLevels) clear_bins<kLevel + 1>(counts);
  __syncthreads();

  const unsigned of_chunk = lane < kChunks ? counts.chunks[lane] : 0;
  const unsigned to_chunk = sum_of_lanes_to(lane, of_chunk);
  const int chunk = __ffs(__ballot_sync(~0u, to_chunk >= wanted)) - 1;
  const unsigned below_chunk = __shfl_sync(~0u, to_chunk - of_chunk, chunk);

  const unsigned* pair = bins + chunk * kBinsPerChunk + 2 * lane;
  const unsigned of_pair = pair[0] + pair[1];
  const unsigned to_pair = below_chunk + sum_of_lanes_to(lane, of_pair);
  const int hit = __ffs(__ballot_sync(~0u, to_pair >= wanted)) - 1;
  const unsigned below = __shfl_sync(~0u, to_pair - of_pair, hit);
  const unsigned first = bins[chunk * kBinsPerChunk + 2 * hit];
  const unsigned second = bins[chunk * kBinsPerChunk + 2 * hit + 1];
  const unsigned digit = static_cast<unsigned>(chunk * kBinsPerChunk + 2 * hit);
  return below + first >= wanted ? Bin{digit, first, below} : Bin{digit + 1, second, below + first};
}

// The cut that leaves `wanted` of the places that begin with `prefix` below it. This level's bins
// are filled, but not yet seen by the other threads, on level 0 alone.
template <int kLevel, typename Tiles, typename KeysOf>
__device__ Cut find_cut(Counts& counts, Tiles& row, KeysOf keys_of, Cut prefix, unsigned wanted) {
  using Level = Digit<kLevel>;
  if constexpr (kLevel > 0) {
    unsigned* bins = counts.bins<kLevel>();
    keys_of(row, [&](unsigned key, unsigned column) {
      if (Level::follows(prefix, key, column)) atomicAdd(&bins[Level::of(key, column)], 1u);
    });
    __syncthreads();
  }
  const Bin bin = find_bin<kLevel>(counts, wanted);
  wanted -= bin.below;
  if constexpr (kLevel + 1 < kLevels) {
    if (bin.count != wanted) {
      return find_cut<kLevel + 1>(counts, row, keys_of, Level::append(prefix, bin.digit), wanted);
    }
  }
  return Level::append(prefix, bin.digit + 1);
}

// Grid: n.
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    prune_one_row(T* weight, std::int64_t ld, int k, const float* __restrict__ input_norm,
                  unsigned n_prune, std::int32_t* bad) {
  using Tiles = Row<T, Shape>;
  Counts& counts = block_shared<Counts>();
  T* const out = weight + static_cast<std::int64_t>(blockIdx.x) * ld;
  Tiles row(out, k);
  clear_bins<0>(counts);
  __syncthreads();

  const auto keys_of = [&](Tiles& tiles, auto&& visit) {
    tiles.for_each([&](const typename Tiles::Values& values, int column) {
      const auto norms = norms_at<Shape>(input_norm, column);
#pragma unroll
      for (int i = 0; i < Shape::kVec; ++i) {
        visit(score_key(values.at[i], norms.at[i]), static_cast<unsigned>(column + i));
      }
    });
  };
  bool finite = true;
  keys_of(row, [&](unsigned key, unsigned column) {
    finite = finite && key < kNonFiniteKey;
    atomicAdd(&counts.bins<0>()[Digit<0>::of(key, column)], 1u);
  });
  if (__syncthreads_or(!finite)) return report_bad(bad, blockIdx.x);

  const Cut cut = n_prune == 0 ? Cut{0, 0} : find_cut<0>(counts, row, keys_of, Cut{0, 0}, n_prune);
  row.for_each([&](const typename Tiles::Values& values, int column) {
    const auto norms = norms_at<Shape>(input_norm, column);
    typename Tiles::Values kept;
#pragma unroll
    for (int i = 0; i < Shape::kVec; ++i) {
      const unsigned key = score_key(values.at[i], norms.at[i]);
      const bool tie_is_kept = static_cast<unsigned>(column + i) >= cut.column;
      kept.at[i] = kept_or_zero(values.at[i], key + tie_is_kept > cut.key);
    }
    store_tile<T, Shape::kVec, Shape::kAlign>(out + column, kept);
  });
}

}  // namespace

Status prune_rows(MatrixView weight, const float* input_norm, std::int64_t n_prune,
                  std::int32_t* bad, cudaStream_t stream) {
  const char* op = "prune_rows";
  if (Status status = check_prune_rows(weight, n_prune); !status.ok()) return status;
  if (Status status = check_grid(op, weight); !status.ok()) return status;
  if (Status status = clear_bad(op, bad, stream); !status.ok()) return status;
  if (weight.rows == 0 || weight.cols == 0) return {};
  return with_element(weight.dtype, [&](auto element) {
    using T = decltype(element);
    const auto start = [&](auto shape, unsigned threads) {
      return launch(op, prune_one_row<T, decltype(shape)>, dim3(static_cast<unsigned>(weight.rows)),
                    dim3(threads), stream, static_cast<T*>(weight.data), weight.ld,
                    static_cast<int>(weight.cols), input_norm, static_cast<unsigned>(n_prune), bad);
    };
    if (has_aligned_tiles(weight) && is_aligned(input_norm)) return with_tiles(weight.cols, start);
    return start(RowShape<1, 0, sizeof(T), 1024>(), threads_for(weight.cols, 4, 1024));
  });
}

}  // namespace cuda
}  // namespace wanda_ext
