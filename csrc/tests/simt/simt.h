// CUDA kernels on the host, one thread at a time: how a kernel is tested where there is no GPU.
//
// A test includes a .cu file and is compiled as C++ with `-I csrc/tests/simt/include`, which stands
// in for the toolkit's headers. A launch runs the blocks one after another. Each CUDA
// thread is a fiber that runs until it waits: for its block (__syncthreads) or for the lanes of its
// warp that a mask names (shuffles, votes, __syncwarp). Under AddressSanitizer and UBSan a kernel's
// mistakes are reported at the line that makes them. Beyond what those find, the launch fails with
// a message when
//   - threads wait for each other for ever, or wait in different barriers or collectives;
//   - a lane is missing from its own mask, or a shuffle reads a lane that takes no part;
//   - the grid, the block or the shared memory is larger than a device takes.
// Shared memory is poisoned for every block: NaN to any float type, absurd to an integer.
// `reverse_order` runs threads and blocks from the last to the first: results that change with it
// miss a barrier or depend on a race. In either order a warp runs as far ahead of the others as
// barriers let it.
//
// Not checked: races as such, memory order, timing. Only what this project's kernels use is here; a
// new intrinsic is one more function below.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/cpu/dtype.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN(call) __sanitizer_##call
#else
#define SIMT_ASAN(call)
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;  // of the thread that runs

// --- Fibers and the scheduler --------------------------------------------------------------------

namespace simt {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr std::size_t kStackBytes = 128 << 10;  // a sanitizer's frames are large
constexpr std::size_t kMaxStaticShared = 48 << 10;
constexpr std::size_t kMaxDynamicShared = 99 << 10;  // of the smallest architecture, sm_86
constexpr std::uint16_t kPoison = 0xfff5;  // as a float of any size NaN, as an int -655371

inline bool reverse_order = false;

inline void poison(void* memory, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; ++i) {
    static_cast<char*>(memory)[i] = static_cast<char>(kPoison >> i % 2 * 8);
  }
}

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;  // AddressSanitizer's
  unsigned rank = 0;
  dim3 index;
  State state = State::kDone;
  const char* waits_in = "";  // the function it waits in, its mask and what it brought there
  unsigned mask = 0;
  std::uint64_t given = 0;
  std::uint64_t received[kWarp];  // of the lanes in `present`, when the wait is over
  unsigned present = 0;
};

// The one block that runs.
struct Machine {
  std::function<void()> kernel;
  std::vector<std::unique_ptr<Thread>> threads;  // fibers outlive a launch; the first ones are used
  unsigned count = 0;
  Thread* current = nullptr;
  ucontext_t scheduler;
  void* fake_stack = nullptr;  // of the scheduler
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
  std::map<const void*, std::vector<char>> static_shared;  // by type
  std::vector<char> dynamic_shared;
  unsigned votes = 0;  // non-zero values brought to the last block barrier
  bool failed = false;
  char message[512] = "no error";
};
inline Machine machine;

__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  if (std::exchange(machine.failed, true)) return;
  const std::size_t room = sizeof(machine.message);
  std::va_list args;
  va_start(args, format);
  const int used = std::vsnprintf(machine.message, room, format, args);
  va_end(args);
  std::snprintf(machine.message + used, room - std::size_t(used), ", in block (%u, %u, %u)",
                blockIdx.x, blockIdx.y, blockIdx.z);
}

inline void to_scheduler() {
  Thread& self = *machine.current;
  SIMT_ASAN(start_switch_fiber(&self.fake_stack, machine.stack, machine.stack_bytes));
  swapcontext(&self.context, &machine.scheduler);
  SIMT_ASAN(finish_switch_fiber(self.fake_stack, nullptr, nullptr));
}

inline void to_thread(Thread& thread) {
  machine.current = &thread;
  threadIdx = thread.index;
  SIMT_ASAN(start_switch_fiber(&machine.fake_stack, thread.stack.get(), kStackBytes));
  swapcontext(&machine.scheduler, &thread.context);
  SIMT_ASAN(finish_switch_fiber(machine.fake_stack, nullptr, nullptr));
}

// Where every fiber starts: one turn for each block it takes part in.
inline void fiber() {
  SIMT_ASAN(finish_switch_fiber(nullptr, &machine.stack, &machine.stack_bytes));
  for (;;) {
    machine.kernel();
    machine.current->state = State::kDone;
    to_scheduler();
  }
}

// Called by kernels, through the collectives below; returns when all that must arrive have.
inline const Thread& wait(State state, const char* function, unsigned mask, std::uint64_t value) {
  Thread& self = *machine.current;
  self.state = state;
  self.waits_in = function;
  self.mask = mask;
  self.given = value;
  to_scheduler();
  return self;
}

inline bool wait_together(const Thread& a, const Thread& b) {
  return a.state == b.state && a.mask == b.mask && std::strcmp(a.waits_in, b.waits_in) == 0;
}

// Lets those lanes of a warp go on whose whole mask has arrived. Whether there were any.
inline bool release_lanes(unsigned first) {
  const unsigned lanes = std::min(kWarp, machine.count - first);
  const auto at = [first](unsigned lane) -> Thread& { return *machine.threads[first + lane]; };
  bool released = false;
  for (unsigned i = 0; i < lanes; ++i) {
    if (at(i).state != State::kAtWarp) continue;
    const unsigned mask = at(i).mask;
    if (!(mask >> i & 1)) {
      fail("thread %u is in %s with mask %#x, without itself", first + i, at(i).waits_in, mask);
    }
    unsigned present = 0;
    bool complete = true;
    std::uint64_t given[kWarp] = {};
    for (unsigned j = 0; j < lanes; ++j) {
      if (!(mask >> j & 1) || at(j).state == State::kDone) continue;
      complete = complete && wait_together(at(j), at(i));
      present |= 1u << j;
      given[j] = at(j).given;
    }
    if (!complete) continue;
    for (unsigned j = 0; j < lanes; ++j) {
      if (!(present >> j & 1)) continue;
      std::copy(given, given + kWarp, at(j).received);
      at(j).present = present;
      at(j).state = State::kReady;
    }
    released = true;
  }
  return released;
}

// Lets the block go on if every live thread stands at the same barrier. Whether there are any.
inline bool release_block() {
  const Thread* first = nullptr;
  machine.votes = 0;
  for (unsigned i = 0; i < machine.count; ++i) {
    Thread& thread = *machine.threads[i];
    if (thread.state == State::kDone) continue;
    if (first == nullptr) first = &thread;
    if (thread.state != State::kAtBlock || std::strcmp(thread.waits_in, first->waits_in) != 0) {
      fail("thread %u waits for ever in %s (mask %#x), thread %u in %s (mask %#x)", i,
           thread.waits_in, thread.mask, first->rank, first->waits_in, first->mask);
      return false;
    }
    machine.votes += thread.given != 0;
    thread.state = State::kReady;
  }
  return first != nullptr;
}

inline void run_warp(unsigned first) {
  const unsigned lanes = std::min(kWarp, machine.count - first);
  for (bool progress = true; progress && !machine.failed;) {
    progress = false;
    for (unsigned i = 0; i < lanes && !machine.failed; ++i) {
      Thread& thread = *machine.threads[first + (reverse_order ? lanes - 1 - i : i)];
      if (thread.state != State::kReady) continue;
      to_thread(thread);
      progress = true;
    }
    progress = release_lanes(first) || progress;
  }
}

inline void run_block() {
  for (unsigned i = 0; i < machine.count; ++i) machine.threads[i]->state = State::kReady;
  do {
    for (unsigned first = 0; first < machine.count; first += kWarp) {
      run_warp(reverse_order ? (machine.count - 1) / kWarp * kWarp - first : first);
    }
  } while (release_block());
}

inline dim3 index_in(dim3 size, std::uint64_t i) {
  return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
}

inline void prepare_threads(unsigned count) {
  machine.count = count;
  while (machine.threads.size() < count) {
    machine.threads.push_back(std::make_unique<Thread>());
    Thread& thread = *machine.threads.back();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, fiber, 0);
  }
  for (unsigned i = 0; i < count; ++i) {
    machine.threads[i]->rank = i;
    machine.threads[i]->index = index_in(blockDim, i);
  }
}

// Whether every thread of every block ran to its end. A block's shared memory is new.
inline bool run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, std::function<void()> body) {
  machine.failed = false;
  blockIdx = dim3(0, 0, 0);
  const auto size_of = [](dim3 d) { return std::uint64_t{d.x} * d.y * d.z; };
  const std::uint64_t threads = size_of(block), blocks = size_of(grid);
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || grid.x > 0x7fffffff ||
      grid.y > 0xffff || grid.z > 0xffff || shared_bytes > kMaxDynamicShared) {
    fail("no device takes a grid of %u x %u x %u, blocks of %u x %u x %u and %zu bytes", grid.x,
         grid.y, grid.z, block.x, block.y, block.z, shared_bytes);
    return false;
  }
  gridDim = grid;
  blockDim = block;
  machine.kernel = std::move(body);
  prepare_threads(static_cast<unsigned>(threads));
  for (std::uint64_t i = 0; i < blocks && !machine.failed; ++i) {
    blockIdx = index_in(grid, reverse_order ? blocks - 1 - i : i);
    machine.static_shared.clear();
    machine.dynamic_shared.resize(shared_bytes);
    poison(machine.dynamic_shared.data(), shared_bytes);
    run_block();
  }
  if (machine.failed) machine.threads.clear();  // they stand in the middle of the kernel
  return !machine.failed;
}

// The block's one object of type T, as a __shared__ variable would be.
template <typename T>
T& block_shared() {
  static_assert(std::is_trivially_default_constructible_v<T> && alignof(T) <= 16);
  static const char type = 0;
  std::vector<char>& memory = machine.static_shared[&type];
  if (memory.empty()) {
    memory.resize(sizeof(T));
    poison(memory.data(), sizeof(T));
    std::size_t bytes = 0;
    for (const auto& object : machine.static_shared) bytes += object.second.size();
    if (bytes > kMaxStaticShared) fail("%zu bytes of static shared memory", bytes);
  }
  return *reinterpret_cast<T*>(memory.data());
}

// In place of an `extern __shared__` array.
inline void* dynamic_shared() { return machine.dynamic_shared.data(); }

// Every lane of the mask brings a value and gets back `combine(lanes present, their values)`.
template <typename T, typename Combine>
auto collective(const char* function, unsigned mask, T value, Combine combine) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Thread& self = wait(State::kAtWarp, function, mask, bits);
  T values[kWarp];
  for (unsigned i = 0; i < kWarp; ++i) std::memcpy(&values[i], &self.received[i], sizeof(T));
  return combine(self.present, values);
}

template <typename T>
T shuffle(const char* function, unsigned mask, T value, unsigned lane) {
  return collective(function, mask, value, [&](unsigned present, const T* values) {
    if (!(present >> lane & 1)) fail("%s reads lane %u, which takes no part", function, lane);
    return values[lane];
  });
}

// The lanes that bring the wanted value.
template <typename T>
unsigned lanes_with(const char* function, unsigned mask, T value, T wanted) {
  return collective(function, mask, value, [&](unsigned present, const T* values) {
    unsigned lanes = 0;
    for (unsigned i = 0; i < kWarp; ++i) lanes |= unsigned{values[i] == wanted} << i;
    return lanes & present;
  });
}

inline unsigned lane() { return machine.current->rank % kWarp; }

}  // namespace simt

// --- CUDA C++ ------------------------------------------------------------------------------------

inline void __syncthreads() { simt::wait(simt::State::kAtBlock, "__syncthreads", 0, 0); }
inline int __syncthreads_or(int predicate) {
  simt::wait(simt::State::kAtBlock, "__syncthreads_or", 0, predicate != 0);
  return simt::machine.votes != 0;
}
inline void __syncwarp(unsigned mask) { simt::wait(simt::State::kAtWarp, "__syncwarp", mask, 0); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return simt::lanes_with("__ballot_sync", mask, predicate != 0, true);
}
inline int __any_sync(unsigned mask, int predicate) {
  return simt::lanes_with("__any_sync", mask, predicate != 0, true) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return simt::lanes_with("__all_sync", mask, predicate != 0, false) == 0;
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return simt::collective("__reduce_add_sync", mask, value, [](unsigned present, const T* values) {
    T sum = 0;
    for (unsigned i = 0; i < simt::kWarp; ++i) sum += present >> i & 1 ? values[i] : T{0};
    return sum;
  });
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return simt::shuffle("__shfl_sync", mask, value, static_cast<unsigned>(lane) % simt::kWarp);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return simt::shuffle("__shfl_xor_sync", mask, value, simt::lane() ^ static_cast<unsigned>(bits));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const unsigned from = simt::lane() < by ? simt::lane() : simt::lane() - by;
  return simt::shuffle("__shfl_up_sync", mask, value, from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const unsigned from = simt::lane() + by < simt::kWarp ? simt::lane() + by : simt::lane();
  return simt::shuffle("__shfl_down_sync", mask, value, from);
}

// Of integers only: sums of floats in the order of arrival would not have the same bits twice.
template <typename T>
T simt_exchange(T* place, T value) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4);
  return std::exchange(*place, value);
}
template <typename T>
T atomicAdd(T* place, std::common_type_t<T> value) {
  return simt_exchange(place, static_cast<T>(*place + value));
}
template <typename T>
T atomicMin(T* place, std::common_type_t<T> value) {
  return simt_exchange(place, std::min(*place, value));
}
template <typename T>
T atomicMax(T* place, std::common_type_t<T> value) {
  return simt_exchange(place, std::max(*place, value));
}
template <typename T>
T atomicCAS(T* place, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return simt_exchange(place, *place == expected ? value : *place);
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __float_as_uint(float value) { return wanda_ext::bits_of(value); }
inline float __fmul_rn(float a, float b) { return a * b; }  // with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }
