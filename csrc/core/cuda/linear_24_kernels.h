// The table of linear_24's kernels: what the dispatcher knows of each. A faster kernel is one more
// row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace cuda {

// Checked before it reaches a kernel: m > 0, n > 0, k % 16 == 0, pointers on 16 bytes. Only the
// first row of the first table must take k == 0.
struct Linear24Problem {
  std::int64_t m, n, k;
  const void* x;  // [m,k], rows ld_x elements apart
  std::int64_t ld_x;
  const void* values;        // [n,k/2]
  const std::int16_t* meta;  // in `order`
  MetaOrder order;
  const void* bias;  // [n] or null
  void* y;           // [m,n]
  DType dtype;       // of x, values, bias and y
  Device device;     // the current one
};

struct Linear24Kernel {
  const char* name;
  int first_arch, last_arch;  // compute capabilities, both included
  bool reads_80, reads_90;    // metadata orders
  bool float16, bfloat16;     // dtypes
  std::int64_t n_multiple;    // n must be a multiple of it
  std::int64_t last_m;        // by default for m up to here
  int max_splits;             // of k; 1: it does not split
  int (*default_splits)(Device device, std::int64_t m, std::int64_t n, std::int64_t k);
  std::size_t (*workspace)(std::int64_t m, std::int64_t n, std::int64_t k, int splits);
  Status (*run)(const Linear24Problem& problem, int splits, void* workspace, cudaStream_t stream);
};

// A list of rows, as one binary hands it to another. `abi` is kLinear24Abi of the one that made it.
constexpr int kLinear24Abi = 1;
struct Linear24Kernels {
  int abi;
  int count;
  const Linear24Kernel* rows;
};

// mma.sp, for every architecture from sm_80 on.
extern const Linear24Kernels kMmaSpKernels;

// wgmma by CUTLASS, for sm_90a alone. In Python a binary of its own, wanda_ext._C_sm90a, whose
// table is handed over on import; elsewhere linked in where it was compiled (WANDA_EXT_WITH_SM90A).
extern const Linear24Kernels kWgmmaKernels;

// Adds a table that outlives the program's calls. Rows added later win where two serve equally.
Status add_linear_24_kernels(const Linear24Kernels* kernels);

}  // namespace cuda
}  // namespace wanda_ext
