// The kernels of one instruction set, made of its Lanes and of the formats' Rows. Included as
// record_rows.h is.
//
// Lanes<T> says how elements of type T are computed with:
//
//   Element        T
//   X              the type x is brought to, and panels are of: the kernels multiply these
//   Vector         of X, kWidth of them; a record is 32 / kWidth vectors
//   Sum            an accumulator of fp32 lanes
//   kSums          how many of these the registers hold, beside what a step needs
//   expand<format>(values, mask, vectors)   a record in vectors
//   spread<format>(values, mask, to)        a record as 32 elements in memory
//   load, store, add, total                 of vectors and sums
//   masks_24, ascending                     what record_rows.h needs
//
// The sum behind y[m,n]: lane i adds up the products of the columns that vectors bring it, in
// order; `total` adds up the lanes; then come the surplus, summed in order from +0, and the bias,
// before the one rounding. So it depends on k alone, whatever m is and however rows are shared out.
#pragma once

#include <algorithm>

#include "record_rows.h"

namespace wanda_ext {
namespace {

template <typename T>
WANDA_EXT_INLINE float surplus_of(const RecordProduct& product, std::int64_t token,
                                  std::int64_t row) {
  const Surplus& surplus = product.weight.surplus;
  const T* x = static_cast<const T*>(product.x.data) + token * product.x.ld;
  float sum = 0;
  for (std::int64_t i = surplus.rows[row]; i < surplus.rows[row + 1]; ++i) {
    sum += to_float(static_cast<const T*>(surplus.values)[i]) * to_float(x[surplus.columns[i]]);
  }
  return sum;
}

template <typename T>
WANDA_EXT_INLINE void write(const RecordProduct& product, std::int64_t token, std::int64_t row,
                            float sum) {
  if (row >= product.weight.n) return;
  if (product.weight.surplus.rows != nullptr) sum += surplus_of<T>(product, token, row);
  if (product.bias != nullptr) sum += to_float(static_cast<const T*>(product.bias)[row]);
  static_cast<T*>(product.y.data)[token * product.y.ld + row] = from_float<T>(sum);
}

// --- x as Lanes::X, [m, padded columns] ---

template <class Lanes>
void prepare_tokens(const RecordProduct& product, std::int64_t block) {
  using T = typename Lanes::Element;
  using X = typename Lanes::X;
  const std::int64_t columns = padded_columns(product.x.cols);
  const std::int64_t end = std::min(product.x.rows, 16 * block + 16);
  for (std::int64_t token = 16 * block; token < end; ++token) {
    const T* from = static_cast<const T*>(product.x.data) + token * product.x.ld;
    X* to = static_cast<X*>(product.prepared) + token * columns;
    for (std::int64_t c = 0; c < product.x.cols; ++c) to[c] = Lanes::to_x(from[c]);
    for (std::int64_t c = product.x.cols; c < columns; ++c) to[c] = X{};
  }
}

// --- A few tokens: records are expanded in registers ---

// Several rows side by side, so that their sums do not wait for one another.
template <class Lanes, RecordFormat kFormat, int kRows, int kTokens, bool kSure>
WANDA_EXT_INLINE void multiply_step(Rows<Lanes, kFormat, kRows>& rows, std::int64_t step,
                                    const typename Lanes::X* x, std::int64_t ld,
                                    Step<typename Lanes::Element> (&steps)[kRows],
                                    typename Lanes::Sum (&sums)[kRows][kTokens]) {
  constexpr int kVectors = kRecordColumns / Lanes::kWidth;
  const typename Lanes::Element* values[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) values[r] = rows.template next<kSure>(r, step, steps[r]);
#pragma GCC unroll 4
  for (int record = 0; record < kRecordsPerStep; ++record) {
    typename Lanes::Vector at[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t) {
      const typename Lanes::X* token =
          x + t * ld + step * kColumnsPerStep + record * kRecordColumns;
      for (int v = 0; v < kVectors; ++v) at[t][v] = Lanes::load(token + v * Lanes::kWidth);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      typename Lanes::Vector vectors[kVectors];
      const std::uint32_t mask = steps[r].masks[record];
      Lanes::template expand<kFormat>(values[r], mask, vectors);
      values[r] = next_record<kFormat>(values[r], mask);
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kVectors; ++v) Lanes::add(sums[r][t], vectors[v], at[t][v]);
      }
    }
  }
}

template <class Lanes, RecordFormat kFormat, int kTokens>
WANDA_EXT_INLINE void multiply_few(const RecordProduct& product, std::int64_t begin,
                                   std::int64_t end) {
  constexpr int kShare = Lanes::kSums / kTokens;
  constexpr int kRows = kShare >= 8 ? 8 : kShare >= 4 ? 4 : kShare >= 2 ? 2 : 1;
  const std::int64_t columns = padded_columns(product.x.cols);
  const auto* x = static_cast<const typename Lanes::X*>(product.prepared);
  Step<typename Lanes::Element> steps[kRows];
  for (std::int64_t row = begin; row < end; row += kRows) {
    Rows<Lanes, kFormat, kRows> rows(product.weight, row);
    typename Lanes::Sum sums[kRows][kTokens] = {};
    std::int64_t step = 0;
    for (; step < rows.sure_steps(); ++step) {
      multiply_step<Lanes, kFormat, kRows, kTokens, true>(rows, step, x, columns, steps, sums);
    }
    for (; step < steps_of(product.x.cols); ++step) {
      multiply_step<Lanes, kFormat, kRows, kTokens, false>(rows, step, x, columns, steps, sums);
    }
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kTokens; ++t) {
        write<typename Lanes::Element>(product, t, row + r, Lanes::total(sums[r][t]));
      }
    }
  }
}

// --- More tokens: rows are expanded once into a panel, which all tokens use ---

constexpr int kPanelRows = 4;

template <class Lanes, RecordFormat kFormat, bool kSure>
WANDA_EXT_INLINE void expand_step(Rows<Lanes, kFormat, kPanelRows>& rows, std::int64_t step,
                                  Step<typename Lanes::Element> (&steps)[kPanelRows],
                                  typename Lanes::X* panel, std::int64_t ld) {
  constexpr int kVectors = kRecordColumns / Lanes::kWidth;
#pragma GCC unroll 4
  for (int r = 0; r < kPanelRows; ++r) {
    const typename Lanes::Element* values = rows.template next<kSure>(r, step, steps[r]);
    typename Lanes::X* to = panel + r * ld + step * kColumnsPerStep;
#pragma GCC unroll 4
    for (int record = 0; record < kRecordsPerStep; ++record) {
      typename Lanes::Vector vectors[kVectors];
      const std::uint32_t mask = steps[r].masks[record];
      Lanes::template expand<kFormat>(values, mask, vectors);
      values = next_record<kFormat>(values, mask);
      for (int v = 0; v < kVectors; ++v, to += Lanes::kWidth) Lanes::store(to, vectors[v]);
    }
  }
}

template <class Lanes, int kTokens>
WANDA_EXT_INLINE void multiply_panel(const RecordProduct& product, const typename Lanes::X* panel,
                                     std::int64_t row, std::int64_t token) {
  using X = typename Lanes::X;
  const std::int64_t columns = padded_columns(product.x.cols);
  const X* x = static_cast<const X*>(product.prepared) + token * columns;
  typename Lanes::Sum sums[kPanelRows][kTokens] = {};
  for (std::int64_t c = 0; c < columns; c += Lanes::kWidth) {
    typename Lanes::Vector vectors[kPanelRows];
#pragma GCC unroll 4
    for (int r = 0; r < kPanelRows; ++r) vectors[r] = Lanes::load(panel + r * columns + c);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const typename Lanes::Vector at = Lanes::load(x + t * columns + c);
#pragma GCC unroll 4
      for (int r = 0; r < kPanelRows; ++r) Lanes::add(sums[r][t], vectors[r], at);
    }
  }
  for (int r = 0; r < kPanelRows; ++r) {
    for (int t = 0; t < kTokens; ++t) {
      write<typename Lanes::Element>(product, token + t, row + r, Lanes::total(sums[r][t]));
    }
  }
}

// Not of one format.
template <class Lanes>
void multiply_panel(const RecordProduct& product, const typename Lanes::X* panel,
                    std::int64_t row) {
  constexpr int kTokens = Lanes::kSums / kPanelRows;
  std::int64_t t = 0;
  for (; t + kTokens <= product.x.rows; t += kTokens) {
    multiply_panel<Lanes, kTokens>(product, panel, row, t);
  }
  for (; t < product.x.rows; ++t) multiply_panel<Lanes, 1>(product, panel, row, t);
}

template <class Lanes, RecordFormat kFormat>
WANDA_EXT_INLINE void multiply_many(const RecordProduct& product, std::int64_t begin,
                                    std::int64_t end, typename Lanes::X* panel) {
  const std::int64_t columns = padded_columns(product.x.cols);
  Step<typename Lanes::Element> steps[kPanelRows];
  for (std::int64_t row = begin; row < end; row += kPanelRows) {
    Rows<Lanes, kFormat, kPanelRows> rows(product.weight, row);
    std::int64_t step = 0;
    for (; step < rows.sure_steps(); ++step) {
      expand_step<Lanes, kFormat, true>(rows, step, steps, panel, columns);
    }
    for (; step < steps_of(product.x.cols); ++step) {
      expand_step<Lanes, kFormat, false>(rows, step, steps, panel, columns);
    }
    multiply_panel<Lanes>(product, panel, row);
  }
}

template <class Lanes, RecordFormat kFormat>
void multiply_rows(const RecordProduct& product, std::int64_t begin, std::int64_t end,
                   void* panel) {
  static_assert(kFewTokens == 4, "one case for each number of tokens");
  switch (product.x.rows) {
    case 1:
      return multiply_few<Lanes, kFormat, 1>(product, begin, end);
    case 2:
      return multiply_few<Lanes, kFormat, 2>(product, begin, end);
    case 3:
      return multiply_few<Lanes, kFormat, 3>(product, begin, end);
    case 4:
      return multiply_few<Lanes, kFormat, 4>(product, begin, end);
    default:
      return multiply_many<Lanes, kFormat>(product, begin, end,
                                           static_cast<typename Lanes::X*>(panel));
  }
}

// --- W itself ---

template <class Lanes, RecordFormat kFormat, bool kSure>
WANDA_EXT_INLINE void spread_step(Rows<Lanes, kFormat, 1>& rows, std::int64_t step,
                                  Step<typename Lanes::Element>& to_step,
                                  typename Lanes::Element* to) {
  const typename Lanes::Element* values = rows.template next<kSure>(0, step, to_step);
#pragma GCC unroll 4
  for (int record = 0; record < kRecordsPerStep; ++record, to += kRecordColumns) {
    Lanes::template spread<kFormat>(values, to_step.masks[record], to);
    values = next_record<kFormat>(values, to_step.masks[record]);
  }
}

template <class Lanes, RecordFormat kFormat>
void unpack_rows(const RecordWeight& weight, std::int64_t begin, std::int64_t end,
                 const MatrixView& dense) {
  using T = typename Lanes::Element;
  Step<T> spread;
  for (std::int64_t row = begin; row < end; ++row) {
    Rows<Lanes, kFormat, 1> rows(weight, row);
    T* to = static_cast<T*>(dense.data) + row * dense.ld;
    const std::int64_t whole = weight.k / kColumnsPerStep;
    const std::int64_t sure = std::min(rows.sure_steps(), whole);
    std::int64_t step = 0;
    for (; step < sure; ++step) {
      spread_step<Lanes, kFormat, true>(rows, step, spread, to + step * kColumnsPerStep);
    }
    for (; step < steps_of(weight.k); ++step) {
      T columns[kColumnsPerStep];
      spread_step<Lanes, kFormat, false>(rows, step, spread, columns);
      const std::int64_t first = step * kColumnsPerStep;
      const std::int64_t some = std::min<std::int64_t>(kColumnsPerStep, weight.k - first);
      std::memcpy(to + first, columns, static_cast<std::size_t>(some) * sizeof(T));
    }
    const Surplus& surplus = weight.surplus;
    if (surplus.rows == nullptr) continue;
    for (std::int64_t i = surplus.rows[row]; i < surplus.rows[row + 1]; ++i) {
      to[surplus.columns[i]] = static_cast<const T*>(surplus.values)[i];
    }
  }
}

// --- The table ---

template <template <typename> class Lanes>
struct Kernels {
  // call(Lanes<T>{}) with the T of a dtype.
  template <typename Call>
  static WANDA_EXT_INLINE auto for_dtype(DType dtype, const Call& call) {
    switch (dtype) {
      case DType::kFloat32:
        return call(Lanes<float>{});
      case DType::kBFloat16:
        return call(Lanes<BFloat16>{});
      default:
        return call(Lanes<Float16>{});
    }
  }

  static std::size_t prepared_bytes(DType dtype, std::int64_t m, std::int64_t k) {
    const auto elements = static_cast<std::size_t>(m * padded_columns(k));
    return elements *
           for_dtype(dtype, [](auto lanes) { return sizeof(typename decltype(lanes)::X); });
  }

  static std::size_t panel_bytes(DType dtype, std::int64_t m, std::int64_t k) {
    return m <= kFewTokens ? 0 : prepared_bytes(dtype, kPanelRows, k);
  }

  static void prepare_x(const RecordProduct& product, std::int64_t block) {
    for_dtype(product.x.dtype,
              [&](auto lanes) { prepare_tokens<decltype(lanes)>(product, block); });
  }

  static void multiply(const RecordProduct& product, std::int64_t begin, std::int64_t end,
                       void* panel) {
    for_dtype(product.x.dtype, [&](auto lanes) {
      using L = decltype(lanes);
      switch (product.weight.format) {
        case RecordFormat::k24:
          return multiply_rows<L, RecordFormat::k24>(product, begin, end, panel);
        case RecordFormat::kBitmap:
          return multiply_rows<L, RecordFormat::kBitmap>(product, begin, end, panel);
        default:
          return multiply_rows<L, RecordFormat::kStream>(product, begin, end, panel);
      }
    });
  }

  static void unpack(const RecordWeight& weight, std::int64_t begin, std::int64_t end,
                     const MatrixView& dense) {
    for_dtype(weight.dtype, [&](auto lanes) {
      using L = decltype(lanes);
      switch (weight.format) {
        case RecordFormat::k24:
          return unpack_rows<L, RecordFormat::k24>(weight, begin, end, dense);
        case RecordFormat::kBitmap:
          return unpack_rows<L, RecordFormat::kBitmap>(weight, begin, end, dense);
        default:
          return unpack_rows<L, RecordFormat::kStream>(weight, begin, end, dense);
      }
    });
  }

  static constexpr RecordKernels table(const char* name) {
    return {name, prepared_bytes, panel_bytes, prepare_x, multiply, unpack};
  }
};

}  // namespace
}  // namespace wanda_ext
