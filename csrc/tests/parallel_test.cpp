// serial() and std_threads(): every chunk once; and how for_each_range cuts.
#include "wanda_ext/parallel.h"

#include <atomic>
#include <memory>

#include "../core/cpu/parallel_chunks.h"
#include "check.h"

namespace wanda_ext {
namespace {

void test_every_chunk_once(const ParallelFor& parallel) {
  for (std::int64_t chunks : {0, 1, 2, 7, 1000}) {
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(chunks) + 1);
    for_each_chunk(parallel, chunks,
                   [&](std::int64_t chunk) { ++calls[static_cast<std::size_t>(chunk)]; });
    int wrong = 0;
    for (std::int64_t i = 0; i < chunks; ++i) wrong += calls[static_cast<std::size_t>(i)] != 1;
    CHECK(wrong == 0);
    CHECK(calls[static_cast<std::size_t>(chunks)] == 0);
  }
}

void test_ranges(const ParallelFor& parallel) {
  for (std::int64_t total : {0, 1, 63, 64, 65, 4096, 4097}) {
    for (std::int64_t grain : {1, 64}) {
      std::vector<int> covered(static_cast<std::size_t>(total));
      std::atomic<std::int64_t> ranges{0};
      std::atomic<int> wrong{0};
      for_each_range(parallel, total, grain,
                     [&](std::int64_t begin, std::int64_t end, std::int64_t range) {
                       ++ranges;
                       wrong += begin % grain != 0 || begin >= end || range >= parallel.threads;
                       for (std::int64_t i = begin; i < end; ++i) {
                         ++covered[static_cast<std::size_t>(i)];
                       }
                     });
      for (int count : covered) wrong += count != 1;
      CHECK(wrong == 0);
      const std::int64_t grains = (total + grain - 1) / grain;
      CHECK(ranges == (grains < parallel.threads ? grains : parallel.threads));
    }
  }
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  CHECK(serial().threads == 1);
  CHECK(std_threads(5).threads == 5);
  CHECK(std_threads(0).threads == 1);
  for (const ParallelFor& parallel : {serial(), std_threads(1), std_threads(3)}) {
    test_every_chunk_once(parallel);
    test_ranges(parallel);
  }
  return testing::finish();
}
