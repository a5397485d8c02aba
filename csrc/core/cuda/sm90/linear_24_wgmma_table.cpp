// The rows of the wgmma kernels, for compute capability 9.0 alone.
#include <iterator>

#include "linear_24_wgmma_tiles.h"

namespace wanda_ext {
namespace cuda {
namespace {

int one_split(Device, std::int64_t, std::int64_t, std::int64_t) { return 1; }

std::size_t no_workspace(std::int64_t, std::int64_t, std::int64_t, int) { return 0; }

template <typename Tile>
constexpr Linear24Kernel row(const char* name, std::int64_t last_m) {
  Linear24Kernel kernel = {};
  kernel.name = name;
  kernel.first_arch = kernel.last_arch = 90;
  kernel.reads_90 = kernel.float16 = kernel.bfloat16 = true;
  kernel.n_multiple = 8;  // rows of y start on 16 bytes
  kernel.last_m = last_m;
  kernel.max_splits = 1;
  kernel.default_splits = one_split;
  kernel.workspace = no_workspace;
  kernel.run = run_wgmma<Tile>;
  return kernel;
}

// The last of those for any m is the default; the others are for whoever measures.
constexpr Linear24Kernel kKernels[] = {
    row<Wgmma64x64>("wgmma_64x64", 128),
    row<Wgmma64x128>("wgmma_64x128", 256),
    row<Wgmma128x128>("wgmma_128x128", 512),
    row<Wgmma256x128c4>("wgmma_256x128_c4", INT64_MAX),
    row<Wgmma128x256c4>("wgmma_128x256_c4", INT64_MAX),
    row<Wgmma128x256>("wgmma_128x256", INT64_MAX),
};

}  // namespace

const Linear24Kernels kWgmmaKernels = {kLinear24Abi, static_cast<int>(std::size(kKernels)),
                                       kKernels};

}  // namespace cuda
}  // namespace wanda_ext
