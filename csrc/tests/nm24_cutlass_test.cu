// The metadata orders against CUTLASS itself, for every 16-bit word: sm80 against reorder_meta,
// sm90 against the layout that the sparse collectives of a TileK read. Runs on the host, without a
// device.
#include <cstdio>
#include <vector>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/layout/matrix.h"
#include "cutlass/tensor_ref.h"
#include "cutlass/util/host_reorder.h"
#include "wanda_ext/nm24.h"

namespace wanda_ext {
namespace {

int failures = 0;

void report(const char* what, std::int64_t n, std::int64_t k, std::int64_t mismatches) {
  if (mismatches == 0) return;
  ++failures;
  std::fprintf(stderr, "%s, %lld x %lld: %lld words in another place\n", what,
               static_cast<long long>(n), static_cast<long long>(k),
               static_cast<long long>(mismatches));
}

// What CUTLASS 2.x kernels for sm80 take: 16-bit words of a 16-bit element type.
void test_sm80(int n, int k) {
  using Interleaved = cutlass::layout::ColumnMajorInterleaved<2>;
  const MetaOrder order = MetaOrder::kSm80;
  const int rows = static_cast<int>(padded_rows_24(order, n));
  const int words = static_cast<int>(padded_cols_24(order, k)) / kColumnsPerMeta;
  std::vector<std::uint16_t> canonical(static_cast<std::size_t>(rows * words));
  for (std::size_t i = 0; i < canonical.size(); ++i) canonical[i] = static_cast<std::uint16_t>(i);
  std::vector<std::uint16_t> reordered(canonical.size());
  cutlass::TensorRef<std::uint16_t, cutlass::layout::RowMajor> src(canonical.data(), words);
  cutlass::TensorRef<std::uint16_t, Interleaved> dst(reordered.data(),
                                                     Interleaved::packed({rows, words}));
  cutlass::reorder_meta(dst, src, {rows, 1, words});
  std::int64_t mismatches = 0;
  for (int r = 0; r < rows; ++r) {
    for (int w = 0; w < words; ++w) {
      const auto index = meta_index_24(order, r, w, rows, words * kColumnsPerMeta);
      mismatches += reordered[static_cast<std::size_t>(index)] !=
                    canonical[static_cast<std::size_t>(r * words + w)];
    }
  }
  report("sm80", n, k, mismatches);
}

// What a sparse sm90 GEMM of 128 x 128 x kTileK tiles says of its operands.
template <typename Element, int kTileK>
using SparseConfig = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor,
    8, Element, cutlass::layout::ColumnMajor, 8, float,
    cute::Shape<cute::_128, cute::_128, cute::Int<kTileK>>,
    cute::Shape<cute::_1, cute::_1, cute::_1>, cutlass::gemm::collective::StageCount<2>,
    cutlass::gemm::KernelTmaWarpSpecialized>::CollectiveOp::SparseConfig;

// CUTLASS counts metadata in columns of W: 16 to a word.
template <typename Config>
std::int64_t count_mismatches_sm90(int n, int k) {
  const MetaOrder order = MetaOrder::kSm90;
  const std::int64_t rows = padded_rows_24(order, n);
  const std::int64_t cols = padded_cols_24(order, k);
  const auto meta = Config::fill_layoutE(cute::make_shape(n, 1, k, 1));
  std::int64_t mismatches = cute::size(meta) != rows * cols;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < cols; ++c) {
      const std::int64_t word = meta_index_24(order, r, c / kColumnsPerMeta, rows, cols);
      mismatches += meta(r, c, 0) != word * kColumnsPerMeta + c % kColumnsPerMeta;
    }
  }
  return mismatches;
}

template <typename Element, int kTileK>
void test_sm90(const char* what, int n, int k) {
  using Config = SparseConfig<Element, kTileK>;
  report(what, n, k, count_mismatches_sm90<Config>(n, k));
  const auto values = Config::fill_layoutA(cute::make_shape(n, 1, k, 1));
  std::int64_t mismatches = 0;
  for (std::int64_t r = 0; r < n; ++r) {
    for (std::int64_t c = 0; c < k; ++c) mismatches += values(r, c, 0) != r * k + c;
  }
  report("row-major values", n, k, mismatches);
}

// Why TileK must be at least 128: a smaller tile reads another layout.
void test_small_tile_differs() {
  if (count_mismatches_sm90<SparseConfig<cutlass::bfloat16_t, 64>>(128, 256) != 0) return;
  ++failures;
  std::fprintf(stderr, "sm90, TileK 64: reads the layout of TileK 128 after all\n");
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  for (int n : {8, 32, 64, 96, 128, 200, 320}) {
    for (int k : {16, 32, 64, 128, 144, 256, 384, 640}) {
      test_sm80(n, k);
      test_sm90<cutlass::bfloat16_t, 128>("sm90 bfloat16, TileK 128", n, k);
      test_sm90<cutlass::half_t, 128>("sm90 float16, TileK 128", n, k);
      test_sm90<cutlass::bfloat16_t, 256>("sm90 bfloat16, TileK 256", n, k);
      test_sm90<cutlass::half_t, 256>("sm90 float16, TileK 256", n, k);
    }
  }
  test_small_tile_differs();
  std::printf(failures == 0 ? "ok\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
