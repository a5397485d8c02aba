// What the C++ benchmarks share: device memory, random numbers, and the timing of CUDA graphs.
//
// An entrant is a graph of many calls, each on the next copy of its data; together the copies are
// several times an L2 cache, so that every call reads from memory. Entrants are replayed by turns,
// so that a slow moment of the device hits them all.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "wanda_ext/status.h"

namespace bench {

// Exit statuses: a CUDA call or a check failed; the command line is wrong or there is no device.
constexpr int kFailed = 1, kNotRun = 2;

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA failed: %s\n", cudaGetErrorString(error));
  std::exit(kFailed);
}

inline void check(const wanda_ext::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message);
  std::exit(kFailed);
}

inline cudaDeviceProp device_or_exit() {
  int count = 0;
  cudaDeviceProp device = {};
  if (cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    std::fprintf(stderr, "this benchmark needs a CUDA device, and there is none (%s)\n",
                 error != cudaSuccess ? cudaGetErrorString(error) : "the driver knows of 0");
    std::exit(kNotRun);
  }
  check(cudaGetDeviceProperties(&device, 0));
  return device;
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t count) : bytes_(count * sizeof(T)) {
    check(cudaMalloc(&data_, std::max<std::size_t>(bytes_, 16)));
  }
  ~DeviceArray() { check(cudaFree(data_)); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return static_cast<T*>(data_); }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_;
  void* data_ = nullptr;
};

// --- Random numbers ------------------------------------------------------------------------------

__device__ inline unsigned hash(unsigned bits) {
  bits = (bits ^ (bits >> 16)) * 0x7feb352du;
  bits = (bits ^ (bits >> 15)) * 0x846ca68bu;
  return bits ^ (bits >> 16);
}

// Normal, by Box and Muller.
template <typename T>
__global__ void fill_normal_kernel(T* data, std::size_t count, unsigned seed, bool absolute) {
  for (std::size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    const unsigned first = hash(static_cast<unsigned>(2 * i) ^ hash(seed));
    const unsigned second = hash(static_cast<unsigned>(2 * i + 1) ^ hash(seed));
    const float radius = sqrtf(-2 * logf((static_cast<float>(first >> 8) + 0.5f) * 0x1p-24f));
    const float value = radius * cospif(static_cast<float>(second >> 8) * 0x1p-23f);
    data[i] = static_cast<T>(absolute ? fabsf(value) : value);
  }
}

template <typename T>
void fill_normal(T* data, std::size_t count, unsigned seed, bool absolute = false) {
  fill_normal_kernel<<<1024, 256>>>(data, count, seed, absolute);
  check(cudaGetLastError());
}

// --- Timing --------------------------------------------------------------------------------------

constexpr std::size_t kRotatedBytes = std::size_t{256} << 20;
constexpr std::size_t kLeastCalls = 20;  // of a graph
constexpr long long kBusyCycles = 200000;

// About 0.1 ms in which the device is busy, so that it does not wait for the launch of what is
// timed.
__global__ void keep_busy() {
  const long long start = clock64();
  while (clock64() - start < kBusyCycles) {
  }
}

// Copies of `bytes` each that rotate.
inline std::size_t copies_of(std::size_t bytes) {
  return std::max<std::size_t>(2, (kRotatedBytes + bytes - 1) / bytes);
}

struct Timing {
  double median_us, p10_us, p90_us;  // of one call
};

class Stream {
 public:
  Stream() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    check(cudaEventCreate(&start_));
    check(cudaEventCreate(&end_));
  }
  ~Stream() {
    check(cudaEventDestroy(end_));
    check(cudaEventDestroy(start_));
    check(cudaStreamDestroy(stream_));
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  operator cudaStream_t() const { return stream_; }  // NOLINT: it is one

  double milliseconds(cudaGraphExec_t graph) const {
    float ms = 0;
    keep_busy<<<1, 1, 0, stream_>>>();
    check(cudaGetLastError());
    check(cudaEventRecord(start_, stream_));
    check(cudaGraphLaunch(graph, stream_));
    check(cudaEventRecord(end_, stream_));
    check(cudaEventSynchronize(end_));
    check(cudaEventElapsedTime(&ms, start_, end_));
    return ms;
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t start_, end_;
};

using Call = std::function<void(std::size_t)>;  // works on copy i, on the stream that is timed

inline cudaGraphExec_t capture(const Stream& stream, std::size_t copies, std::size_t calls,
                               const Call& call) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  call(0);  // what is loaded at the first call must not fall into the capture
  check(cudaStreamSynchronize(stream));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (std::size_t i = 0; i < calls; ++i) call(i % copies);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  check(cudaGraphDestroy(graph));
  return executable;
}

inline Timing timing_of(std::vector<double> us) {
  std::sort(us.begin(), us.end());
  const auto at = [&](double fraction) {
    return us[static_cast<std::size_t>(fraction * static_cast<double>(us.size() - 1) + 0.5)];
  };
  return {at(0.5), at(0.1), at(0.9)};
}

// Microseconds of one call of each entrant, from `rounds` replays of its graph.
inline std::vector<Timing> time_by_turns(const Stream& stream, const std::vector<Call>& entrants,
                                         std::size_t copies, int rounds) {
  const std::size_t calls = std::max(copies, kLeastCalls);
  std::vector<cudaGraphExec_t> graphs;
  for (const Call& entrant : entrants) {
    graphs.push_back(capture(stream, copies, calls, entrant));
    stream.milliseconds(graphs.back());
  }
  std::vector<std::vector<double>> us(entrants.size());
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t i = 0; i < graphs.size(); ++i) {
      us[i].push_back(stream.milliseconds(graphs[i]) * 1e3 / static_cast<double>(calls));
    }
  }
  std::vector<Timing> timings;
  for (std::size_t i = 0; i < graphs.size(); ++i) {
    check(cudaGraphExecDestroy(graphs[i]));
    timings.push_back(timing_of(us[i]));
  }
  return timings;
}

// {"gpu": "NVIDIA H200", ...}
inline void print_device(std::FILE* file, const cudaDeviceProp& device) {
  int clock_khz = 0, memory_khz = 0, driver = 0, runtime = 0;
  check(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, 0));
  check(cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, 0));
  check(cudaDriverGetVersion(&driver));
  check(cudaRuntimeGetVersion(&runtime));
  std::fprintf(file,
               "{\"gpu\": \"%s\", \"sm\": %d, \"multiprocessors\": %d, \"l2_bytes\": %d, "
               "\"memory_bytes\": %zu, \"peak_sm_mhz\": %d, \"peak_memory_mhz\": %d, "
               "\"cuda_driver\": %d, \"cuda_runtime\": %d}",
               device.name, device.major * 10 + device.minor, device.multiProcessorCount,
               device.l2CacheSize, device.totalGlobalMem, clock_khz / 1000, memory_khz / 1000,
               driver, runtime);
}

}  // namespace bench
