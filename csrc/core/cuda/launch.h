// Starts a kernel on a stream and turns what the CUDA runtime says into a Status.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "wanda_ext/status.h"

namespace wanda_ext {
namespace cuda {

inline Status status_of(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return {};
  return make_error(StatusCode::kCudaError, "%s: CUDA failed: %s", op, cudaGetErrorString(error));
}

// A function call and not <<<>>>, so that the host tests can compile kernels with any C++ compiler.
template <typename... Parameters, typename... Arguments>
Status launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block,
              cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return status_of(op, cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace cuda
}  // namespace wanda_ext
