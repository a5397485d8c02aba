// linear_24 in tiles of 64x128 (rows of W x tokens), for up to some hundred tokens.
#include "linear_24_wgmma.h"

namespace wanda_ext {
namespace cuda {

template Status run_wgmma<Wgmma64x128>(const Linear24Problem&, int, void*, cudaStream_t);

}  // namespace cuda
}  // namespace wanda_ext
