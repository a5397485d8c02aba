// ParallelFor for C++ callables, and the even split of rows or columns over its threads.
#pragma once

#include <cstdint>

#include "wanda_ext/parallel.h"

namespace wanda_ext {

// Calls body(chunk) for every chunk in [0, chunks).
template <typename Body>
void for_each_chunk(const ParallelFor& parallel, std::int64_t chunks, const Body& body) {
  if (chunks == 0) return;
  const auto call = [](void* context, std::int64_t chunk) {
    (*static_cast<const Body*>(context))(chunk);
  };
  parallel.run(parallel.self, chunks, call, const_cast<Body*>(&body));
}

// Cuts [0, total) into at most parallel.threads ranges of near-equal size, at multiples of `grain`,
// and calls body(begin, end, range) for each; `range` counts from 0.
template <typename Body>
void for_each_range(const ParallelFor& parallel, std::int64_t total, std::int64_t grain,
                    const Body& body) {
  const std::int64_t grains = (total + grain - 1) / grain;
  const std::int64_t threads = parallel.threads < 1 ? 1 : parallel.threads;
  const std::int64_t ranges = grains < threads ? grains : threads;
  for_each_chunk(parallel, ranges, [&](std::int64_t range) {
    const std::int64_t begin = grains * range / ranges * grain;
    const std::int64_t end = grains * (range + 1) / ranges * grain;
    body(begin, end < total ? end : total, range);
  });
}

}  // namespace wanda_ext
