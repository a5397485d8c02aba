// Scores one at a time, for the references that the selections are compared with.
#pragma once

#include <cmath>
#include <cstdint>

#include "check.h"

namespace wanda_ext::testing {

inline float score(const Matrix& weight, const float* input_norm, std::int64_t r, std::int64_t c) {
  const float magnitude = std::fabs(weight.get(r, c));
  return input_norm == nullptr ? magnitude : magnitude * input_norm[c];
}

// Whether a row holds a score that is NaN or infinite.
inline bool is_bad(const Matrix& weight, const float* input_norm, std::int64_t r) {
  for (std::int64_t c = 0; c < weight.cols(); ++c) {
    if (!std::isfinite(score(weight, input_norm, r, c))) return true;
  }
  return false;
}

}  // namespace wanda_ext::testing
