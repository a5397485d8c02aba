// The CUDA runtime on the host: device memory is host memory, and every call is done when it
// returns.
#pragma once

#include <array>
#include <map>
#include <tuple>

#include "../bitmap_ptx.h"
#include "../mma_sp.h"
#include "../simt.h"

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorLaunchFailure,
  cudaErrorInvalidDeviceFunction,
  cudaErrorNoKernelImageForDevice,
  cudaErrorUnsupportedPtxVersion
};

// --- Devices -------------------------------------------------------------------------------------

namespace simt {

struct Device {
  int major, minor, sms;
};
// The last ones have so few SMs that each works on much of a small problem.
constexpr std::array<Device, 7> kDevices = {
    {{8, 0, 108}, {9, 0, 132}, {7, 5, 40}, {12, 0, 170}, {8, 0, 1}, {8, 0, 3}, {9, 0, 7}}};
inline int device = 0;                         // the current one
inline cudaError_t image_error = cudaSuccess;  // what asking for a kernel's image gives

}  // namespace simt

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = simt::device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  const simt::Device& device = simt::kDevices[static_cast<std::size_t>(index)];
  *value = attribute == cudaDevAttrMultiProcessorCount      ? device.sms
           : attribute == cudaDevAttrComputeCapabilityMajor ? device.major
                                                            : device.minor;
  return cudaSuccess;
}
struct cudaDeviceProp {
  char name[256];
  int major, minor;
};
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  const simt::Device& device = simt::kDevices[static_cast<std::size_t>(index)];
  *properties = {"A device of the tests", device.major, device.minor};
  return cudaSuccess;
}

// --- Kernels -------------------------------------------------------------------------------------

namespace simt {
inline std::map<const void*, std::size_t> granted_shared;  // beyond what needs no asking
inline int overlapping_launches = 0;
}  // namespace simt

struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  const simt::Device& device = simt::kDevices[static_cast<std::size_t>(simt::device)];
  attributes->ptxVersion = device.major * 10 + device.minor;
  return simt::image_error;
}
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  if (simt::image_error != cudaSuccess) return simt::image_error;
  const auto bytes = static_cast<std::size_t>(value);
  if (bytes > simt::kMaxDynamicShared) {
    simt::fail("%zu bytes of dynamic shared memory", bytes);
    return cudaErrorInvalidValue;
  }
  simt::granted_shared[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
union cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (simt::image_error != cudaSuccess) return simt::image_error;
  const auto granted = simt::granted_shared.find(reinterpret_cast<const void*>(kernel));
  const std::size_t most =
      granted != simt::granted_shared.end() ? granted->second : simt::kMaxStaticShared;
  if (std::exchange(simt::machine.failed, false)) simt::pipelines.fill({});  // what it left
  if (config->dynamicSmemBytes > most) {
    simt::fail("%zu bytes of dynamic shared memory, of %zu granted", config->dynamicSmemBytes,
               most);
    return cudaErrorInvalidValue;
  }
  simt::overlapping_launches +=
      config->numAttrs == 1 && config->attrs->val.programmaticStreamSerializationAllowed == 1;
  const std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  const bool done =
      simt::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] {
        std::apply(kernel, copies);
        simt::end_thread();
      });
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

inline cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return simt::machine.message; }
