// __nv_bfloat16 on the host.
#pragma once

#include "core/cpu/dtype.h"

struct __nv_bfloat16 {
  wanda_ext::BFloat16 value;
};

inline float __bfloat162float(__nv_bfloat16 value) { return wanda_ext::to_float(value.value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return {wanda_ext::from_float<wanda_ext::BFloat16>(value)};
}
