// The wgmma kernels without a device: what CUTLASS takes, where it looks for the metadata, and when
// the dispatcher chooses them.
#include <cstring>

#include "../core/cuda/sm90/linear_24_wgmma.h"
#include "check.h"

namespace wanda_ext::cuda {
namespace {

Linear24Problem problem_of(std::int64_t m, std::int64_t n, std::int64_t k, const void* bias) {
  static const std::int16_t meta = 0;
  Linear24Problem problem = {};
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.ld_x = k + 8;
  problem.meta = &meta;
  problem.bias = bias;
  problem.device = {90, 132};
  return problem;
}

template <typename Element, typename Tile>
bool takes(std::int64_t m, std::int64_t n, std::int64_t k, const void* bias) {
  using Kernel = typename Wgmma<Element, Tile>::Kernel;
  const auto arguments = Wgmma<Element, Tile>::arguments(problem_of(m, n, k, bias));
  CHECK(Kernel::get_workspace_size(arguments) == 0);
  return Kernel::can_implement(arguments);
}

// Any m, n a multiple of 8, k of 16.
template <typename Element, typename Tile>
void test_shapes() {
  const Element bias[8] = {};
  for (std::int64_t m : {1, 3, 17, 64, 65, 1000}) {
    for (std::int64_t n : {8, 64, 72, 200, 4096}) {
      for (std::int64_t k : {16, 48, 144, 4096}) {
        CHECK((takes<Element, Tile>(m, n, k, nullptr) && takes<Element, Tile>(m, n, k, bias + 1)));
      }
    }
    CHECK((!takes<Element, Tile>(m, 12, 4096, nullptr)));
    CHECK((!takes<Element, Tile>(m, 4096, 24, nullptr)));
  }
}

// CUTLASS counts metadata in columns of W: 16 to a word.
template <typename Element, typename Tile>
void test_layouts() {
  const MetaOrder order = MetaOrder::kSm90;
  for (std::int64_t n : {8, 72, 200, 320}) {
    for (std::int64_t k : {16, 144, 256, 640}) {
      const auto mainloop = Wgmma<Element, Tile>::arguments(problem_of(3, n, k, nullptr)).mainloop;
      const std::int64_t rows = padded_rows_24(order, n), cols = padded_cols_24(order, k);
      CHECK(cute::size(mainloop.layout_e) == rows * cols);
      CHECK((mainloop.dB == cute::make_stride(k + 8, cute::_1{}, std::int64_t{0})));
      std::int64_t elsewhere = 0;
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < cols; ++c) {
          const std::int64_t word = meta_index_24(order, r, c / kColumnsPerMeta, rows, cols);
          elsewhere += mainloop.layout_e(r, c, 0) != word * kColumnsPerMeta + c % kColumnsPerMeta;
          if (r < n && c < k) elsewhere += mainloop.layout_a(r, c, 0) != r * k + c;
        }
      }
      CHECK(elsewhere == 0);
    }
  }
  const std::int64_t many = std::int64_t{1} << 26;
  const auto mainloop = Wgmma<Element, Tile>::arguments(problem_of(1, many, 256, nullptr)).mainloop;
  CHECK(mainloop.layout_e(0, 128, 0) == 128 * many);
}

#if defined(WANDA_EXT_WITH_SM90A)
// --- When the library has them -------------------------------------------------------------------

const char* chosen(Device device, std::int64_t m, std::int64_t n, DType dtype, MetaOrder order) {
  Linear24Choice choice;
  CHECK_OK(linear_24_choose(device, m, n, 4096, dtype, order, &choice));
  CHECK(!choice.tuned);
  return linear_24_kernel_name(choice.kernel);
}

void test_choice() {
  const Device h200 = {90, 132};
  struct {
    std::int64_t m;
    const char* name;
  } const expected[] = {{65, "wgmma_64x64"},    {128, "wgmma_64x64"},     {129, "wgmma_64x128"},
                        {256, "wgmma_64x128"},  {257, "wgmma_128x128"},   {512, "wgmma_128x128"},
                        {513, "wgmma_128x256"}, {100000, "wgmma_128x256"}};
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const auto& [m, name] : expected) {
      CHECK(std::strcmp(chosen(h200, m, 4096, dtype, MetaOrder::kSm90), name) == 0);
      // Not for rows of y off 16 bytes, the other order, or another device.
      for (const char* other : {chosen(h200, m, 4100, dtype, MetaOrder::kSm90),
                                chosen(h200, m, 4096, dtype, MetaOrder::kSm80),
                                chosen({100, 148}, m, 4096, dtype, MetaOrder::kSm90)}) {
        CHECK(std::strstr(other, "wgmma") == nullptr);
      }
    }
    CHECK(std::strstr(chosen(h200, 16, 4096, dtype, MetaOrder::kSm90), "wgmma") == nullptr);
  }
}

#endif

template <typename... Tiles>
void test_all() {
  (..., (test_shapes<cutlass::bfloat16_t, Tiles>(), test_shapes<cutlass::half_t, Tiles>(),
         test_layouts<cutlass::bfloat16_t, Tiles>(), test_layouts<cutlass::half_t, Tiles>()));
#if defined(WANDA_EXT_WITH_SM90A)
  CHECK(kWgmmaKernels.count == sizeof...(Tiles));
  test_choice();
#endif
}

}  // namespace
}  // namespace wanda_ext::cuda

int main() {
  using namespace wanda_ext::cuda;
  test_all<Wgmma64x64, Wgmma64x128, Wgmma128x128, Wgmma128x256, Wgmma256x128c4, Wgmma128x256c4>();
  return wanda_ext::testing::finish();
}
