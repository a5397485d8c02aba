// What every test program here uses: checks that count failures, random numbers that are the same
// everywhere, and a matrix of any dtype that notices writes outside its columns.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../core/cpu/dtype.h"
#include "wanda_ext/matrix_view.h"
#include "wanda_ext/status.h"

namespace wanda_ext::testing {

inline int failures = 0;

inline bool check(bool ok, const char* file, int line, const char* text) {
  if (!ok) {
    ++failures;
    std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, text);
  }
  return ok;
}

#define CHECK(condition) \
  ::wanda_ext::testing::check(static_cast<bool>(condition), __FILE__, __LINE__, #condition)

// A Status that is ok, or prints its message.
#define CHECK_OK(expression)                                                             \
  do {                                                                                   \
    const ::wanda_ext::Status check_status = (expression);                               \
    if (!CHECK(check_status.ok())) std::fprintf(stderr, "  %s\n", check_status.message); \
  } while (false)

// A Status of kInvalidArgument whose message holds `part`.
#define CHECK_INVALID(expression, part)                                                        \
  do {                                                                                         \
    const ::wanda_ext::Status check_status = (expression);                                     \
    const bool check_refused = check_status.code == ::wanda_ext::StatusCode::kInvalidArgument; \
    if (!CHECK(check_refused && std::strstr(check_status.message, part) != nullptr)) {         \
      std::fprintf(stderr, "  wanted \"%s\" in \"%s\"\n", part, check_status.message);         \
    }                                                                                          \
  } while (false)

// The end of every main().
inline int finish() {
  std::printf(failures == 0 ? "ok\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}

// SplitMix64.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  // In [0, bound).
  std::int64_t below(std::int64_t bound) {
    return static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(bound));
  }

  // In [-1, 1).
  float uniform() {
    return static_cast<float>(static_cast<std::int64_t>(next() >> 40)) * 0x1p-23f - 1;
  }

 private:
  std::uint64_t state_;
};

constexpr DType kAllDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

class Matrix {
 public:
  Matrix(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t ld)
      : dtype_(dtype), rows_(rows), cols_(cols), ld_(ld) {
    bytes_.assign(static_cast<std::size_t>(rows * ld) * size_of(dtype), 0xff);  // NaN
  }
  Matrix(DType dtype, std::int64_t rows, std::int64_t cols) : Matrix(dtype, rows, cols, cols) {}

  MatrixView view() { return {bytes_.data(), rows_, cols_, ld_, dtype_}; }
  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  DType dtype() const { return dtype_; }

  float get(std::int64_t r, std::int64_t c) const {
    switch (dtype_) {
      case DType::kFloat32:
        return load<float>(r, c);
      case DType::kBFloat16:
        return to_float(load<BFloat16>(r, c));
      default:
        return to_float(load<Float16>(r, c));
    }
  }

  // Rounds to the dtype.
  void set(std::int64_t r, std::int64_t c, float value) {
    switch (dtype_) {
      case DType::kFloat32:
        return store(r, c, value);
      case DType::kBFloat16:
        return store(r, c, from_float<BFloat16>(value));
      default:
        return store(r, c, from_float<Float16>(value));
    }
  }

  void fill(Random& random, float scale = 1) {
    for (std::int64_t r = 0; r < rows_; ++r) {
      for (std::int64_t c = 0; c < cols_; ++c) set(r, c, random.uniform() * scale);
    }
  }

  // Bit for bit, what lies between cols and ld included.
  bool operator==(const Matrix& other) const { return bytes_ == other.bytes_; }

 private:
  std::size_t offset(std::int64_t r, std::int64_t c) const {
    return static_cast<std::size_t>(r * ld_ + c) * size_of(dtype_);
  }
  template <typename T>
  T load(std::int64_t r, std::int64_t c) const {
    T value;
    std::memcpy(&value, bytes_.data() + offset(r, c), sizeof(T));
    return value;
  }
  template <typename T>
  void store(std::int64_t r, std::int64_t c, T value) {
    std::memcpy(bytes_.data() + offset(r, c), &value, sizeof(T));
  }

  DType dtype_;
  std::int64_t rows_;
  std::int64_t cols_;
  std::int64_t ld_;
  std::vector<unsigned char> bytes_;
};

}  // namespace wanda_ext::testing
