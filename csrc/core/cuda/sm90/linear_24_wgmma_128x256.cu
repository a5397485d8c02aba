// linear_24 in tiles of 128x256 (rows of W x tokens), for many tokens: the most work for each byte
// fetched, in clusters that always fit.
#include "linear_24_wgmma.h"

namespace wanda_ext {
namespace cuda {

template Status run_wgmma<Wgmma128x256>(const Linear24Problem&, int, void*, cudaStream_t);

}  // namespace cuda
}  // namespace wanda_ext
