// __half on the host.
#pragma once

#include "core/cpu/dtype.h"

struct __half {
  wanda_ext::Float16 value;
};

inline float __half2float(__half value) { return wanda_ext::to_float(value.value); }
inline __half __float2half_rn(float value) {
  return {wanda_ext::from_float<wanda_ext::Float16>(value)};
}
