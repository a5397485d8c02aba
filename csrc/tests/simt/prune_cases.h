// Random weights and norms that hold what pruning can go wrong on.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/check.h"

namespace wanda_ext::testing {

// weight [n,k] inside a buffer whose other elements must stay; `skip` moves it off its alignment.
struct PruneCase {
  Matrix weight;
  std::int64_t skip;
  std::vector<float> norms;
  bool with_norm;

  PruneCase(Random& random, DType dtype, std::int64_t n, std::int64_t k, std::int64_t skip,
            bool with_norm)
      : weight(dtype, n, skip + k + random.below(2) * 8), skip(skip), with_norm(with_norm) {
    cols_ = k;
    weight.fill(random);
    for (std::int64_t c = 0; c < k; ++c) norms.push_back(1 + random.uniform());
  }

  std::int64_t k() const { return cols_; }
  const float* norm() const { return with_norm ? norms.data() : nullptr; }
  void set(std::int64_t r, std::int64_t c, float value) { weight.set(r, skip + c, value); }

  MatrixView view_of(Matrix& matrix) const {
    MatrixView view = matrix.view();
    view.data =
        static_cast<char*>(view.data) + static_cast<std::size_t>(skip) * size_of(view.dtype);
    view.cols = cols_;
    return view;
  }

 private:
  std::int64_t cols_;
};

// What may happen to a row; several at once where they leave each other room.
inline void disturb_row(Random& random, PruneCase& test, std::int64_t row) {
  const std::int64_t k = test.k();
  const float value = random.uniform();
  const float limit = test.weight.dtype() == DType::kFloat16 ? 0x1p-24f : 0x1p-149f;
  switch (random.below(8)) {
    case 0:  // all equal
      for (std::int64_t c = 0; c < k; ++c) test.set(row, c, random.below(2) ? value : -value);
      break;
    case 1:  // zeros of both signs
      for (std::int64_t c = 0; c < k; ++c) {
        if (random.below(2)) test.set(row, c, random.below(2) ? 0.0f : -0.0f);
      }
      break;
    case 2:  // denormals
      for (std::int64_t c = 0; c < k; ++c) {
        if (random.below(2)) test.set(row, c, limit * static_cast<float>(random.below(50) - 25));
      }
      break;
    case 3:  // few values, so many ties
      for (std::int64_t c = 0; c < k; ++c)
        test.set(row, c, static_cast<float>(random.below(5) - 2));
      break;
    case 4: {
      const float bad[] = {NAN, INFINITY, -INFINITY};
      if (random.below(2)) test.set(row, random.below(k), bad[random.below(3)]);
      break;
    }
    case 5: {  // powers of two, in some rows 2.0 alone: few bits, the highest of an exponent
      const std::int64_t exponents = random.below(2) ? 1 : 15;
      for (std::int64_t c = 0; c < k; ++c) {
        test.set(row, c, std::ldexp(1.0f, static_cast<int>(1 + random.below(exponents))));
      }
      break;
    }
    default:
      break;
  }
}

inline PruneCase random_prune_case(Random& random, std::int64_t n, std::int64_t k) {
  PruneCase test(random, kAllDTypes[random.below(3)], n, k, random.below(3) == 0 ? 1 : 0,
                 random.below(3) != 0);
  for (std::int64_t row = 0; row < n; ++row) disturb_row(random, test, row);
  if (random.below(3) == 0) {
    for (float& norm : test.norms) norm = static_cast<float>(random.below(3));
  }
  if (random.below(12) == 0) test.norms[static_cast<std::size_t>(random.below(k))] = INFINITY;
  return test;
}

}  // namespace wanda_ext::testing
