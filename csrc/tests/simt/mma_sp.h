// The host twins of core/cuda/mma_sp.h: asynchronous copies, and the matrix instructions of a warp
// as the PTX ISA lays them out over its lanes.
//
// A copy happens when its thread waits for it and no sooner; until then its destination is kPoison,
// for a device may write there at any time. So a missing wait or barrier gives wrong results. The
// launch fails with a message when
//   - a copy is not on 16 bytes, or a thread ends before its last one is done;
//   - a lane is missing from a matrix instruction;
//   - the metadata of a 2:4 group does not name two columns, the lower one first.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "simt.h"

namespace simt {

struct Copy {
  void* to;
  std::array<char, 16> bytes;
};

// What a lane brings to mma_sp.
struct Operands {
  float a[8], b[8];
  unsigned meta;
};

// What a thread has under way.
struct Pipeline {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  // In turn, so that a lane may bring the next ones while others still read these.
  Operands operands[2];
  unsigned turn = 0;
};
inline std::array<Pipeline, kMaxThreads> pipelines;

inline Pipeline& pipeline() { return pipelines[machine.current->rank]; }

using SharedAddress = std::uintptr_t;

inline SharedAddress to_shared(const void* memory) {
  return reinterpret_cast<SharedAddress>(memory);
}

inline void copy_async(void* shared, const void* global, bool inside) {
  const auto bits = [](const void* address) { return reinterpret_cast<std::uintptr_t>(address); };
  if ((bits(shared) | bits(global)) % 16 != 0) {
    fail("copy_async from %p to %p, which must lie on 16 bytes", global, shared);
  }
  Copy copy = {shared, {}};
  if (inside) std::memcpy(copy.bytes.data(), global, 16);
  poison(shared, 16);
  pipeline().open.push_back(copy);
}

inline void commit_copies() { pipeline().groups.push_back(std::exchange(pipeline().open, {})); }

template <int kPending>
void wait_copies() {
  auto& groups = pipeline().groups;
  while (groups.size() > kPending) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.bytes.data(), 16);
    groups.erase(groups.begin());
  }
}

// What a thread does when its kernel returns.
inline void end_thread() {
  std::size_t copies = pipeline().open.size();
  for (const auto& group : pipeline().groups) copies += group.size();
  if (copies > 0) fail("thread %u ends with %zu copies under way", machine.current->rank, copies);
  pipeline().groups.clear();
}

inline void load_matrices(unsigned (&fragment)[4], const void* row) {
  collective("load_matrices", ~0u, row, [&](unsigned present, const void* const* rows) {
    if (present != ~0u) return fail("load_matrices without all lanes: %#x", present);
    for (unsigned i = 0; i < 4; ++i) {
      const auto* from = static_cast<const char*>(rows[i * 8 + lane() / 4]);
      if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
        fail("load_matrices from %p, which must lie on 16 bytes", rows[i * 8 + lane() / 4]);
      }
      std::memcpy(&fragment[i], from + lane() % 4 * 4, 4);
    }
  });
}

template <typename T>
void as_floats(const unsigned (&fragment)[4], float (&values)[8]) {
  T elements[8];
  static_assert(sizeof(elements) == sizeof(fragment));
  std::memcpy(elements, fragment, sizeof(fragment));
  for (int i = 0; i < 8; ++i) values[i] = wanda_ext::to_float(elements[i].value);
}

template <typename T, int kSelector>
void mma_sp(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned meta) {
  Operands& mine = pipeline().operands[pipeline().turn];
  as_floats<T>(a, mine.a);
  as_floats<T>(b, mine.b);
  mine.meta = meta;
  const unsigned turn = std::exchange(pipeline().turn, 1 - pipeline().turn);
  const unsigned present = wait(State::kAtWarp, "mma_sp", ~0u, 0).present;
  if (present != ~0u) return fail("mma_sp without all lanes: %#x", present);

  const unsigned first = machine.current->rank - lane();
  const auto of = [&](unsigned lane) -> const Operands& {
    return pipelines[first + lane].operands[turn];
  };
  const unsigned group = lane() / 4 * 4;   // of four lanes, that share rows of A and D
  const unsigned column = lane() % 4 * 2;  // of B and D
  for (unsigned half = 0; half < 2; ++half) {
    for (unsigned i = 0; i < 16; ++i) {  // the kept elements of a row of A
      const float value = of(group + i % 8 / 2).a[i / 8 * 4 + half * 2 + i % 2];
      const unsigned word = of(group + 2 * kSelector + i / 8).meta >> 16 * half & 0xffff;
      const unsigned nibble = word >> i % 8 / 2 * 4 & 15;
      if ((nibble & 3) >= nibble >> 2) fail("mma_sp with the metadata %#x", nibble);
      const unsigned k = i / 2 * 4 + (i % 2 == 0 ? nibble & 3 : nibble >> 2);
      for (unsigned c = 0; c < 2; ++c) {
        sum[half * 2 + c] += value * of((column + c) * 4 + k % 8 / 2).b[k / 8 * 2 + k % 2];
      }
    }
  }
}

// Kernels run one after another.
inline void allow_next_kernel() {}
inline void await_previous_kernel() {}

}  // namespace simt
