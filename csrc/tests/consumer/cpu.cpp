// An engine without a GPU: prunes a weight to 2:4, packs it and multiplies by it, on threads and in
// memory of its own. Compared with a plain product over the pruned weight.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "random.h"
#include "wanda_ext/ops.h"

using wanda_ext::DType;
using wanda_ext::MatrixView;
using wanda_ext::MetaOrder;
using wanda_ext::Status;

namespace {

void check(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message);
  std::exit(1);
}

// The engine's threads, and how the library borrows them.
class Threads {
 public:
  explicit Threads(int count) : count_(count) {}

  wanda_ext::ParallelFor lend() { return {count_, run, this}; }
  std::int64_t chunks_run() const { return chunks_run_; }

 private:
  static void run(void* self, std::int64_t chunks, wanda_ext::ParallelFor::Body body,
                  void* context) {
    auto& threads = *static_cast<Threads*>(self);
    std::atomic<std::int64_t> next{0};
    const auto work = [&] {
      for (std::int64_t i = next++; i < chunks; i = next++) body(context, i);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads.count_; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    threads.chunks_run_ += chunks;
  }

  int count_;
  std::int64_t chunks_run_ = 0;
};

// A linear without its zeros.
struct Packed {
  std::int64_t n, k;
  std::vector<float> values;       // [n,k/2]
  std::vector<std::int16_t> meta;  // [n,k/16]
};

// Prunes weight [n,k] in place, by the norms [k] of the inputs it meets, and packs it.
Packed prune_and_pack(MatrixView weight, const std::vector<float>& input_norm, Threads& threads) {
  Packed packed = {weight.rows, weight.cols, {}, {}};
  packed.values.resize(static_cast<std::size_t>(packed.n * packed.k / 2));
  packed.meta.resize(static_cast<std::size_t>(packed.n * packed.k / wanda_ext::kColumnsPerMeta));
  std::int32_t bad = -1;  // a row with NaN or infinity
  check(wanda_ext::prune_nm(weight, input_norm.data(), 2, 4, &bad, threads.lend()));
  if (bad < 0) {
    check(
        wanda_ext::pack_24(weight, packed.values.data(), packed.meta.data(), &bad, threads.lend()));
  }
  if (bad >= 0) {
    std::fprintf(stderr, "row %d of the weight holds NaN or infinity\n", bad);
    std::exit(1);
  }
  return packed;
}

// y [m,n] = x [m,k] @ W^T
void multiply(const Packed& packed, MatrixView x, MatrixView y, Threads& threads) {
  const wanda_ext::ParallelFor parallel = threads.lend();
  const std::size_t bytes =
      wanda_ext::linear_24_workspace(x.rows, packed.n, packed.k, parallel.threads);
  void* workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  check(wanda_ext::linear_24(x, packed.values.data(), packed.meta.data(), MetaOrder::kCanonical,
                             nullptr, y, workspace, parallel));
  std::free(workspace);
}

}  // namespace

int main() {
  const std::int64_t n = 96, k = 208;
  Threads threads(2);
  std::vector<float> weight = normal(n * k, 1), input_norm = normal(k, 2);
  for (float& norm : input_norm) norm = std::fabs(norm);
  const Packed packed =
      prune_and_pack({weight.data(), n, k, k, DType::kFloat32}, input_norm, threads);
  double worst = 0;
  for (const std::int64_t m : {1, 5, 40}) {
    std::vector<float> x = normal(m * k, 3), y(static_cast<std::size_t>(m * n), NAN);
    multiply(packed, {x.data(), m, k, k, DType::kFloat32}, {y.data(), m, n, n, DType::kFloat32},
             threads);
    for (std::int64_t t = 0; t < m; ++t) {
      for (std::int64_t row = 0; row < n; ++row) {
        double sum = 0;
        for (std::int64_t c = 0; c < k; ++c) sum += double{x[t * k + c]} * weight[row * k + c];
        const double error = std::fabs(y[t * n + row] - sum);
        worst = error > worst || std::isnan(error) ? error : worst;
      }
    }
  }
  const std::int64_t zeros = std::count(weight.begin(), weight.end(), 0.0f);
  std::printf("%lld of %lld weights are zero, largest error %.2g, %lld chunks on own threads\n",
              static_cast<long long>(zeros), static_cast<long long>(n * k), worst,
              static_cast<long long>(threads.chunks_run()));
  return worst < 1e-4 && zeros == n * k / 2 && threads.chunks_run() > 0 ? 0 : 1;
}
