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

struct LaunchConfig {
  dim3 grid, block;
  cudaStream_t stream = nullptr;
  std::size_t shared_bytes = 0;  // dynamic
  // Starts beside the end of the kernel before it, which it awaits by itself (mma_sp.h). On devices
  // that cannot, and from code compiled for them, a plain launch.
  bool overlaps = false;
};

// A function call and not <<<>>>, so that the host tests can compile kernels with any C++ compiler.
template <typename... Parameters, typename... Arguments>
Status launch(const char* op, void (*kernel)(Parameters...), const LaunchConfig& launch_config,
              Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = launch_config.grid;
  config.blockDim = launch_config.block;
  config.dynamicSmemBytes = launch_config.shared_bytes;
  config.stream = launch_config.stream;
  constexpr std::size_t kGranted = 48 << 10;  // what a kernel may use without asking its device
  if (launch_config.shared_bytes > kGranted) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(launch_config.shared_bytes));
    if (error != cudaSuccess) return status_of(op, error);
  }
  cudaLaunchAttribute overlap = {};
  if (launch_config.overlaps) {
    cudaFuncAttributes attributes = {};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return status_of(op, error);
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = attributes.ptxVersion >= 90 ? 1 : 0;
  }
  return status_of(op, cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <typename... Parameters, typename... Arguments>
Status launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block,
              cudaStream_t stream, Arguments... arguments) {
  LaunchConfig config;
  config.grid = grid;
  config.block = block;
  config.stream = stream;
  return launch(op, kernel, config, arguments...);
}

}  // namespace cuda
}  // namespace wanda_ext
