// Records of a bitmap in vector registers: their 16 values spread to the 32 columns, and back.
//
// Eight columns a step. A byte of the mask is an index into a table of what each of its columns, or
// of its kept columns, is to pick; where the byte starts among the values is the number of bits
// above it.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"
#include "wanda_ext/bitmap.h"

namespace wanda_ext {

constexpr int kBytesPerRecord = kRecordColumns / 8;

// Elements as 32-bit integers, narrower ones widened. Functions take them by reference: the ABI of
// passing one by value depends on the ISA.
typedef std::int32_t Eight __attribute__((vector_size(32)));
typedef std::uint16_t EightHalves __attribute__((vector_size(16)));

// As wide as the registers: gcc widens narrower entries one lane at a time.
struct BitmapTables {
  // How many bits of the byte lie above this one; negative where it is not set.
  std::int32_t rank[256][8];
  // Its set bits, the highest first.
  std::int32_t columns[256][8];

  constexpr BitmapTables() : rank(), columns() {
    for (int byte = 0; byte < 256; ++byte) {
      int count = 0;
      for (int bit = 7; bit >= 0; --bit) {
        const bool set = (byte >> bit & 1) != 0;
        rank[byte][bit] = set ? count : -128;
        if (set) columns[byte][count++] = bit;
      }
    }
  }
};
inline constexpr BitmapTables kBitmapTables;

// Left to find these by itself, gcc goes lane by lane.
WANDA_EXT_INLINE void widen(const std::uint16_t* from, Eight& to) {
  EightHalves halves;
  std::memcpy(&halves, from, sizeof(halves));
  to = __builtin_convertvector(halves, Eight);
}
WANDA_EXT_INLINE void widen(const std::uint32_t* from, Eight& to) {
  std::memcpy(&to, from, sizeof(to));
}
WANDA_EXT_INLINE void narrow(const Eight& from, std::uint16_t* to) {
  const EightHalves halves = __builtin_convertvector(from, EightHalves);
  std::memcpy(to, &halves, sizeof(halves));
}
WANDA_EXT_INLINE void narrow(const Eight& from, std::uint32_t* to) {
  std::memcpy(to, &from, sizeof(from));
}

WANDA_EXT_INLINE std::uint32_t mask_byte(std::uint32_t mask, int byte) {
  return mask >> (8 * byte) & 0xff;
}

// The number of values of columns above a byte.
WANDA_EXT_INLINE int values_above(std::uint32_t mask, int byte) {
  return byte == kBytesPerRecord - 1 ? 0 : count_bits(mask >> (8 * byte + 8));
}

// to[i] = of[index[i]], of the 16 elements of low and high; only the low four bits of an index
// count.
WANDA_EXT_INLINE void pick(const Eight& low, const Eight& high, const Eight& index, Eight& to) {
#if defined(__x86_64__) && !defined(__clang__)
  to = __builtin_shuffle(low, high, index);
#else
  std::int32_t of[16], at[8], picked[8];
  std::memcpy(of, &low, sizeof(low));
  std::memcpy(of + 8, &high, sizeof(high));
  std::memcpy(at, &index, sizeof(index));
  for (int i = 0; i < 8; ++i) picked[i] = of[at[i] & 15];
  std::memcpy(&to, picked, sizeof(to));
#endif
}

// Columns [8 * byte, 8 * byte + 8) of a record with these values, zeros where the mask has none.
// No mask reaches past the 16 values, be it damaged.
WANDA_EXT_INLINE void expand_byte(std::uint32_t mask, int byte, const Eight& low, const Eight& high,
                                  Eight& columns) {
  Eight rank;
  std::memcpy(&rank, kBitmapTables.rank[mask_byte(mask, byte)], sizeof(rank));
  Eight picked;
  pick(low, high, rank + values_above(mask, byte), picked);
  columns = picked & ~(rank >> 31);
}

// (first + c) * times of the columns c that a mask with 16 bits set keeps, the highest first. The
// space after them, up to 24, is written too.
WANDA_EXT_INLINE void kept_columns(std::uint32_t mask, std::int32_t first, std::int32_t times,
                                   std::int32_t* columns) {
#pragma GCC unroll 4
  for (int byte = kBytesPerRecord - 1; byte >= 0; --byte) {
    Eight column;
    std::memcpy(&column, kBitmapTables.columns[mask_byte(mask, byte)], sizeof(column));
    column = (column + (first + 8 * byte)) * times;
    std::memcpy(columns + values_above(mask, byte), &column, sizeof(column));
  }
}

// The inverse of expand_byte: the kept ones of 32 columns go to values[0, 16), for a mask with 16
// bits set. The space after them, up to 24, is written too.
WANDA_EXT_INLINE void compress_record(std::uint32_t mask, const std::int32_t* columns,
                                      std::int32_t* values) {
#pragma GCC unroll 4
  for (int byte = kBytesPerRecord - 1; byte >= 0; --byte) {
    Eight from, index, picked;
    std::memcpy(&from, columns + 8 * byte, sizeof(from));
    std::memcpy(&index, kBitmapTables.columns[mask_byte(mask, byte)], sizeof(index));
    pick(from, from, index, picked);
    std::memcpy(values + values_above(mask, byte), &picked, sizeof(picked));
  }
}

}  // namespace wanda_ext
