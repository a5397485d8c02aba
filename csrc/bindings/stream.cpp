// torch's look-up of the current CUDA stream lies in libtorch_cuda.so, which a torch without CUDA
// does not have. Linking to it would tie this binary to one kind of torch, so it is found at run
// time, in the library that torch itself has loaded.
#include "stream.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "checks.h"

namespace wanda_ext::bindings {
namespace {

using GetStream = AOTITorchError (*)(std::int32_t device_index, void** stream);

GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

GetStream get_stream() {
  static const GetStream found = find_get_stream();
  return found;
}

}  // namespace

bool has_cuda_stream() { return get_stream() != nullptr; }

cudaStream_t current_cuda_stream(const char* op, std::int32_t device_index) {
  check(has_cuda_stream(), op, "this torch was built without CUDA and has no current stream; ",
        "install one with CUDA, or move the tensors to the CPU");
  void* stream = nullptr;
  check(get_stream()(device_index, &stream) == AOTI_TORCH_SUCCESS, op,
        "torch has no current stream for CUDA device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace wanda_ext::bindings
