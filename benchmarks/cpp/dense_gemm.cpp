#include "dense_gemm.h"

#include <dlfcn.h>
#include <library_types.h>

#include <cstdio>
#include <cstdlib>

namespace bench {
namespace {

// Of cublas_v2.h and cublas_api.h, the same in CUDA 11 to 13.
constexpr int kNoTranspose = 0, kTranspose = 1, kCompute32F = 68, kDefaultAlgorithm = -1;
constexpr int kDefaultMath = 0, kDisallowReducedPrecisionReduction = 16;
constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;  // what cuBLAS asks for on sm_90

struct Cublas {
  std::string missing, file;
  int (*create)(void** handle);
  int (*destroy)(void* handle);
  int (*set_stream)(void* handle, cudaStream_t stream);
  int (*set_workspace)(void* handle, void* workspace, std::size_t bytes);
  int (*set_math_mode)(void* handle, int mode);
  int (*get_property)(int property, int* value);
  const char* (*status_string)(int status);
  int (*gemm)(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
              const void* alpha, const void* a, cudaDataType_t a_type, int lda, const void* b,
              cudaDataType_t b_type, int ldb, const void* beta, void* c, cudaDataType_t c_type,
              int ldc, int compute_type, int algorithm);

  Cublas() {
    void* library = nullptr;
    const char* given = std::getenv("WANDA_EXT_CUBLAS");
    for (const char* name : {given, "libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
      if (name == nullptr || *name == '\0' || library != nullptr) continue;
      library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
      if (library != nullptr) {
        file = name;
      } else if (missing.empty()) {
        missing = dlerror();
      }
    }
    if (library == nullptr) {
      missing += "; set WANDA_EXT_CUBLAS to the file";
      return;
    }
    missing.clear();
    find(library, "cublasCreate_v2", create);
    find(library, "cublasDestroy_v2", destroy);
    find(library, "cublasSetStream_v2", set_stream);
    find(library, "cublasSetWorkspace_v2", set_workspace);
    find(library, "cublasSetMathMode", set_math_mode);
    find(library, "cublasGetProperty", get_property);
    find(library, "cublasGetStatusString", status_string);
    find(library, "cublasGemmEx", gemm);
  }

 private:
  template <typename Function>
  void find(void* library, const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(library, name));
    if (function == nullptr) missing = file + " has no " + name;
  }
};

const Cublas& cublas() {
  static const Cublas library;
  return library;
}

std::string problem(int status) { return status == 0 ? "" : cublas().status_string(status); }

}  // namespace

const std::string& DenseGemm::missing() { return cublas().missing; }

std::string DenseGemm::version() {
  if (!missing().empty()) return missing();
  int part[3] = {};
  for (int i = 0; i < 3; ++i) cublas().get_property(i, &part[i]);
  return std::to_string(part[0]) + "." + std::to_string(part[1]) + "." + std::to_string(part[2]) +
         " of " + cublas().file;
}

DenseGemm::DenseGemm(cudaStream_t stream) {
  if (!missing().empty()) return;
  std::string why = problem(cublas().create(&handle_));
  if (why.empty()) why = problem(cublas().set_stream(handle_, stream));
  // One of its own would be allocated in the midst of a capture.
  if (why.empty() && cudaMalloc(&workspace_, kWorkspaceBytes) != cudaSuccess) why = "no memory";
  if (why.empty()) why = problem(cublas().set_workspace(handle_, workspace_, kWorkspaceBytes));
  if (why.empty()) return;
  std::fprintf(stderr, "cuBLAS failed: %s\n", why.c_str());
  std::exit(1);
}

DenseGemm::~DenseGemm() {
  if (handle_ != nullptr) cublas().destroy(handle_);
  cudaFree(workspace_);
}

// Columns come first in cuBLAS: there y^T [n,m] = weight [n,k] @ x^T [k,m], weight transposed.
std::string DenseGemm::run(const void* x, const void* weight, void* y, std::int64_t m,
                           std::int64_t n, std::int64_t k, wanda_ext::DType dtype, bool exactly) {
  if (!missing().empty()) return missing();
  const cudaDataType_t type = dtype == wanda_ext::DType::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F;
  const float one = 1, zero = 0;
  const int mode = exactly ? kDisallowReducedPrecisionReduction : kDefaultMath;
  if (std::string why = problem(cublas().set_math_mode(handle_, mode)); !why.empty()) return why;
  return problem(cublas().gemm(handle_, kTranspose, kNoTranspose, static_cast<int>(n),
                               static_cast<int>(m), static_cast<int>(k), &one, weight, type,
                               static_cast<int>(k), x, type, static_cast<int>(k), &zero, y, type,
                               static_cast<int>(n), kCompute32F, kDefaultAlgorithm));
}

}  // namespace bench
