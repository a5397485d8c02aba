// The conversions of dtype.h, against the definition of each format, for every 16-bit pattern.
#include "../core/cpu/dtype.h"

#include "check.h"

namespace wanda_ext {
namespace {

// The value of a 16-bit float with that many exponent and mantissa bits, by its definition.
float decode(std::uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int ones = (1 << exponent_bits) - 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & ones;
  const auto mantissa = static_cast<float>(bits & ((1u << mantissa_bits) - 1));
  float value;
  if (exponent == ones) {
    value = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  } else {
    value = std::ldexp(mantissa + static_cast<float>(1 << mantissa_bits),
                       exponent - bias - mantissa_bits);
  }
  return (bits & 0x8000) != 0 ? -value : value;
}

template <typename T>
void test_type(int exponent_bits, int mantissa_bits) {
  int wrong = 0;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T value{static_cast<std::uint16_t>(bits)};
    const float expected = decode(bits, exponent_bits, mantissa_bits);
    if (std::isnan(expected)) {
      wrong += !std::isnan(to_float(value));
      wrong += !std::isnan(to_float(from_float<T>(to_float(value))));
      continue;
    }
    wrong += bits_of(to_float(value)) != bits_of(expected);
    wrong += from_float<T>(expected).bits != bits;
    // Between a finite value and the next larger one: halves to even, the rest to the nearest.
    const std::uint32_t infinity = ((1u << exponent_bits) - 1) << mantissa_bits;
    if ((bits & 0x7fff) >= infinity) continue;
    const std::uint32_t sign = bits & 0x8000;
    const bool to_infinity = (bits & 0x7fff) + 1 == infinity;
    const double next = to_infinity
                            ? std::ldexp(sign ? -1.0 : 1.0, 1 << (exponent_bits - 1))
                            : static_cast<double>(decode(bits + 1, exponent_bits, mantissa_bits));
    const double middle = (static_cast<double>(expected) + next) / 2;
    const auto half = static_cast<float>(middle);
    if (static_cast<double>(half) != middle) continue;  // below what fp32 can hold
    wrong += from_float<T>(half).bits != bits + (bits & 1);
    wrong += from_float<T>(std::nextafter(half, 0.0f)).bits != bits;
    wrong += from_float<T>(std::nextafter(half, sign ? -INFINITY : INFINITY)).bits != bits + 1;
  }
  CHECK(wrong == 0);
  CHECK(from_float<T>(3.4e38f).bits == from_float<T>(INFINITY).bits || exponent_bits == 8);
  CHECK(std::isnan(to_float(from_float<T>(float_of(0x7f800001)))));
  CHECK(std::isnan(to_float(from_float<T>(float_of(0xffffffff)))));
}

}  // namespace
}  // namespace wanda_ext

int main() {
  wanda_ext::test_type<wanda_ext::BFloat16>(8, 7);
  wanda_ext::test_type<wanda_ext::Float16>(5, 10);
  return wanda_ext::testing::finish();
}
