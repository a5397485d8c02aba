// torch's own thread pool as a ParallelFor, so that no second OpenMP runtime is ever started.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "wanda_ext/parallel.h"

namespace wanda_ext::bindings {

// More tokens than these on the CPU are multiplied by torch's own dense product, by rows unpacked
// into a workspace of so many bytes.
constexpr std::int64_t kMostOwnTokens = 64;
constexpr std::int64_t kDenseBytes = std::int64_t{4} << 20;

// Inside a parallel region of torch, torch runs every chunk on the calling thread.
inline ParallelFor torch_threads() {
  auto run = [](void*, std::int64_t chunks, ParallelFor::Body body, void* context) {
    auto range = [body, context](std::int64_t begin, std::int64_t end) {
      for (std::int64_t chunk = begin; chunk < end; ++chunk) body(context, chunk);
    };
    torch::stable::parallel_for(0, chunks, /*grain_size=*/1, range);
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run, nullptr};
}

}  // namespace wanda_ext::bindings
