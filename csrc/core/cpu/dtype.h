// The three element types and their exact conversions to and from fp32, in integer and float
// operations that vectorise on any ISA and do not depend on a denormals-are-zero mode.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace wanda_ext {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

WANDA_EXT_INLINE std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

WANDA_EXT_INLINE float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// condition ? a : b, without the branch that would keep gcc from vectorising a float computation.
WANDA_EXT_INLINE std::uint32_t select(bool condition, std::uint32_t a, std::uint32_t b) {
  const std::uint32_t mask = 0u - static_cast<std::uint32_t>(condition);
  return (a & mask) | (b & ~mask);
}

WANDA_EXT_INLINE float to_float(float value) { return value; }

WANDA_EXT_INLINE float to_float(BFloat16 value) {
  return float_of(static_cast<std::uint32_t>(value.bits) << 16);
}

WANDA_EXT_INLINE float to_float(Float16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000) << 16;
  const std::int32_t magnitude = value.bits & 0x7fff;
  // Exponent bias 15 -> 127; infinity and NaN keep an exponent of all ones.
  const std::uint32_t rebias = select(magnitude >= 0x7c00, 224u << 23, 112u << 23);
  const std::uint32_t normal = (static_cast<std::uint32_t>(magnitude) << 13) + rebias;
  const std::uint32_t denormal = bits_of(static_cast<float>(magnitude) * 0x1p-24f);
  return float_of(sign | select(magnitude < 0x0400, denormal, normal));
}

// from_float rounds to the nearest, ties to even; a NaN stays a NaN.
template <typename T>
T from_float(float value);

template <>
WANDA_EXT_INLINE float from_float<float>(float value) {
  return value;
}

template <>
WANDA_EXT_INLINE BFloat16 from_float<BFloat16>(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const std::uint32_t nan = (bits >> 16) | 0x0040;
  return {static_cast<std::uint16_t>(select((bits & 0x7fffffff) > 0x7f800000, nan, rounded))};
}

template <>
WANDA_EXT_INLINE Float16 from_float<Float16>(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000;
  const std::uint32_t magnitude = bits & 0x7fffffff;
  // Rounding may carry into the exponent, up to infinity, as it should.
  const std::uint32_t normal = (magnitude - (112u << 23) + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves the value in steps of 2^-24, the denormals' own, in the low mantissa bits.
  const std::uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const std::uint32_t nan = 0x7e00 | ((magnitude >> 13) & 0x01ff);
  const std::uint32_t finite = select(magnitude < (113u << 23), denormal, normal);
  const std::uint32_t overflow = select(magnitude > 0x7f800000, nan, 0x7c00);
  return {static_cast<std::uint16_t>(sign | select(magnitude >= (143u << 23), overflow, finite))};
}

}  // namespace wanda_ext
