// linear_24 in tiles of 64x64 (rows of W x tokens), for few tokens: with small tiles there is one
// for every SM.
#include "linear_24_wgmma.h"

namespace wanda_ext {
namespace cuda {

template Status run_wgmma<Wgmma64x64>(const Linear24Problem&, int, void*, cudaStream_t);

}  // namespace cuda
}  // namespace wanda_ext
