// An engine with a GPU, a stream and memory of its own: prunes and packs a weight where it lies,
// then multiplies by it. Compared with a plain product over the weight that the CPU pruned.
//
// Where there is no GPU it shows that, and that the library says so by value.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "random.h"
#include "wanda_ext/ops.h"

using wanda_ext::DType;
using wanda_ext::MetaOrder;
using wanda_ext::Status;
using wanda_ext::StatusCode;
namespace cuda = wanda_ext::cuda;

namespace {

void check(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message);
  std::exit(1);
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
T* device_memory(std::int64_t count) {
  void* data = nullptr;
  check(cudaMalloc(&data, static_cast<std::size_t>(count) * sizeof(T)));
  return static_cast<T*>(data);
}

// A bf16 linear without its zeros, in device memory.
struct Packed {
  std::int64_t n, k;
  void* values;        // [n,k/2]
  std::int16_t* meta;  // in the order that the device reads
  MetaOrder order;
};

std::int64_t meta_words(MetaOrder order, std::int64_t n, std::int64_t k) {
  return wanda_ext::padded_rows_24(order, n) * wanda_ext::padded_cols_24(order, k) /
         wanda_ext::kColumnsPerMeta;
}

// Once, when the model is loaded: weight [n,k] bf16 and input_norm [k] lie in device memory.
// `canonical` is [n,k/16] of scratch; *bad becomes a row with NaN or infinity, or -1. Both are free
// again when the stream has passed.
Status prune_and_pack(const void* weight, const float* input_norm, std::int16_t* canonical,
                      std::int32_t* bad, const Packed& packed, cudaStream_t stream) {
  const std::int64_t n = packed.n, k = packed.k;
  if (Status status = cuda::prune_pack_24({weight, n, k, k, DType::kBFloat16}, input_norm,
                                          packed.values, canonical, bad, stream);
      !status.ok()) {
    return status;
  }
  return cuda::order_meta_24(canonical, MetaOrder::kCanonical, packed.meta, packed.order, n, k,
                             stream);
}

// Once: what the calls with 1 to most_tokens tokens need, so that none of them allocates.
Status workspace_bytes(cuda::Device device, const Packed& packed, std::int64_t most_tokens,
                       std::size_t* bytes) {
  *bytes = 0;
  for (std::int64_t m = 1; m <= most_tokens; ++m) {
    cuda::Linear24Choice choice;
    if (Status status = cuda::linear_24_choose(device, m, packed.n, packed.k, DType::kBFloat16,
                                               packed.order, &choice);
        !status.ok()) {
      return status;
    }
    const std::size_t needed = cuda::linear_24_workspace(choice, m, packed.n, packed.k);
    if (needed > *bytes) *bytes = needed;
  }
  return {};
}

// Every step: y [m,n] = x [m,k] @ W^T. Does not wait, and may be captured in a CUDA graph.
Status multiply(cuda::Device device, const Packed& packed, const void* x, std::int64_t m, void* y,
                void* workspace, cudaStream_t stream) {
  const std::int64_t n = packed.n, k = packed.k;
  cuda::Linear24Choice choice;
  if (Status status =
          cuda::linear_24_choose(device, m, n, k, DType::kBFloat16, packed.order, &choice);
      !status.ok()) {
    return status;
  }
  return cuda::linear_24({x, m, k, k, DType::kBFloat16}, packed.values, packed.meta, packed.order,
                         /*bias=*/nullptr, {y, m, n, n, DType::kBFloat16}, choice, workspace,
                         stream);
}

// --- What the engine does with it ----------------------------------------------------------------

float to_float(std::uint16_t bf16) {
  const std::uint32_t bits = std::uint32_t{bf16} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The upper halves of the numbers: bf16.
std::vector<std::uint16_t> to_bf16(const std::vector<float>& numbers) {
  std::vector<std::uint16_t> halves;
  for (const float number : numbers) {
    std::uint32_t bits;
    std::memcpy(&bits, &number, sizeof(bits));
    halves.push_back(static_cast<std::uint16_t>(bits >> 16));
  }
  return halves;
}

template <typename T>
T* on_device(const std::vector<T>& numbers, cudaStream_t stream) {
  T* data = device_memory<T>(static_cast<std::int64_t>(numbers.size()));
  check(cudaMemcpyAsync(data, numbers.data(), numbers.size() * sizeof(T), cudaMemcpyHostToDevice,
                        stream));
  return data;
}

// Whether y is x times the weight that prune_nm makes on the CPU, as near as bf16 can tell.
bool is_right(std::vector<std::uint16_t> weight, const std::vector<float>& norm,
              const std::vector<std::uint16_t>& x, const std::vector<std::uint16_t>& y,
              std::int64_t m, std::int64_t n, std::int64_t k) {
  check(wanda_ext::prune_nm({weight.data(), n, k, k, DType::kBFloat16}, norm.data(), 2, 4, nullptr,
                            wanda_ext::serial()));
  double worst = 0;
  for (std::int64_t t = 0; t < m; ++t) {
    for (std::int64_t row = 0; row < n; ++row) {
      double sum = 0, magnitude = 0;
      for (std::int64_t c = 0; c < k; ++c) {
        const double product = double{to_float(x[t * k + c])} * to_float(weight[row * k + c]);
        sum += product;
        magnitude += std::fabs(product);
      }
      // One rounding to bf16, and what fp32 accumulation loses.
      const double allowed = std::fabs(sum) / 256 + magnitude * 1e-5;
      const double error = std::fabs(to_float(y[t * n + row]) - sum) / allowed;
      worst = error > worst || std::isnan(error) ? error : worst;
    }
  }
  std::printf("m %lld: largest error %.2f of what is allowed\n", static_cast<long long>(m), worst);
  return worst <= 1;
}

int run_on(cuda::Device device) {
  const std::int64_t n = 200, k = 320, most_tokens = 100;
  const std::vector<std::uint16_t> weight = to_bf16(normal(n * k, 1));
  std::vector<float> norm = normal(k, 2);
  for (float& value : norm) value = std::fabs(value);

  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const MetaOrder order = device.arch / 10 == 9 ? MetaOrder::kSm90 : MetaOrder::kSm80;
  const Packed packed = {n, k, device_memory<std::uint16_t>(n * k / 2),
                         device_memory<std::int16_t>(meta_words(order, n, k)), order};
  auto* canonical = device_memory<std::int16_t>(meta_words(MetaOrder::kCanonical, n, k));
  auto* bad = device_memory<std::int32_t>(1);
  check(prune_and_pack(on_device(weight, stream), on_device(norm, stream), canonical, bad, packed,
                       stream));
  std::int32_t bad_row = 0;
  check(cudaMemcpyAsync(&bad_row, bad, sizeof(bad_row), cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  if (bad_row >= 0) return 1;

  std::size_t bytes = 0;
  check(workspace_bytes(device, packed, most_tokens, &bytes));
  void* workspace = bytes > 0 ? device_memory<char>(static_cast<std::int64_t>(bytes)) : nullptr;
  for (const std::int64_t m : {std::int64_t{1}, std::int64_t{7}, most_tokens}) {
    const std::vector<std::uint16_t> x = to_bf16(normal(m * k, 3));
    std::vector<std::uint16_t> y(static_cast<std::size_t>(m * n));
    auto* device_y = device_memory<std::uint16_t>(m * n);
    check(multiply(device, packed, on_device(x, stream), m, device_y, workspace, stream));
    check(cudaMemcpyAsync(y.data(), device_y, y.size() * 2, cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
    if (!is_right(weight, norm, x, y, m, n, k)) return 1;
  }
  return 0;  // the process ends, and with it what it allocated
}

// What can be known without a device is still answered; what cannot is a Status.
bool says_that_there_is_no_device() {
  const Packed packed = {256, 512, nullptr, nullptr, MetaOrder::kSm90};
  std::size_t bytes = 0;
  check(workspace_bytes({90, 132}, packed, 300, &bytes));
  alignas(16) char aligned[32];  // is not looked into
  const auto call = [&](void* at) {
    return cuda::linear_24({at, 1, 512, 512, DType::kBFloat16}, at,
                           reinterpret_cast<std::int16_t*>(at), MetaOrder::kSm90, nullptr,
                           {at, 1, 256, 256, DType::kBFloat16}, {}, at, nullptr);
  };
  const Status misaligned = call(aligned + 1), valid = call(aligned);
  std::printf("%s\n%s\n", misaligned.message, valid.message);
  return misaligned.code == StatusCode::kInvalidArgument && valid.code == StatusCode::kCudaError;
}

// Whether the name of a kernel starts so.
bool has_kernel(const char* family) {
  for (int i = 0; i < cuda::linear_24_kernels(); ++i) {
    if (std::strncmp(cuda::linear_24_kernel_name(i), family, std::strlen(family)) == 0) return true;
  }
  return false;
}

}  // namespace

// cuda [FAMILY...]: families of kernels that must be there.
int main(int argc, char** argv) {
  std::printf("CUTLASS %s, kernels:", cuda::cutlass_version());
  for (int i = 0; i < cuda::linear_24_kernels(); ++i) {
    std::printf(" %s", cuda::linear_24_kernel_name(i));
  }
  std::printf("\n");
  for (int i = 1; i < argc; ++i) {
    if (has_kernel(argv[i])) continue;
    std::fprintf(stderr, "no kernel %s* is linked in\n", argv[i]);
    return 1;
  }
  cuda::Device device;
  if (const Status status = cuda::current_device(&device); !status.ok()) {
    std::printf("there is no device here (%s)\n", status.message);
    return status.code == StatusCode::kCudaError && says_that_there_is_no_device() ? 0 : 1;
  }
  std::printf("sm_%d, %d multiprocessors\n", device.arch, device.sms);
  return run_on(device);
}
