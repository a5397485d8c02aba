// What a launch says on a device that has no image of the kernel.
#include "core/cuda/launch.h"

#include <string>

#include "../check.h"

namespace wanda_ext {
namespace cuda {
namespace {

__global__ void set_one(int* out) { *out = 1; }

Status run(std::size_t shared_bytes, bool overlaps, int* out) {
  LaunchConfig config;
  config.shared_bytes = shared_bytes;
  config.overlaps = overlaps;
  return launch("linear_bitmap", set_one, config, out);
}

void test_no_image() {
  const std::string expected =
      "linear_bitmap: the host has compute capability 7.5, and this build has no "
      "kernel for it, only for 8.0, 9.0; run `WANDA_EXT_CUDA_ARCHS=native pip install -v .` in the "
      "source tree";
  CHECK(simt::kDevices[2].major == 7);
  simt::device = 2;
  for (const cudaError_t error : {cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction,
                                  cudaErrorUnsupportedPtxVersion}) {
    simt::image_error = error;
    for (const std::size_t shared_bytes : {std::size_t{0}, std::size_t{64 << 10}}) {
      for (const bool overlaps : {false, true}) {
        int out = 0;
        const Status status = run(shared_bytes, overlaps, &out);
        CHECK(status.code == StatusCode::kUnsupported && out == 0);
        CHECK(std::string(status.message) == expected);
      }
    }
  }
  simt::image_error = cudaSuccess;
  int out = 0;
  CHECK(run(0, false, &out).ok() && out == 1);
}

void test_other_errors_are_told_as_they_are() {
  const Status status = status_of("pack_24", cudaErrorInvalidValue);
  CHECK(status.code == StatusCode::kCudaError);
  CHECK(std::string(status.message).rfind("pack_24: CUDA failed: ", 0) == 0);
}

}  // namespace
}  // namespace cuda
}  // namespace wanda_ext

int main() {
  wanda_ext::cuda::test_no_image();
  wanda_ext::cuda::test_other_errors_are_told_as_they_are();
  return wanda_ext::testing::finish();
}
