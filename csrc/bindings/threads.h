// torch's own thread pool as a ParallelFor, so that no second OpenMP runtime is ever started.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "wanda_ext/parallel.h"

namespace wanda_ext::bindings {

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
