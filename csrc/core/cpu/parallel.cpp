#include "wanda_ext/parallel.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace wanda_ext {
namespace {

void run_serial(void*, std::int64_t chunks, ParallelFor::Body body, void* context) {
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) body(context, chunk);
}

// `self` is the number of threads itself: there is no pool to point to.
void run_std_threads(void* self, std::int64_t chunks, ParallelFor::Body body, void* context) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t chunk = next++; chunk < chunks; chunk = next++) body(context, chunk);
  };
  const auto threads = static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(self));
  std::vector<std::thread> others;
  try {
    for (std::int64_t i = 1; i < threads && i < chunks; ++i) others.emplace_back(work);
  } catch (const std::exception&) {
    // The system has no thread or memory left for another; those there are do all the chunks.
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace

ParallelFor serial() { return {1, run_serial, nullptr}; }

ParallelFor std_threads(int threads) {
  if (threads < 1) threads = 1;
  return {threads, run_std_threads, reinterpret_cast<void*>(static_cast<std::intptr_t>(threads))};
}

}  // namespace wanda_ext
