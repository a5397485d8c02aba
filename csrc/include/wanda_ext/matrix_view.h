// Raw-pointer views of row-major matrices: what every op takes instead of a tensor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wanda_ext {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr std::size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

constexpr const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

// Element (r, c) is at data[r * ld + c]; ld counts elements and is at least cols.
struct MatrixView {
  void* data;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t ld;
  DType dtype;
};

struct ConstMatrixView {
  const void* data;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t ld;
  DType dtype;

  ConstMatrixView(const void* data, std::int64_t rows, std::int64_t cols, std::int64_t ld,
                  DType dtype)
      : data(data), rows(rows), cols(cols), ld(ld), dtype(dtype) {}
  ConstMatrixView(const MatrixView& view)  // NOLINT: a view to const, as T* to const T*
      : data(view.data), rows(view.rows), cols(view.cols), ld(view.ld), dtype(view.dtype) {}
};

}  // namespace wanda_ext
