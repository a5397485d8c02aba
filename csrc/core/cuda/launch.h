// Starts a kernel on a stream and turns what the CUDA runtime says into a Status.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdio>

#include "wanda_ext/status.h"

namespace wanda_ext {
namespace cuda {

// What this file was compiled for, in nvcc's numbers: 800 is compute capability 8.0.
#if defined(__CUDA_ARCH_LIST__)
constexpr int kBuiltFor[] = {__CUDA_ARCH_LIST__};
#else  // by the host tests' compiler
constexpr int kBuiltFor[] = {800, 900};
#endif

// The current device has no image of a kernel: which device it is, what there is, what to do.
// Static, as is status_of, because files differ in what they were compiled for.
static inline Status no_image(const char* op) {
  cudaDeviceProp device = {};
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess ||
      cudaGetDeviceProperties(&device, index) != cudaSuccess) {
    device = {};
  }
  char built_for[80] = "";
  std::size_t length = 0;
  for (const int arch : kBuiltFor) {
    if (length + 8 > sizeof(built_for)) break;
    length += static_cast<std::size_t>(std::snprintf(built_for + length, sizeof(built_for) - length,
                                                     "%s%d.%d", length == 0 ? "" : ", ", arch / 100,
                                                     arch / 10 % 10));
  }
  return make_error(StatusCode::kUnsupported,
                    "%s: %.50s has compute capability %d.%d, and this build has no kernel for it, "
                    "only for %s; run `WANDA_EXT_CUDA_ARCHS=native pip install -v .` in the source "
                    "tree",
                    op, device.name, device.major, device.minor, built_for);
}

static inline Status status_of(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return {};
  // Of the three the last is PTX that is newer than the driver.
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    return no_image(op);
  }
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
