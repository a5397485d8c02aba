// The Python module wanda_ext._C_sm90a: a table of kernels, which wanda_ext._C adds to its own.
#include <pybind11/pybind11.h>

#include "core/cuda/linear_24_kernels.h"

PYBIND11_MODULE(_C_sm90a, module) {
  module.doc() = "linear_24's kernels for compute capability 9.0.";
  module.def(
      "linear_24_kernels", [] { return pybind11::capsule(&wanda_ext::cuda::kWgmmaKernels); },
      "For _C.add_linear_24_kernels.");
}
