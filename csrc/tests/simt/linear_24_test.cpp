// The mma.sp kernels of linear_24, run on the host, against a sum in double of the kept columns.
#include "core/cuda/linear_24.cu"

#include "../check.h"
#include "core/cuda/linear_24_mma.cu"

namespace wanda_ext {
namespace {

using testing::Matrix;
using testing::Random;

constexpr MetaOrder kOrders[] = {MetaOrder::kSm80, MetaOrder::kSm90};
constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16};

// x and a packed weight; what lies between the rows of x is NaN.
struct Problem {
  std::int64_t m, n, k;
  Matrix x, values, bias;
  std::vector<std::int16_t> meta;  // canonical

  Problem(Random& random, DType dtype, std::int64_t m, std::int64_t n, std::int64_t k,
          std::int64_t gap = 0)
      : m(m), n(n), k(k), x(dtype, m, k, k + gap), values(dtype, n, k / 2), bias(dtype, 1, n) {
    if (m * k > 0) std::memset(x.view().data, 0xff, static_cast<std::size_t>(m * (k + gap)) * 2);
    x.fill(random);
    values.fill(random);
    bias.fill(random);
    for (std::int64_t i = 0; i < n * k / kColumnsPerMeta; ++i) {
      unsigned word = 0;
      for (int group = 0; group < 4; ++group) {
        constexpr unsigned kNibbles[] = {0x4, 0x8, 0x9, 0xc, 0xd, 0xe};
        word |= kNibbles[random.below(6)] << 4 * group;
      }
      meta.push_back(static_cast<std::int16_t>(word));
    }
  }

  // Of kept element j of row r.
  std::int64_t column(std::int64_t r, std::int64_t j) const {
    const auto word =
        static_cast<std::uint16_t>(meta[static_cast<std::size_t>((r * k + 2 * j) / 16)]);
    return j / 2 * 4 + (word >> j % 8 * 2 & 3);
  }

  std::vector<std::int16_t> meta_in(MetaOrder order) const {
    std::vector<std::int16_t> words(static_cast<std::size_t>(
        padded_rows_24(order, n) * padded_cols_24(order, k) / kColumnsPerMeta));
    CHECK_OK(
        order_meta_24(meta.data(), MetaOrder::kCanonical, words.data(), order, n, k, serial()));
    return words;
  }
};

// All NaN, so that nothing is read before it is written.
std::vector<std::uint64_t> workspace_of(const cuda::Linear24Choice& choice, const Problem& p) {
  const std::size_t bytes = cuda::linear_24_workspace(choice, p.m, p.n, p.k);
  CHECK(bytes % 16 == 0);
  return std::vector<std::uint64_t>(bytes / 8, ~std::uint64_t{0});
}

Matrix linear(Problem& p, MetaOrder order, bool with_bias, cuda::Linear24Choice choice) {
  Matrix y(p.x.dtype(), p.m, p.n);
  const std::vector<std::int16_t> meta = p.meta_in(order);
  auto workspace = workspace_of(choice, p);
  CHECK_OK(cuda::linear_24(p.x.view(), p.values.view().data, meta.data(), order,
                           with_bias ? p.bias.view().data : nullptr, y.view(), choice,
                           workspace.data(), nullptr));
  return y;
}

// Within what fp32 sums in any order and one rounding may lose.
bool is_close(const Problem& p, bool with_bias, const Matrix& y) {
  const double unit = y.dtype() == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
  for (std::int64_t t = 0; t < p.m; ++t) {
    for (std::int64_t r = 0; r < p.n; ++r) {
      double sum = with_bias ? p.bias.get(0, r) : 0;
      double size = std::fabs(sum);
      for (std::int64_t j = 0; j < p.k / 2; ++j) {
        const double product = double{p.values.get(r, j)} * p.x.get(t, p.column(r, j));
        sum += product;
        size += std::fabs(product);
      }
      const double error = std::fabs(y.get(t, r) - sum);
      const double allowed = unit * std::fabs(sum) + size * double(p.k) * 0x1p-24;
      if (!(error <= allowed)) {
        std::fprintf(stderr, "  m %lld n %lld k %lld: y[%lld, %lld] is %g, not %g\n",
                     static_cast<long long>(p.m), static_cast<long long>(p.n),
                     static_cast<long long>(p.k), static_cast<long long>(t),
                     static_cast<long long>(r), y.get(t, r), sum);
        return false;
      }
    }
  }
  return true;
}

void check_close(const Problem& p, MetaOrder order, bool with_bias, cuda::Linear24Choice choice,
                 const Matrix& y) {
  if (CHECK(is_close(p, with_bias, y))) return;
  std::fprintf(stderr, "  %s, %d splits, order %d\n", cuda::linear_24_kernel_name(choice.kernel),
               choice.splits, static_cast<int>(order));
}

// The tile of a CTA, as the kernel's name says.
struct Tile {
  int rows = 0, tokens = 0;
};
Tile tile_of(int kernel) {
  Tile tile;
  const char* name = cuda::linear_24_kernel_name(kernel);
  CHECK(std::sscanf(name, "mma_sp_%dx%d", &tile.rows, &tile.tokens) == 2);
  return tile;
}

// What ldmatrix reads at once, a chunk of 8 rows, lies in 8 different places of 128 bytes; and
// every chunk has a place of its own.
template <int kChunks>
void test_swizzled() {
  std::vector<int> found(16 * kChunks);
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    for (int row = 0; row < 16; row += 8) {
      int places = 0;
      for (int r = row; r < row + 8; ++r) {
        const int at = cuda::swizzled<kChunks>(r, chunk);
        places |= 1 << at % 128 / 16;
        CHECK(at % 16 == 0 && at / 16 < 16 * kChunks && found[std::size_t(at / 16)]++ == 0);
      }
      CHECK(places == 255);
    }
  }
}

// Shapes around the tile and the ring; fewer of the large tiles, which take longer.
void test_random(Random& random, int kernel) {
  const Tile tile = tile_of(kernel);
  for (int i = 0; i < 8 + 192 / tile.tokens; ++i) {
    simt::reverse_order = i % 2 == 1;
    const DType dtype = kDTypes[i / 2 % 2];
    const MetaOrder order = kOrders[i / 4 % 2];
    const bool with_bias = random.below(2) == 0;
    const std::int64_t m = 1 + random.below(random.below(3) == 0 ? 2 * tile.tokens : tile.tokens);
    const std::int64_t n = 1 + random.below(random.below(3) == 0 ? 2 * tile.rows : tile.rows);
    const std::int64_t k = 16 * (1 + random.below(random.below(4) == 0 ? 120 : 24));
    const int splits = random.below(2) == 0 ? 1 : 2 + static_cast<int>(random.below(4));
    Problem problem(random, dtype, m, n, k, 8 * random.below(3));
    const cuda::Linear24Choice choice = {kernel, splits, false};
    check_close(problem, order, with_bias, choice, linear(problem, order, with_bias, choice));
  }
}

// Every m that a tile, a warp or an instruction may end at, with the kernel that runs by default.
void test_tokens(Random& random) {
  for (const std::int64_t m : {0, 1, 2, 3, 5, 8, 9, 16, 17, 31, 33, 64, 65, 127, 129, 300}) {
    simt::reverse_order = !simt::reverse_order;
    Problem problem(random, kDTypes[m % 2], m, 133, 176, 8);
    const MetaOrder order = kOrders[m / 2 % 2];
    cuda::Linear24Choice choice;
    CHECK_OK(cuda::linear_24_choose({90, 132}, m, problem.n, problem.k, problem.x.dtype(), order,
                                    &choice));
    CHECK(m <= tile_of(choice.kernel).tokens || m > 64);
    check_close(problem, order, true, choice, linear(problem, order, true, choice));
  }
}

// More tiles of tokens than run together, and rows that end in the middle of the metadata's
// padding.
void test_many_tiles(Random& random) {
  for (const std::int64_t n : {1, 15, 16, 33, 47, 65, 96, 97}) {
    simt::reverse_order = !simt::reverse_order;
    Problem problem(random, kDTypes[n % 2], 8 * 17 + 3, n, 48);
    for (const MetaOrder order : kOrders) {
      check_close(problem, order, false, {0, 2, false},
                  linear(problem, order, false, {0, 2, false}));
    }
  }
}

// Also more splits than there are tiles of k. The same bits in any order of the threads.
void test_splits(Random& random) {
  for (int kernel = 0; kernel < cuda::linear_24_kernels(); ++kernel) {
    Problem problem(random, kDTypes[kernel % 2], 3, 41, 64 * 10 + 16);
    for (const int splits : {2, 13}) {
      const MetaOrder order = kOrders[splits % 2];
      const cuda::Linear24Choice choice = {kernel, splits, false};
      simt::reverse_order = false;
      const Matrix y = linear(problem, order, true, choice);
      check_close(problem, order, true, choice, y);
      simt::reverse_order = true;
      CHECK(linear(problem, order, true, choice) == y);
    }
  }
}

// The second kernel of a split call starts early where the device, and so its code, can wait.
void test_overlap(Random& random) {
  Problem problem(random, DType::kBFloat16, 1, 8, 512);
  for (const int device : {0, 1}) {  // sm_80, sm_90
    simt::device = device;
    simt::overlapping_launches = 0;
    for (const int splits : {1, 2}) linear(problem, MetaOrder::kSm80, true, {0, splits, false});
    CHECK(simt::overlapping_launches == device);
  }
  simt::device = 0;
}

// The splits are the fewest that give 7 of 8 SMs a CTA, and never more than tiles of k.
void test_default_splits() {
  const auto splits = [](std::int64_t m, std::int64_t n, std::int64_t k, int sms) {
    cuda::Linear24Choice choice;
    CHECK_OK(
        cuda::linear_24_choose({90, sms}, m, n, k, DType::kBFloat16, MetaOrder::kSm90, &choice));
    return choice.splits;
  };
  CHECK(splits(1, 4096, 4096, 132) == 1);     // 128 tiles of 32 rows
  CHECK(splits(1, 1024, 4096, 132) == 4);     // 32
  CHECK(splits(16, 4096, 4096, 132) == 4);    // 32 of 128 rows
  CHECK(splits(16, 4096, 4096, 108) == 3);    //
  CHECK(splits(16, 28672, 4096, 132) == 1);   // 224
  CHECK(splits(128, 4096, 4096, 108) == 3);   // 32 of 128 rows x 128 tokens
  CHECK(splits(2048, 4096, 4096, 108) == 1);  // 512
  CHECK(splits(1, 32, 8192, 132) == 32);      // as many as there may be
  CHECK(splits(1, 32, 16, 132) == 1);         // one tile of k
}

// NaN reaches exactly the rows that keep its column, and no other token.
void test_pruned_columns(Random& random) {
  for (int kernel = 0; kernel < cuda::linear_24_kernels(); ++kernel) {
    Problem problem(random, kDTypes[kernel % 2], 4, 70, 336);
    for (const std::int64_t column : {0, 21, 127, 335}) {
      Problem with_nan = problem;
      with_nan.x.set(2, column, column == 21 ? INFINITY : NAN);
      const Matrix y = linear(with_nan, kOrders[column % 2], false, {kernel, 1, false});
      std::int64_t reached = 0;
      for (std::int64_t r = 0; r < problem.n; ++r) {
        bool kept = false;
        for (std::int64_t j = 0; j < problem.k / 2; ++j) kept |= problem.column(r, j) == column;
        CHECK(std::isfinite(y.get(2, r)) == !kept);
        CHECK(std::isfinite(y.get(1, r)) && std::isfinite(y.get(3, r)));
        reached += kept;
      }
      CHECK(reached > 0 && reached < problem.n);
    }
  }
}

void test_no_columns(Random& random) {
  for (const DType dtype : kDTypes) {
    Problem problem(random, dtype, 5, 43, 0);
    const Matrix y = linear(problem, MetaOrder::kSm80, true, {3, 2, false});
    const Matrix zeros = linear(problem, MetaOrder::kSm90, false, {});
    for (std::int64_t t = 0; t < problem.m; ++t) {
      for (std::int64_t r = 0; r < problem.n; ++r) {
        CHECK(y.get(t, r) == problem.bias.get(0, r) && zeros.get(t, r) == 0);
      }
    }
  }
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  Random random(24);
  test_swizzled<4>();
  test_swizzled<8>();
  test_swizzled<16>();
  test_swizzled<32>();
  for (int kernel = 0; kernel < cuda::linear_24_kernels(); ++kernel) test_random(random, kernel);
  test_tokens(random);
  test_many_tiles(random);
  test_splits(random);
  test_overlap(random);
  test_default_splits();
  test_pruned_columns(random);
  test_no_columns(random);
  return testing::finish();
}
