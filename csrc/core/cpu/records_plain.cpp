// Records in plain C++: correct everywhere, fast nowhere.
#include "record_kernels.h"

namespace wanda_ext {
namespace {

template <typename T>
struct PlainLanes {
  using Element = T;
  using X = float;
  static constexpr int kWidth = 8;
  static constexpr int kSums = 4;
  struct Vector {
    float lanes[kWidth];
  };
  using Sum = Vector;

  template <RecordFormat>
  __attribute__((noinline)) static void spread(const T* values, std::uint32_t mask, T* to) {
    for (int c = 0; c < kRecordColumns; ++c) {
      const bool kept = mask >> c & 1;
      to[c] = kept ? *values : T{};
      values += kept;
    }
  }

  template <RecordFormat kFormat>
  __attribute__((noinline)) static void expand(const T* values, std::uint32_t mask,
                                               Vector (&vectors)[4]) {
    T columns[kRecordColumns];
    spread<kFormat>(values, mask, columns);
    for (int c = 0; c < kRecordColumns; ++c) {
      vectors[c / kWidth].lanes[c % kWidth] = to_float(columns[c]);
    }
  }

  static float to_x(T value) { return to_float(value); }
  static Vector load(const float* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
  }
  static void store(float* to, const Vector& vector) { std::memcpy(to, &vector, sizeof(vector)); }

  static void add(Sum& sum, const Vector& a, const Vector& b) {
    for (int i = 0; i < kWidth; ++i) sum.lanes[i] += a.lanes[i] * b.lanes[i];
  }

  static float total(const Sum& sum) {
    const float* s = sum.lanes;
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  }

  __attribute__((noinline)) static void masks_24(const std::uint16_t* words, std::uint32_t* masks) {
    for (int i = 0; i < kRecordsPerStep; ++i) {
      masks[i] = 0;
      for (int byte = 0; byte < 4; ++byte) {
        const int bits = words[2 * i + byte / 2] >> (byte % 2 * 8) & 0xff;
        masks[i] |= static_cast<std::uint32_t>(kNibbleMasks.of_byte[bits]) << (8 * byte);
      }
    }
  }

  __attribute__((noinline)) static void ascending(const T* high, const T* low, T* values) {
    for (int record = 0; record < kRecordsPerStep; ++record) {
      for (int i = 0; i < 8; ++i) {
        values[16 * record + i] = low[8 * record + 7 - i];
        values[16 * record + 8 + i] = high[8 * record + 7 - i];
      }
    }
  }
};

}  // namespace

const RecordKernels* plain_kernels() {
  static constexpr RecordKernels kernels = Kernels<PlainLanes>::table("plain");
  return &kernels;
}

}  // namespace wanda_ext
