// The fused 2:4 prune + pack beside a device-to-device copy of the same bytes, bf16:
//
//   prune_pack_24 N K [N K ...]      prints one JSON object a line
//
// A CUDA graph calls the kernel once for each of several buffers, together many times an L2 cache;
// both are replayed by turns. copy / wanda_ext is the fraction of copy bandwidth reached.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "wanda_ext/ops.h"

namespace {

constexpr int kReplays = 50;
constexpr std::size_t kBufferBytes = std::size_t{1} << 30;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
T* device_memory(std::size_t bytes) {
  void* data = nullptr;
  check(cudaMalloc(&data, bytes));
  check(cudaMemset(data, 0, bytes));
  return static_cast<T*>(data);
}

// Weights whose low bits differ, of both signs, all finite; norms in [1, 2).
__global__ void fill(unsigned short* weight, std::size_t count, float* norm, std::size_t k) {
  for (std::size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    unsigned bits = static_cast<unsigned>(i) * 2654435761u;
    bits ^= bits >> 15;
    weight[i] = static_cast<unsigned short>((bits & 0x807f) | (0x3c00 + (bits >> 9 & 0x0380)));
    if (i < k) norm[i] = 1.0f + static_cast<float>(bits >> 9) * 0x1p-23f;
  }
}

cudaGraphExec_t capture(cudaStream_t stream, const std::function<void()>& work) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  work();
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  check(cudaGraphDestroy(graph));
  return executable;
}

float replay_ms(cudaGraphExec_t graph, cudaStream_t stream, cudaEvent_t start, cudaEvent_t end) {
  float ms = 0;
  check(cudaEventRecord(start, stream));
  check(cudaGraphLaunch(graph, stream));
  check(cudaEventRecord(end, stream));
  check(cudaEventSynchronize(end));
  check(cudaEventElapsedTime(&ms, start, end));
  return ms;
}

float median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void measure(std::int64_t n, std::int64_t k) {
  using namespace wanda_ext;
  const auto weight_bytes = static_cast<std::size_t>(n * k) * 2;
  const std::size_t value_bytes = weight_bytes / 2, meta_bytes = weight_bytes / 16;
  const std::size_t copied = (weight_bytes + value_bytes + meta_bytes) / 2;  // read, and written
  const std::size_t count = std::max<std::size_t>(
      2, std::min<std::size_t>(20, (kBufferBytes + weight_bytes - 1) / weight_bytes));

  char* weights = device_memory<char>(count * weight_bytes);
  char* packed = device_memory<char>(count * (value_bytes + meta_bytes));
  char* target = device_memory<char>(count * copied);
  auto* norm = device_memory<float>(static_cast<std::size_t>(k) * sizeof(float));
  auto* bad = device_memory<std::int32_t>(sizeof(std::int32_t));
  cudaStream_t stream;
  cudaEvent_t start, end;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&end));
  fill<<<1024, 256>>>(reinterpret_cast<unsigned short*>(weights), count * weight_bytes / 2, norm,
                      static_cast<std::size_t>(k));
  check(cudaDeviceSynchronize());

  const cudaGraphExec_t ours = capture(stream, [&] {
    for (std::size_t i = 0; i < count; ++i) {
      char* out = packed + i * (value_bytes + meta_bytes);
      const Status status =
          cuda::prune_pack_24({weights + i * weight_bytes, n, k, k, DType::kBFloat16}, norm, out,
                              reinterpret_cast<std::int16_t*>(out + value_bytes), bad, stream);
      if (!status.ok()) {
        std::fprintf(stderr, "%s\n", status.message);
        std::exit(1);
      }
    }
  });
  const cudaGraphExec_t copy = capture(stream, [&] {
    for (std::size_t i = 0; i < count; ++i) {
      check(cudaMemcpyAsync(target + i * copied, weights + i * weight_bytes, copied,
                            cudaMemcpyDeviceToDevice, stream));
    }
  });
  std::vector<float> ours_ms, copy_ms;
  for (int i = 0; i < kReplays; ++i) {
    ours_ms.push_back(replay_ms(ours, stream, start, end) / static_cast<float>(count));
    copy_ms.push_back(replay_ms(copy, stream, start, end) / static_cast<float>(count));
  }
  std::int32_t bad_row = 0;
  check(cudaMemcpy(&bad_row, bad, sizeof(bad_row), cudaMemcpyDeviceToHost));
  std::printf(
      "{\"case\": \"prune_pack_24 %lldx%lld bf16\", \"wanda_ext_ms\": %.5f, \"copy_ms\": %.5f, "
      "\"copy / wanda_ext\": %.3f, \"buffers\": %zu, \"bad\": %d}\n",
      static_cast<long long>(n), static_cast<long long>(k), median(ours_ms), median(copy_ms),
      median(copy_ms) / median(ours_ms), count, bad_row);
  for (void* data :
       {static_cast<void*>(weights), static_cast<void*>(packed), static_cast<void*>(target),
        static_cast<void*>(norm), static_cast<void*>(bad)}) {
    check(cudaFree(data));
  }
  check(cudaGraphExecDestroy(ours));
  check(cudaGraphExecDestroy(copy));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || argc % 2 == 0) {
    std::fprintf(stderr, "usage: %s N K [N K ...]\n", argv[0]);
    return 2;
  }
  for (int i = 1; i + 1 < argc; i += 2) measure(std::atoll(argv[i]), std::atoll(argv[i + 1]));
  return 0;
}
