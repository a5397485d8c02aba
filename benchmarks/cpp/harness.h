// What the C++ benchmarks share: results as lines of JSON, device memory, random numbers, and the
// timing of CUDA graphs.
//
// An entrant is a graph of many calls, each on the next copy of its data; together the copies are
// several times an L2 cache, so that every call reads from memory. Entrants are replayed by turns,
// in another order each round, so that a slow moment of the device, or the power that another one
// drew before, hits them all.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_profiler_api.h>
#include <cuda_runtime.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "wanda_ext/matrix_view.h"
#include "wanda_ext/status.h"

namespace bench {

// Exit statuses: something was wrong or failed; the command line is; there is no device; a kernel
// took the device away from the program, which ends early (its last line names it as "lost").
constexpr int kFailed = 1, kNotRun = 2, kNoDevice = 3, kLost = 4;

// --- Results -------------------------------------------------------------------------------------

inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return out + "\"";
}

inline std::string number(double value) {
  char text[40];
  std::snprintf(text, sizeof(text), std::isfinite(value) ? "%.6g" : "null", value);
  return text;
}

// A JSON object, key by key.
class Object {
 public:
  Object& add(const std::string& key, const std::string& text) { return put(key, quoted(text)); }
  Object& add(const std::string& key, const char* text) { return put(key, quoted(text)); }
  Object& add(const std::string& key, double value) { return put(key, number(value)); }
  Object& add(const std::string& key, const Object& value) { return put(key, value.text()); }
  Object& add(const std::string& key, std::int64_t value) {
    return put(key, std::to_string(value));
  }
  bool empty() const { return fields_.empty(); }
  std::string text() const { return "{" + fields_ + "}"; }

  // A line of its own, at once: what comes later may end the program.
  void print() const {
    std::printf("%s\n", text().c_str());
    std::fflush(stdout);
  }

 private:
  Object& put(const std::string& key, const std::string& value) {
    fields_ += (fields_.empty() ? "" : ", ") + quoted(key) + ": " + value;
    return *this;
  }

  std::string fields_;
};

// --- What may go wrong ---------------------------------------------------------------------------

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

inline std::string problem(cudaError_t error) {
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

inline std::string problem(const wanda_ext::Status& status) { return status.message; }

// After an error that no later call recovers from.
inline bool device_is_lost() {
  (void)cudaGetLastError();
  return cudaDeviceSynchronize() != cudaSuccess;
}

inline char now_running[160] = "nothing yet";

// Names what runs, for whoever has to stop the program because it hangs.
inline void running(const std::string& what) {
  std::snprintf(now_running, sizeof(now_running), "%s\n", what.c_str());
}

inline void stop_and_tell(int) {
  const char text[] = "interrupted in ";
  const bool told = write(STDERR_FILENO, text, sizeof(text) - 1) > 0 &&
                    write(STDERR_FILENO, now_running, std::strlen(now_running)) > 0;
  _exit(told ? 130 : kFailed);
}

inline cudaDeviceProp device_or_exit() {
  signal(SIGINT, stop_and_tell);
  int count = 0;
  cudaDeviceProp device = {};
  if (cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    std::fprintf(stderr, "this benchmark needs a CUDA device, and there is none (%s)\n",
                 error != cudaSuccess ? cudaGetErrorString(error) : "the driver knows of 0");
    std::exit(kNoDevice);
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
  std::size_t size() const { return bytes_ / sizeof(T); }

  std::vector<T> on_host() const {
    std::vector<T> host(size());
    check(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return host;
  }

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

template <typename T>
__device__ T rounded(float value) {
  return wanda_ext::cuda::from_float<T>(value);
}
template <>
__device__ inline float rounded<float>(float value) {
  return value;
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
    data[i] = rounded<T>(absolute ? fabsf(value) : value);
  }
}

constexpr unsigned kThreads = 256, kMostBlocks = 1024;

inline dim3 blocks_of(std::size_t count) {
  const std::size_t blocks = std::max<std::size_t>((count + kThreads - 1) / kThreads, 1);
  return dim3(static_cast<unsigned>(std::min<std::size_t>(blocks, kMostBlocks)));
}

template <typename T>
void fill_normal(T* data, std::size_t count, unsigned seed, bool absolute = false) {
  check(wanda_ext::cuda::launch("fill_normal", fill_normal_kernel<T>, blocks_of(count),
                                dim3(kThreads), nullptr, data, count, seed, absolute));
}

using Bits = std::uint16_t;  // a bf16 or an fp16

inline void fill_normal(Bits* data, std::size_t count, unsigned seed, wanda_ext::DType dtype) {
  if (dtype == wanda_ext::DType::kBFloat16) {
    fill_normal(reinterpret_cast<__nv_bfloat16*>(data), count, seed);
  } else {
    fill_normal(reinterpret_cast<__half*>(data), count, seed);
  }
}

// --- Timing --------------------------------------------------------------------------------------

constexpr std::size_t kRotatedBytes = std::size_t{256} << 20;
constexpr std::size_t kMostCopies = 512;  // smaller weights live in the cache, also in a model
constexpr std::size_t kEnoughCalls = 20;  // of a graph; fewer, when they take
constexpr double kEnoughUs = 2000;        // as long
constexpr int kHeats = 3;                 // rounds that all entrants run
constexpr std::size_t kFinalists = 4;     // the fastest of them run all rounds
constexpr long long kBusyCycles = 200000;

// About 0.1 ms in which the device is busy, so that it does not wait for the launch of what is
// timed.
__global__ inline void keep_busy() {
  const long long start = clock64();
  while (clock64() - start < kBusyCycles) {
  }
}

// Copies of `bytes` each that rotate.
inline std::size_t copies_of(std::size_t bytes) {
  return std::clamp<std::size_t>((kRotatedBytes + bytes - 1) / bytes, 2, kMostCopies);
}

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

  // What `work` takes on this stream.
  template <typename Work>
  double microseconds(Work work) const {
    float ms = 0;
    check(wanda_ext::cuda::launch("keep_busy", keep_busy, dim3(1), dim3(1), stream_));
    check(cudaEventRecord(start_, stream_));
    work();
    check(cudaEventRecord(end_, stream_));
    check(cudaEventSynchronize(end_));
    check(cudaEventElapsedTime(&ms, start_, end_));
    return ms * 1e3;
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t start_, end_;
};

using Call = std::function<std::string(std::size_t)>;  // works on copy i; "" or what went wrong

struct Entrant {
  std::string name;
  Call call;
  bool keeps = false;  // it runs all rounds, however slow
  // What is found out.
  std::string wrong = {};
  std::vector<double> us = {};  // of one call, round by round

  double at(double fraction) const {
    std::vector<double> sorted = us;
    std::sort(sorted.begin(), sorted.end());
    return sorted[static_cast<std::size_t>(fraction * static_cast<double>(us.size() - 1) + 0.5)];
  }
  double median() const { return us.empty() ? NAN : at(0.5); }
};

// A graph of an entrant's calls.
class Graph {
 public:
  Graph(const Stream& stream, Entrant& entrant, std::size_t copies) : stream_(stream) {
    // The first call loads what must not fall into the capture; the second says how long one takes.
    entrant.wrong = entrant.call(0);
    if (!entrant.wrong.empty()) return;
    const double us = stream.microseconds([&] { entrant.wrong = entrant.call(1 % copies); });
    const auto enough = static_cast<std::size_t>(kEnoughUs / std::max(us, 1.0)) + 1;
    calls_ = std::max(copies, std::min(kEnoughCalls, enough));
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (std::size_t i = 0; i < calls_ && entrant.wrong.empty(); ++i) {
      entrant.wrong = entrant.call(i % copies);
    }
    const std::string captured = problem(cudaStreamEndCapture(stream, &graph));
    if (entrant.wrong.empty()) entrant.wrong = captured;
    if (entrant.wrong.empty()) {
      entrant.wrong = problem(cudaGraphInstantiate(&executable_, graph, 0));
    }
    if (graph != nullptr) check(cudaGraphDestroy(graph));
  }
  ~Graph() {
    if (executable_ != nullptr) check(cudaGraphExecDestroy(executable_));
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  double microseconds_a_call() const {
    const double us = stream_.microseconds([&] { check(cudaGraphLaunch(executable_, stream_)); });
    return us / static_cast<double>(calls_);
  }

 private:
  const Stream& stream_;
  std::size_t calls_ = 0;
  cudaGraphExec_t executable_ = nullptr;
};

// Times the entrants that are not wrong: all of them for kHeats rounds; then those that keep on,
// and the fastest kFinalists, for `rounds`.
inline void time_by_turns(const Stream& stream, std::vector<Entrant>& entrants, std::size_t copies,
                          int rounds) {
  std::vector<std::pair<Entrant*, std::unique_ptr<Graph>>> racing;
  for (Entrant& entrant : entrants) {
    if (!entrant.wrong.empty()) continue;
    running("timing " + entrant.name);
    auto graph = std::make_unique<Graph>(stream, entrant, copies);
    if (entrant.wrong.empty()) racing.emplace_back(&entrant, std::move(graph));
  }
  const auto run = [&](int count) {
    for (int round = 0; round < count; ++round) {
      for (std::size_t i = 0; i < racing.size(); ++i) {
        auto& [entrant, graph] = racing[(i + static_cast<std::size_t>(round)) % racing.size()];
        running("timing " + entrant->name);
        entrant->us.push_back(graph->microseconds_a_call());
      }
    }
  };
  run(kHeats);
  std::stable_sort(racing.begin(), racing.end(),
                   [](const auto& a, const auto& b) { return a.first->at(0) < b.first->at(0); });
  std::size_t fast = 0;
  const auto leaves = [&fast](const auto& one) {
    return !one.first->keeps && fast++ >= kFinalists;
  };
  racing.erase(std::remove_if(racing.begin(), racing.end(), leaves), racing.end());
  // The heats of the finalists do not count: the best of many short trials looks better than it is.
  for (auto& [entrant, graph] : racing) entrant->us.clear();
  run(rounds);
}

// {"cuBLAS": {"median": 12.3, "p10": 12.2, "p90": 12.6, "rounds": 30}, ...}, of those that were
// timed.
inline Object times_of(const std::vector<Entrant>& entrants) {
  Object all;
  for (const Entrant& entrant : entrants) {
    if (entrant.us.empty()) continue;
    Object one;
    one.add("median", entrant.median()).add("p10", entrant.at(0.1)).add("p90", entrant.at(0.9));
    one.add("rounds", static_cast<std::int64_t>(entrant.us.size()));
    all.add(entrant.name, one);
  }
  return all;
}

// {"mma_sp_32x8/2": "y[3, 17] is ...", ...}
inline Object wrong_of(const std::vector<Entrant>& entrants) {
  Object all;
  for (const Entrant& entrant : entrants) {
    if (!entrant.wrong.empty()) all.add(entrant.name, entrant.wrong);
  }
  return all;
}

}  // namespace bench
