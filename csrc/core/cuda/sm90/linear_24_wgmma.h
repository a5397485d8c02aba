// linear_24 by CUTLASS 3.x on sm_90a: y^T[n,m] = W[n,k] @ x^T[k,m] with wgmma.mma_async.sp. W is on
// the left, for only the left operand may be sparse; y^T column-major is y row-major.
//
// TMA fetches values, metadata and x into a ring in shared memory, reads zeros beyond a matrix and
// writes nothing there: so any m, n a multiple of 8 and k of 16, which TMA's 16 bytes ask for. The
// CTAs stay and take tile after tile; a tile's sum over k is one CTA's, in order.
//
// Takes most of a minute and 5 GB to compile for each tile.
#pragma once

#include <array>
#include <atomic>
#include <cstring>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "../launch.h"
#include "linear_24_wgmma_tiles.h"

#if !defined(NDEBUG)
#error "compile with -DNDEBUG: around the calls of assert() ptxas serialises wgmma"
#endif

namespace wanda_ext {
namespace cuda {

// Whether CUTLASS's layout of the metadata is MetaOrder::kSm90, for two atoms each way.
template <typename Layouts>
constexpr bool reads_sm90_order() {
  constexpr int kRows = 128, kCols = 256;
  const auto layout = Layouts::fill_layoutE(cute::make_shape(kRows, 1, kCols, 1));
  for (int row = 0; row < kRows; ++row) {
    for (int col = 0; col < kCols; col += kColumnsPerMeta - 1) {  // every word, and not its start
      const std::int64_t word =
          meta_index_24(MetaOrder::kSm90, row, col / kColumnsPerMeta, kRows, kCols);
      if (layout(row, col, 0) != word * kColumnsPerMeta + col % kColumnsPerMeta) return false;
    }
  }
  return true;
}

template <typename Element, typename Tile>
struct Wgmma {
  static constexpr bool kPingpong = Tile::kSchedule == WgmmaSchedule::kPingpong;
  // k of a tile is 128: with 64, CUTLASS would expect another order of the metadata.
  using Shape = cute::Shape<cute::Int<Tile::kN>, cute::Int<Tile::kM>, cute::_128>;
  using Cluster = cute::Shape<cute::Int<Tile::kClusterN>, cute::Int<Tile::kClusterM>, cute::_1>;

  // The sum plus bias, or plus zero where bias is null, rounded once. Bias is read one by one (the
  // last 1), for it may start anywhere.
  using AddBias = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, Element, float,
                                             cutlass::FloatRoundStyle::round_to_nearest>,
      cutlass::epilogue::fusion::Sm90AccFetch,
      cutlass::epilogue::fusion::Sm90ColBroadcast<0, Shape, Element, float,
                                                  cute::Stride<cute::_1, cute::_0, cute::_0>, 1>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Shape, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      cutlass::layout::ColumnMajor, 8, Element, cutlass::layout::ColumnMajor, 8,
      cute::conditional_t<kPingpong, cutlass::epilogue::TmaWarpSpecialized,
                          cutlass::epilogue::TmaWarpSpecializedCooperative>,
      AddBias>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor,
      8, Element, cutlass::layout::ColumnMajor, 8, float, Shape, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cute::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                          cutlass::gemm::KernelTmaWarpSpecializedCooperative>>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Layouts = typename Mainloop::SparseConfig;

  static_assert(reads_sm90_order<Layouts>());
  static_assert(Mainloop::DispatchPolicy::Stages >= 2);
  static_assert(Kernel::SharedStorageSize <= 227 << 10, "more than a CTA of sm_90 may have");

  static typename Kernel::Arguments arguments(const Linear24Problem& problem) {
    const auto shape = cute::make_shape(static_cast<int>(problem.n), static_cast<int>(problem.m),
                                        static_cast<int>(problem.k), 1);
    const auto meta = Layouts::fill_layoutE(shape);
    auto meta_stride = meta.stride();
    // From atom to atom along k: CUTLASS counts in 32 bits, too few for 2^24 rows.
    cute::get<1, 1>(meta_stride) =
        padded_rows_24(MetaOrder::kSm90, problem.n) * typename Layouts::TensorEAtomK();
    typename Kernel::Arguments all;
    all.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    all.problem_shape = shape;
    all.mainloop.ptr_A = static_cast<const Element*>(problem.values);
    all.mainloop.layout_a = Layouts::fill_layoutA(shape);
    all.mainloop.ptr_B = static_cast<const Element*>(problem.x);
    all.mainloop.dB = cute::make_stride(problem.ld_x, cute::_1{}, std::int64_t{0});
    all.mainloop.ptr_E = reinterpret_cast<decltype(all.mainloop.ptr_E)>(problem.meta);
    all.mainloop.layout_e = cute::make_layout(meta.shape(), meta_stride);
    all.epilogue.thread = {{}, {static_cast<const Element*>(problem.bias), Element(0), {}}, {}};
    all.epilogue.ptr_D = static_cast<Element*>(problem.y);
    all.epilogue.dD = cute::make_stride(cute::_1{}, problem.n, std::int64_t{0});
    all.hw_info.sm_count = problem.device.sms;
    return all;
  }
};

template <typename Element, typename Tile>
__global__ void __launch_bounds__(Wgmma<Element, Tile>::Kernel::MaxThreadsPerBlock, 1)
    linear_24_wgmma(const __grid_constant__ typename Wgmma<Element, Tile>::Kernel::Params params) {
  extern __shared__ char ring[];
  typename Wgmma<Element, Tile>::Kernel()(params, ring);
}

// How many of config's clusters run at a time; asked once for each device.
template <typename Element, typename Tile>
Status count_clusters(const cudaLaunchConfig_t& config, int* clusters) {
  static std::array<std::atomic<int>, 64> known = {};
  int index = 0;
  if (cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) {
    return status_of("linear_24", error);
  }
  *clusters = index < 64 ? known[index].load(std::memory_order_relaxed) : 0;
  if (*clusters > 0) return {};
  if (cudaError_t error =
          cudaOccupancyMaxActiveClusters(clusters, linear_24_wgmma<Element, Tile>, &config);
      error != cudaSuccess) {
    return status_of("linear_24", error);
  }
  if (index < 64) known[index].store(*clusters, std::memory_order_relaxed);
  return {};
}

// CUTLASS leaves a tensor map that it could not make zero, and only prints.
template <typename... Copies>
bool are_made(const Copies&... copies) {
  static constexpr cute::TmaDescriptor kZero = {};
  return (... && (std::memcmp(copies.get_tma_descriptor(), &kZero, sizeof(kZero)) != 0));
}

template <typename Element, typename Tile>
Status launch_wgmma(const Linear24Problem& problem, cudaStream_t stream) {
  using Kernel = typename Wgmma<Element, Tile>::Kernel;
  const char* op = "linear_24";
  const auto kernel = linear_24_wgmma<Element, Tile>;
  // A property of the kernel on one device, so set it for whichever is current.
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               Kernel::SharedStorageSize);
      error != cudaSuccess) {
    return status_of(op, error);
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = Tile::kClusterN;
  cluster.val.clusterDim.y = Tile::kClusterM;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(Tile::kClusterN, Tile::kClusterM);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;

  auto arguments = Wgmma<Element, Tile>::arguments(problem);
  // Smaller clusters fill the device, larger ones may not; one that had to wait for the others'
  // end would double the time.
  if constexpr (Tile::kClusterN * Tile::kClusterM > 2) {
    const Status status =
        count_clusters<Element, Tile>(config, &arguments.hw_info.max_active_clusters);
    if (!status.ok()) return status;
  }
  const auto params = Kernel::to_underlying_arguments(arguments, nullptr);
  if (!are_made(params.mainloop.tma_load_a, params.mainloop.tma_load_e, params.mainloop.tma_load_b,
                params.epilogue.tma_store_d)) {
    return make_error(StatusCode::kCudaError,
                      "%s: the CUDA driver made no tensor map for m %lld, n %lld, k %lld; it must "
                      "be of CUDA 12.2 or newer",
                      op, static_cast<long long>(problem.m), static_cast<long long>(problem.n),
                      static_cast<long long>(problem.k));
  }
  config.gridDim = Kernel::get_grid_shape(params);
  return status_of(op, cudaLaunchKernelEx(&config, kernel, params));
}

template <typename Tile>
Status run_wgmma(const Linear24Problem& problem, int /*splits*/, void* /*workspace*/,
                 cudaStream_t stream) {
  return problem.dtype == DType::kBFloat16
             ? launch_wgmma<cutlass::bfloat16_t, Tile>(problem, stream)
             : launch_wgmma<cutlass::half_t, Tile>(problem, stream);
}

}  // namespace cuda
}  // namespace wanda_ext
