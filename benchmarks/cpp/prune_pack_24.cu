// The fused 2:4 prune + pack beside a device-to-device copy of the same bytes, bf16:
//
//   prune_pack_24 N K [N K ...]      prints one JSON object a line
//
// copy / wanda_ext is the fraction of copy bandwidth reached.
#include "harness.h"
#include "wanda_ext/ops.h"

namespace {

using bench::check;
using bench::DeviceArray;

constexpr int kRounds = 50;

void measure(std::int64_t n, std::int64_t k) {
  using namespace wanda_ext;
  const auto elements = static_cast<std::size_t>(n * k);
  const std::size_t meta_words = elements / kColumnsPerMeta;
  const std::size_t copied = (elements * 2 + elements + meta_words * 2) / 2;  // read, and written
  const std::size_t copies = bench::copies_of(elements);

  const DeviceArray<__nv_bfloat16> weights(copies * elements), values(copies * elements / 2);
  const DeviceArray<std::int16_t> meta(copies * meta_words);
  const DeviceArray<char> target(copies * copied);
  const DeviceArray<float> norm(static_cast<std::size_t>(k));
  const DeviceArray<std::int32_t> bad(1);
  const bench::Stream stream;
  bench::fill_normal(weights.data(), copies * elements, 1);
  bench::fill_normal(norm.data(), static_cast<std::size_t>(k), 2, true);
  check(cudaDeviceSynchronize());

  const auto pack = [&](std::size_t i) {
    check(cuda::prune_pack_24({weights.data() + i * elements, n, k, k, DType::kBFloat16},
                              norm.data(), values.data() + i * elements / 2,
                              meta.data() + i * meta_words, bad.data(), stream));
  };
  const auto copy = [&](std::size_t i) {
    check(cudaMemcpyAsync(target.data() + i * copied, weights.data() + i * elements, copied,
                          cudaMemcpyDeviceToDevice, stream));
  };
  const auto timings = bench::time_by_turns(stream, {pack, copy}, copies, kRounds);
  std::int32_t bad_row = 0;
  check(cudaMemcpy(&bad_row, bad.data(), sizeof(bad_row), cudaMemcpyDeviceToHost));
  std::printf(
      "{\"case\": \"prune_pack_24 %lldx%lld bf16\", \"wanda_ext_ms\": %.5f, \"copy_ms\": %.5f, "
      "\"copy / wanda_ext\": %.3f, \"buffers\": %zu, \"bad\": %d}\n",
      static_cast<long long>(n), static_cast<long long>(k), timings[0].median_us / 1e3,
      timings[1].median_us / 1e3, timings[1].median_us / timings[0].median_us, copies, bad_row);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || argc % 2 == 0) {
    std::fprintf(stderr, "usage: %s N K [N K ...]\n", argv[0]);
    return bench::kNotRun;
  }
  bench::device_or_exit();
  for (int i = 1; i + 1 < argc; i += 2) measure(std::atoll(argv[i]), std::atoll(argv[i + 1]));
  return 0;
}
