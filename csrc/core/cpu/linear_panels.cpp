// x in fp32, as linear_panels.h wants it, compiled for every ISA.
#include "linear_panels.h"

namespace wanda_ext {
namespace {

template <typename T>
WANDA_EXT_INLINE void convert_token(const Product& call, std::int64_t token) {
  const T* x = static_cast<const T*>(call.x.data) + token * call.x.ld;
  float* out = call.x_float + token * call.columns;
  for (std::int64_t c = 0; c < call.x.cols; ++c) out[c] = to_float(x[c]);
  for (std::int64_t c = call.x.cols; c < call.columns; ++c) out[c] = 0;
}

template <typename T>
WANDA_EXT_INLINE void pack_panel(const Product& call, std::int64_t token, std::int64_t tokens,
                                 std::int64_t panel) {
  const T* x = static_cast<const T*>(call.x.data) + token * call.x.ld;
  float* out = call.x_float + panel * call.columns * kTokensPerPanel;
  const std::int64_t count = tokens < kTokensPerPanel ? tokens : kTokensPerPanel;
  for (std::int64_t c = 0; c < call.x.cols; ++c) {
    for (std::int64_t t = 0; t < count; ++t) {
      out[c * kTokensPerPanel + t] = to_float(x[t * call.x.ld + c]);
    }
    for (std::int64_t t = count; t < kTokensPerPanel; ++t) out[c * kTokensPerPanel + t] = 0;
  }
  for (std::int64_t i = call.x.cols * kTokensPerPanel; i < call.columns * kTokensPerPanel; ++i) {
    out[i] = 0;
  }
}

}  // namespace

WANDA_EXT_CLONES void convert_token_any(const Product& call, std::int64_t token) {
  WANDA_EXT_FOR_DTYPE(convert_token, call, token);
}

WANDA_EXT_CLONES void pack_panel_any(const Product& call, std::int64_t token, std::int64_t tokens,
                                     std::int64_t panel) {
  WANDA_EXT_FOR_DTYPE(pack_panel, call, token, tokens, panel);
}

}  // namespace wanda_ext
