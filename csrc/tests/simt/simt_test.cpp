// The shim itself: what it computes and, above all, what it refuses.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../check.h"

namespace wanda_ext {
namespace {

cudaError_t run(unsigned blocks, unsigned threads, void (*kernel)(unsigned*), unsigned* data,
                std::size_t shared_bytes = 0) {
  cudaLaunchConfig_t config;
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, data);
}

bool failed_with(cudaError_t error, const char* part) {
  return error != cudaSuccess && std::strstr(cudaGetErrorString(error), part) != nullptr;
}

struct Totals {
  unsigned of_warp[32];
};

// out[block] = sum of the ranks of its threads, through shuffles, shared memory and a barrier.
__global__ void sum_ranks(unsigned* out) {
  Totals& totals = simt::block_shared<Totals>();
  unsigned value = threadIdx.x;
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
  if (threadIdx.x % 32 == 0) totals.of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x > 0) return;  // an exit is no barrier
  for (unsigned w = 0; w < blockDim.x / 32; ++w) atomicAdd(&out[blockIdx.x], totals.of_warp[w]);
}

__global__ void collectives(unsigned* wrong) {
  const unsigned lane = threadIdx.x % 32;
  unsigned bad = 0;
  bad += __ballot_sync(~0u, lane % 3 == 0) != 0x49249249;
  bad += __shfl_sync(~0u, lane, 5) != 5;
  bad += __shfl_up_sync(~0u, lane, 3) != (lane < 3 ? lane : lane - 3);
  bad += __shfl_down_sync(~0u, lane, 3) != (lane < 29 ? lane + 3 : lane);
  bad += __reduce_add_sync(~0u, lane) != 496;
  bad += !__any_sync(~0u, lane == 31) || __all_sync(~0u, lane != 31);
  if (lane < 16) {  // the halves go their own ways, at their own pace
    bad += __reduce_add_sync(0xffffu, 1u) != 16;
    bad += __ballot_sync(0xffffu, true) != 0xffff;
  } else {
    bad += __shfl_sync(0xffff0000u, lane, 20) != 20;
  }
  bad += __syncthreads_or(threadIdx.x == 70) != 1 || __syncthreads_or(0) != 0;
  atomicAdd(wrong, bad);
}

__global__ void atomics(unsigned* data) {
  atomicMin(&data[0], 100 - threadIdx.x);
  atomicMax(&data[1], threadIdx.x);
  atomicCAS(&data[2], threadIdx.x, threadIdx.x + 1);
  atomicAdd(&data[3], static_cast<unsigned*>(simt::dynamic_shared())[threadIdx.x] == 0xfff5fff5);
}

__global__ void barrier_in_one_branch(unsigned*) {
  if (threadIdx.x < 40) __syncthreads();
  if (threadIdx.x >= 40) __syncwarp(~0u);
}

__global__ void shuffle_in_one_branch(unsigned*) {
  if (threadIdx.x % 2 == 0) __shfl_sync(~0u, 1, 0);
  __syncthreads();
}

__global__ void wrong_mask(unsigned*) { __syncwarp(0xfffe); }

__global__ void read_absent_lane(unsigned*) {
  if (threadIdx.x < 8) __shfl_sync(0xff, 1, 9);
}

struct TooLarge {
  char bytes[50 << 10];
};
__global__ void too_much_shared(unsigned*) { simt::block_shared<TooLarge>(); }

struct Word {
  unsigned value;
};
// Every block finds the pattern, whatever the one before it left.
__global__ void read_uninitialised(unsigned* pattern) {
  Word& word = simt::block_shared<Word>();
  pattern[blockIdx.x] = word.value;
  word.value = 7;
}

struct Words {
  alignas(16) unsigned at[32 * 4];
};

// Copies land when they are waited for, group by group.
__global__ void copy_words(unsigned* wrong) {
  unsigned* to = simt::block_shared<Words>().at + threadIdx.x * 4;
  alignas(16) const unsigned from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  simt::copy_async(to, from, false);
  simt::commit_copies();
  simt::copy_async(to, from + 4, true);
  simt::commit_copies();
  bool bad = to[0] != 0xfff5fff5;
  simt::wait_copies<1>();
  bad |= to[0] != 0 || to[3] != 0;
  simt::wait_copies<0>();
  bad |= to[0] != 5 || to[3] != 8;
  atomicAdd(wrong, unsigned{bad});
}

__global__ void abandon_copy(unsigned* data) {
  simt::copy_async(simt::block_shared<Words>().at, data, false);
  simt::commit_copies();
}

__global__ void copy_askew(unsigned* data) {
  simt::copy_async(simt::block_shared<Words>().at + 1, data, false);
  simt::commit_copies();
  simt::wait_copies<0>();
}

__global__ void load_without_a_lane(unsigned*) {
  unsigned fragment[4];
  if (threadIdx.x > 0) simt::load_matrices(fragment, simt::block_shared<Words>().at);
}

__global__ void multiply_by(unsigned* meta) {
  float sum[4] = {};
  simt::mma_sp<__half, 0>(sum, {}, {}, *meta);
}

// The second of two warps, or in reverse the first, finds what the other did before it began.
__global__ void run_ahead(unsigned* data) {
  __syncwarp(~0u);
  const unsigned found = data[0];
  __syncwarp(~0u);
  data[0] = threadIdx.x / 32 + 1;
  if (threadIdx.x == 0 || threadIdx.x == 63) data[1 + threadIdx.x / 32] = found;
}

// A race: the last thread to come wins.
__global__ void race(unsigned* out) { out[0] = threadIdx.x; }

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  for (const bool reverse : {false, true}) {
    simt::reverse_order = reverse;
    simt::granted_shared.clear();
    std::vector<unsigned> sums(3, 0);
    CHECK(run(3, 256, sum_ranks, sums.data()) == cudaSuccess);
    CHECK(sums == std::vector<unsigned>(3, 255 * 128));

    unsigned wrong = 0;
    CHECK(run(2, 96, collectives, &wrong) == cudaSuccess);
    CHECK(wrong == 0);

    unsigned data[] = {1000, 0, 0, 0};
    CHECK(run(1, 64, atomics, data, 256) == cudaSuccess);
    CHECK(data[0] == 37 && data[1] == 63 && data[2] == (reverse ? 1 : 64) && data[3] == 64);

    unsigned patterns[2];
    CHECK(run(2, 1, read_uninitialised, patterns) == cudaSuccess);
    CHECK(patterns[0] == 0xfff5fff5 && patterns[1] == 0xfff5fff5);

    unsigned winner = 0;
    CHECK(run(1, 64, race, &winner) == cudaSuccess);
    CHECK(winner == (reverse ? 0 : 63));

    CHECK(failed_with(run(1, 64, barrier_in_one_branch, nullptr), "waits for ever"));
    CHECK(failed_with(run(1, 64, shuffle_in_one_branch, nullptr), "__shfl_sync"));
    CHECK(failed_with(run(1, 64, wrong_mask, nullptr), "without itself"));
    CHECK(failed_with(run(1, 64, read_absent_lane, nullptr), "takes no part"));
    CHECK(failed_with(run(1, 1, too_much_shared, nullptr), "51200 bytes"));
    CHECK(failed_with(run(0, 32, race, &winner), "no device takes"));
    CHECK(failed_with(run(1, 1025, race, &winner), "no device takes"));
    CHECK(failed_with(run(1, 32, race, &winner, 49 << 10), "of 49152 granted"));
    CHECK(cudaFuncSetAttribute(race, cudaFuncAttributeMaxDynamicSharedMemorySize, 49 << 10) ==
          cudaSuccess);
    CHECK(run(1, 32, race, &winner, 49 << 10) == cudaSuccess);
    CHECK(failed_with(
        cudaFuncSetAttribute(race, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10),
        "102400 bytes"));

    alignas(16) unsigned words[4] = {0, 0, 0, 0};
    CHECK(run(1, 32, copy_words, words) == cudaSuccess && words[0] == 0);
    CHECK(failed_with(run(1, 1, abandon_copy, words), "1 copies under way"));
    CHECK(run(1, 32, copy_words, words) == cudaSuccess && words[0] == 0);
    CHECK(failed_with(run(1, 1, copy_askew, words), "on 16 bytes"));
    CHECK(failed_with(run(1, 32, load_without_a_lane, nullptr), "load_matrices"));
    words[0] = 0x4444e9d4;
    CHECK(run(1, 32, multiply_by, words) == cudaSuccess);
    CHECK(failed_with(run(1, 31, multiply_by, words), "mma_sp without all lanes: 0x7fffffff"));
    words[0] = 0x44444044;
    CHECK(failed_with(run(1, 32, multiply_by, words), "the metadata 0"));

    unsigned order[3] = {0, 9, 9};
    CHECK(run(1, 64, run_ahead, order) == cudaSuccess);
    CHECK(order[1] == (reverse ? 2 : 0) && order[2] == (reverse ? 0 : 1));
    CHECK(run(1, 32, race, &winner) == cudaSuccess);  // and it goes on after a failure
  }
  return testing::finish();
}
