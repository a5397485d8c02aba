// linear_24 in tiles of 128x128 (rows of W x tokens), for some hundred tokens.
#include "linear_24_wgmma.h"

namespace wanda_ext {
namespace cuda {

template Status run_wgmma<Wgmma128x128>(const Linear24Problem&, int, void*, cudaStream_t);

}  // namespace cuda
}  // namespace wanda_ext
