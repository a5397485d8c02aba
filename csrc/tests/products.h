// What the tests of linear_* share: a sum in double, and every set of kernels in its turn.
#pragma once

#include <cmath>
#include <cstdio>

#include "check.h"
#include "wanda_ext/ops.h"

namespace wanda_ext::testing {

// Of products, with what their order and the rounding of an fp32 sum may cost.
class ExactSum {
 public:
  void add(double a, double b) {
    sum_ += a * b;
    magnitude_ += std::fabs(a * b);
    ++terms_;
  }

  bool is_near(double y, DType dtype) const {
    const double last_bit = dtype == DType::kFloat32    ? 0x1p-24
                            : dtype == DType::kBFloat16 ? 0x1p-8
                                                        : 0x1p-11;
    const double slack =
        magnitude_ * (terms_ + 2) * 0x1p-24 + std::fabs(sum_) * last_bit * 1.01 + 0x1p-24;
    return std::fabs(y - sum_) <= slack;
  }

 private:
  double sum_ = 0, magnitude_ = 0;
  std::int64_t terms_ = 0;
};

template <typename Test>
void with_all_kernels(const Test& test) {
  int sets = 0;
  for (const char* name : {"amx", "avx512_bf16", "avx512", "avx2", "plain"}) {
    if (!use_cpu_kernels(name).ok()) continue;
    const int before = failures;
    test();
    if (failures > before) std::fprintf(stderr, "  with the kernels of %s\n", cpu_kernels());
    ++sets;
  }
  CHECK(sets >= 1);  // plain is everywhere
}

}  // namespace wanda_ext::testing
