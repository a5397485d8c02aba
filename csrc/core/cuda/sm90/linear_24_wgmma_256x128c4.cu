// linear_24 in tiles of 256x128 (rows of W x tokens), for many tokens, weights and tokens each
// fetched once for two CTAs.
#include "linear_24_wgmma.h"

namespace wanda_ext {
namespace cuda {

template Status run_wgmma<Wgmma256x128c4>(const Linear24Problem&, int, void*, cudaStream_t);

}  // namespace cuda
}  // namespace wanda_ext
