// The CUDA runtime on the host: device memory is host memory, and every call is done when it
// returns.
#pragma once

#include <array>
#include <chrono>
#include <cmath>
#include <cstdlib>
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
  int major, minor, multiProcessorCount;
};
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  const simt::Device& device = simt::kDevices[static_cast<std::size_t>(index)];
  *properties = {"the host", device.major, device.minor, device.sms};
  return cudaSuccess;
}

// --- Kernels -------------------------------------------------------------------------------------

namespace simt {
inline std::map<const void*, std::size_t> granted_shared;  // beyond what needs no asking
inline int overlapping_launches = 0;

// Of a program that is to meet a wrong kernel: the launch of this number, from 1, does nothing.
inline bool is_skipped() {
  static const char* skipped = std::getenv("SIMT_SKIPPED_LAUNCH");
  static long launches = 0;
  return skipped != nullptr && ++launches == std::atol(skipped);
}
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
  if (simt::is_skipped()) return cudaSuccess;
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

// --- Memory, streams, events, graphs: of the benchmarks ------------------------------------------

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };

template <typename T>
cudaError_t cudaMalloc(T** data, std::size_t bytes) {
  *data = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  std::memset(*data, 0xff, bytes);  // NaN
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* data) {
  std::free(data);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* data, int value, std::size_t bytes) {
  return cudaMemsetAsync(data, value, bytes, nullptr);
}
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes,
                                   cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaMemcpy2D(void* to, std::size_t to_pitch, const void* from,
                                std::size_t from_pitch, std::size_t width, std::size_t height,
                                cudaMemcpyKind) {
  for (std::size_t row = 0; row < height; ++row) {
    std::memcpy(static_cast<char*>(to) + row * to_pitch,
                static_cast<const char*>(from) + row * from_pitch, width);
  }
  return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

constexpr unsigned cudaStreamNonBlocking = 1;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
typedef void* cudaGraph_t;  // what a stream captures has run already, and does not run again
typedef void* cudaGraphExec_t;
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = &simt::machine;
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, int) {
  *executable = graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

typedef std::chrono::steady_clock::time_point* cudaEvent_t;
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new std::chrono::steady_clock::time_point;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *event = std::chrono::steady_clock::now();
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  *ms = std::chrono::duration<float, std::milli>(*end - *start).count();
  return cudaSuccess;
}

inline long long clock64() {
  static long long cycles = 0;
  return cycles += 100000;
}
inline float cospif(float x) { return std::cos(3.14159265f * x); }
