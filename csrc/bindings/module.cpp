// The Python module wanda_ext._C: importing it registers the ops (library.cpp); its
// functions say what this binary is and which kernels it runs. Tensors never cross here, only
// through torch.ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "stream.h"
#include "wanda_ext/ops.h"
#if defined(WANDA_EXT_WITH_CUDA)
#include "core/cuda/linear_24_kernels.h"
#endif

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

void check(const wanda_ext::Status& status) {
  if (!status.ok()) throw std::runtime_error(std::string("wanda_ext.") + status.message);
}

void use_cpu_kernels(const std::string& name) { check(wanda_ext::use_cpu_kernels(name.c_str())); }

#if defined(WANDA_EXT_WITH_CUDA)
// --- Which kernel linear_24 runs -----------------------------------------------------------------

namespace cuda = wanda_ext::cuda;

wanda_ext::DType dtype_of(const std::string& name) {
  for (const auto dtype :
       {wanda_ext::DType::kFloat32, wanda_ext::DType::kBFloat16, wanda_ext::DType::kFloat16}) {
    if (name == wanda_ext::name_of(dtype)) return dtype;
  }
  throw std::runtime_error("wanda_ext.linear_24: dtype must be float32, bfloat16 or float16, got " +
                           name);
}

std::vector<std::string> linear_24_kernels() {
  std::vector<std::string> names;
  for (int i = 0; i < cuda::linear_24_kernels(); ++i) {
    names.push_back(cuda::linear_24_kernel_name(i));
  }
  return names;
}

// (arch, sms, dtype, n, k, last_m, kernel, splits)
using Rule = std::tuple<int, int, std::string, std::int64_t, std::int64_t, std::int64_t, int, int>;

void set_linear_24_rules(const std::vector<Rule>& rows) {
  std::vector<cuda::Linear24Rule> rules;
  for (const auto& [arch, sms, dtype, n, k, last_m, kernel, splits] : rows) {
    rules.push_back({{arch, sms}, dtype_of(dtype), n, k, last_m, {kernel, splits, true}});
  }
  check(cuda::set_linear_24_rules(rules.data(), static_cast<std::int64_t>(rules.size())));
}

std::tuple<int, int, bool> linear_24_choose(int arch, int sms, std::int64_t m, std::int64_t n,
                                            std::int64_t k, const std::string& dtype, int order) {
  cuda::Linear24Choice choice;
  check(cuda::linear_24_choose({arch, sms}, m, n, k, dtype_of(dtype),
                               static_cast<wanda_ext::MetaOrder>(order), &choice));
  return {choice.kernel, choice.splits, choice.tuned};
}

// "" or why not.
std::string linear_24_check(int kernel, int splits, int arch, int sms, std::int64_t m,
                            std::int64_t n, std::int64_t k, const std::string& dtype, int order) {
  return cuda::linear_24_check({kernel, splits, true}, {arch, sms}, m, n, k, dtype_of(dtype),
                               static_cast<wanda_ext::MetaOrder>(order))
      .message;
}

void add_linear_24_kernels(const pybind11::capsule& table) {
  check(cuda::add_linear_24_kernels(table.get_pointer<const cuda::Linear24Kernels>()));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native ops of wanda_ext, registered as torch.ops.wanda_ext on import.";
  module.def("build_info", &build_info, "What this binary was built with and for.");
  module.def("cpu_kernels", &wanda_ext::cpu_kernels, "The set of kernels that CPU products run.");
  module.def("use_cpu_kernels", &use_cpu_kernels, "Another set; while no product runs.");
  if (const char* name = std::getenv("WANDA_EXT_CPU_KERNELS")) use_cpu_kernels(name);
#if defined(WANDA_EXT_WITH_CUDA)
  module.def("linear_24_kernels", &linear_24_kernels, "Their names; a kernel is its index.");
  module.def("set_linear_24_rules", &set_linear_24_rules,
             "Replaces all: (arch, sms, dtype, n, k, last_m, kernel, splits).");
  module.def("linear_24_choose", &linear_24_choose,
             "(kernel, splits, by a rule) for (arch, sms, m, n, k, dtype, order).");
  module.def("linear_24_check", &linear_24_check,
             "Why kernel, splits cannot run at arch, sms, m, n, k, dtype, order; or ''.");
  module.def("add_linear_24_kernels", &add_linear_24_kernels, "Adds another binary's table.");
#endif
}
