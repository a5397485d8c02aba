// The host twins of core/cuda/bitmap_ptx.h. The launch fails with a message when
//   - a lane stores a half outside its own bank, where it would meet another lane;
//   - a load of records or of x is not aligned;
//   - a lane is missing from the matrix instruction.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "mma_sp.h"

namespace simt {

template <typename Value>
void keep(Value&) {}

inline unsigned highest_bit(unsigned bits) {
  return bits == 0 ? ~0u : 31 - static_cast<unsigned>(__builtin_clz(bits));
}

inline unsigned bits_below(unsigned bits, unsigned place) {
  return place < 32 ? bits & ((1u << place) - 1) : bits;
}

inline unsigned select_bytes(unsigned low, unsigned high, unsigned selector) {
  const std::uint64_t from = std::uint64_t{high} << 32 | low;
  unsigned bytes = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned digit = selector >> 4 * i & 15;
    unsigned byte = from >> 8 * (digit % 8) & 0xff;
    if (digit >= 8) byte = byte >> 7 ? 0xff : 0;
    bytes |= byte << 8 * i;
  }
  return bytes;
}

// Banks count from a multiple of 128 bytes, which the kernel's own alignment gives.
inline void store_half(SharedAddress to, unsigned bits) {
  if (to / 4 % kWarp != lane()) fail("lane %u stores in bank %zu", lane(), to / 4 % kWarp);
  const auto half = static_cast<std::uint16_t>(bits);
  std::memcpy(reinterpret_cast<void*>(to), &half, sizeof(half));
}

inline unsigned load_word(SharedAddress from) {
  unsigned word;
  std::memcpy(&word, reinterpret_cast<const void*>(from), sizeof(word));
  return word;
}

template <typename Words>
void load_once(Words& to, const void* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % sizeof(to) != 0) {
    fail("load_once from %p, which must lie on %zu bytes", from, sizeof(to));
  }
  std::memcpy(&to, from, sizeof(to));
}

template <typename T>
void mma(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
         unsigned b1) {
  Operands& mine = pipeline().operands[pipeline().turn];
  as_floats<T>({a0, a1, a2, a3}, mine.a);
  as_floats<T>({b0, b1, 0, 0}, mine.b);
  const unsigned turn = std::exchange(pipeline().turn, 1 - pipeline().turn);
  const unsigned present = wait(State::kAtWarp, "mma", ~0u, 0).present;
  if (present != ~0u) return fail("mma without all lanes: %#x", present);
  const unsigned first = machine.current->rank - lane();
  for (unsigned s = 0; s < 4; ++s) {
    const unsigned half = s / 2, row = lane() / 4, column = lane() % 4 * 2 + s % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned owner = k % 8 / 2;
      const float a =
          pipelines[first + row * 4 + owner].operands[turn].a[k / 8 * 4 + half * 2 + k % 2];
      const float b = pipelines[first + column * 4 + owner].operands[turn].b[k / 8 * 2 + k % 2];
      sum[s] += a * b;
    }
  }
}

}  // namespace simt
