// linear_24 in tiles of 128x256 (rows of W x tokens), for many tokens, each fetched once for four
// CTAs.
#include "linear_24_wgmma.h"

namespace wanda_ext {
namespace cuda {

template Status run_wgmma<Wgmma128x256c4>(const Linear24Problem&, int, void*, cudaStream_t);

}  // namespace cuda
}  // namespace wanda_ext
