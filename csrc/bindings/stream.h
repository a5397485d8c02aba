// The CUDA stream that torch is using.
#pragma once

#include <cstdint>

#include "wanda_ext/ops.h"

namespace wanda_ext::bindings {

// Whether the running torch has CUDA, and so a current stream.
bool has_cuda_stream();

// Throws, naming the op, where the running torch has no CUDA.
cudaStream_t current_cuda_stream(const char* op, std::int32_t device_index);

}  // namespace wanda_ext::bindings
