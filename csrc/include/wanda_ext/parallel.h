// The threads an op may use. The library owns no pool: the caller lends one.
#pragma once

#include <cstdint>

namespace wanda_ext {

// `run(self, chunks, body, context)` calls body(context, i) once for every i in [0, chunks), on any
// threads in any order, and returns when all are done. Bodies never throw. Results never depend on
// `threads`, the number of chunks worth making: every op splits so that no sum crosses a chunk.
struct ParallelFor {
  using Body = void (*)(void* context, std::int64_t chunk);

  int threads;
  void (*run)(void* self, std::int64_t chunks, Body body, void* context);
  void* self;
};

// Everything on the calling thread.
ParallelFor serial();

// For programs without a pool of their own: starts up to `threads` std::threads in each call.
ParallelFor std_threads(int threads);

}  // namespace wanda_ext
