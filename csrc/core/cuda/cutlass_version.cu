// The CUTLASS this library was compiled with, from the headers themselves.
#include <cutlass/version.h>

#include "wanda_ext/ops.h"

#define WANDA_EXT_TEXT(value) #value
#define WANDA_EXT_VERSION(major, minor, patch) \
  WANDA_EXT_TEXT(major) "." WANDA_EXT_TEXT(minor) "." WANDA_EXT_TEXT(patch)

namespace wanda_ext {
namespace cuda {

const char* cutlass_version() {
  return WANDA_EXT_VERSION(CUTLASS_MAJOR, CUTLASS_MINOR, CUTLASS_PATCH);
}

}  // namespace cuda
}  // namespace wanda_ext
