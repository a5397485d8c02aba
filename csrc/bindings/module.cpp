// The Python module wanda_ext._C: importing it registers the ops (library.cpp); its one function
// says what this binary is. Tensors never cross here, only through torch.ops.
#include <pybind11/pybind11.h>

#include "stream.h"
#include "wanda_ext/ops.h"

namespace {

// {"torch": "2.13.0" (built with), "compiler": "gcc 12.2.0", "cuda": bool, "cuda_stream": bool
// (whether the running torch offers its own), "cuda_archs": "80;90+PTX", "nvcc": "13.0.88",
// "cutlass": "4.2.0"}; the last three are None without CUDA.
pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = WANDA_EXT_BUILT_WITH_TORCH;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if defined(WANDA_EXT_WITH_CUDA)
  info["cuda"] = true;
  info["cuda_stream"] = wanda_ext::bindings::has_cuda_stream();
  info["cuda_archs"] = WANDA_EXT_CUDA_ARCHS;
  info["nvcc"] = WANDA_EXT_NVCC;
  info["cutlass"] = wanda_ext::cuda::cutlass_version();
#else
  info["cuda"] = false;
  info["cuda_stream"] = false;
  info["cuda_archs"] = pybind11::none();
  info["nvcc"] = pybind11::none();
  info["cutlass"] = pybind11::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native ops of wanda_ext, registered as torch.ops.wanda_ext on import.";
  module.def("build_info", &build_info, "What this binary was built with and for.");
}
