// 2:4 beside dense: linear_24 with its kernels against cuBLAS, on the same pruned weights.
//
//   linear_24                  times, by default what linear_24_choose takes; with --all-kernels
//                              every kernel that can run, with several numbers of splits of k
//   linear_24 --check          runs every kernel and split once, bf16 and fp16, and compares
//   linear_24 --profile        runs what linear_24_choose takes once, between cudaProfilerStart and
//                              cudaProfilerStop
//
// options.h has the other options. Prints a line of JSON for each shape, dtype and m. Weights are
// normal, pruned by norms, packed; activations are normal. Every product is compared with fp64 and
// with cuBLAS (reference.h) before it is timed; one that is wrong is recorded, and left out.
#include "dense_gemm.h"
#include "harness.h"
#include "options.h"
#include "reference.h"
#include "wanda_ext/ops.h"

namespace {

using bench::Bits;
using bench::check;
using bench::DeviceArray;
using bench::Entrant;
using bench::Options;
using bench::Shape;
using bench::Work;
using wanda_ext::DType;
using wanda_ext::MetaOrder;
namespace cuda = wanda_ext::cuda;

constexpr int kSplits[] = {1, 2, 3, 4, 6, 8, 12, 16};

Options defaults(Work work) {
  Options options;
  options.dtypes = {DType::kBFloat16};
  if (work == Work::kCheck) {
    options.shapes = {{136, 272}, {520, 2064}, {4096, 4096}};
    options.m = {1, 5, 33, 300, 2048};
    options.dtypes.push_back(DType::kFloat16);
  } else if (work == Work::kProfile) {
    options.shapes = {{4096, 4096}};
    options.m = {1, 8, 2048};
  } else {
    options.shapes = {{12288, 4096}, {4096, 4096}, {22016, 4096}, {4096, 11008}};
    options.m = {1, 16, 64, 256, 2048};
  }
  return options;
}

std::size_t meta_words(MetaOrder order, Shape shape) {
  return static_cast<std::size_t>(wanda_ext::padded_rows_24(order, shape.n) *
                                  wanda_ext::padded_cols_24(order, shape.k) /
                                  wanda_ext::kColumnsPerMeta);
}

// Copies of one weight [n,k], pruned to 2:4 by norms: dense, and packed.
struct Weights {
  Shape shape;
  DType dtype;
  MetaOrder order;
  std::size_t elements, words, copies;
  DeviceArray<Bits> dense, values, bias;
  DeviceArray<std::int16_t> meta;

  Weights(Shape shape, DType dtype, MetaOrder order, bool rotate)
      : shape(shape),
        dtype(dtype),
        order(order),
        elements(static_cast<std::size_t>(shape.n * shape.k)),
        words(meta_words(order, shape)),
        copies(rotate ? bench::copies_of(elements + words * sizeof(std::int16_t)) : 1),
        dense(copies * elements),
        values(copies * elements / 2),
        bias(static_cast<std::size_t>(shape.n)),
        meta(copies * words) {
    const auto k = static_cast<std::size_t>(shape.k);
    const DeviceArray<float> norm(k);
    const DeviceArray<std::int16_t> canonical(meta_words(MetaOrder::kCanonical, shape));
    const DeviceArray<std::int32_t> bad(1);
    bench::fill_normal(dense.data(), elements, 1, dtype);
    bench::fill_normal(bias.data(), static_cast<std::size_t>(shape.n), 4, dtype);
    bench::fill_normal(norm.data(), k, 2, true);
    const wanda_ext::MatrixView view = {dense.data(), shape.n, shape.k, shape.k, dtype};
    check(cuda::prune_nm(view, norm.data(), 2, 4, nullptr, nullptr));
    check(cuda::pack_24(view, values.data(), canonical.data(), bad.data(), nullptr));
    check(cuda::order_meta_24(canonical.data(), MetaOrder::kCanonical, meta.data(), order, shape.n,
                              shape.k, nullptr));
    for (std::size_t i = 1; i < copies; ++i) {
      repeat(dense.data(), elements, i);
      repeat(values.data(), elements / 2, i);
      repeat(meta.data(), words, i);
    }
    const std::int32_t bad_row = bad.on_host()[0];
    if (bad_row >= 0) {
      std::fprintf(stderr, "row %d is not 2:4 after prune_nm\n", bad_row);
      std::exit(bench::kFailed);
    }
  }

 private:
  template <typename T>
  static void repeat(T* data, std::size_t count, std::size_t copy) {
    check(cudaMemcpy(data + copy * count, data, count * sizeof(T), cudaMemcpyDeviceToDevice));
  }
};

std::string name_of(cuda::Linear24Choice choice) {
  return std::string(cuda::linear_24_kernel_name(choice.kernel)) + "/" +
         std::to_string(choice.splits);
}

constexpr std::size_t kMostWorkspace = std::size_t{1} << 30;  // more is no way to run a linear

// First the one that linear_24_choose takes.
std::vector<cuda::Linear24Choice> choices(const Options& options, const Weights& weights,
                                          std::int64_t m) {
  const auto [n, k] = weights.shape;
  cuda::Device device;
  check(cuda::current_device(&device));
  std::vector<cuda::Linear24Choice> all(1);
  check(cuda::linear_24_choose(device, m, n, k, weights.dtype, weights.order, &all[0]));
  const bool every = options.all_kernels || options.work == Work::kCheck;
  for (int i = 0; every && i < cuda::linear_24_kernels(); ++i) {
    for (const int splits : kSplits) {
      cuda::Linear24Choice choice;
      choice.kernel = i;
      choice.splits = splits;
      const bool chosen = choice.kernel == all[0].kernel && choice.splits == all[0].splits;
      if (!chosen &&
          cuda::linear_24_check(choice, device, m, n, k, weights.dtype, weights.order).ok() &&
          cuda::linear_24_workspace(choice, m, n, k) <= kMostWorkspace) {
        all.push_back(choice);
      }
    }
  }
  const auto left_out = [&](const auto& choice) { return options.leaves_out(name_of(choice)); };
  all.erase(std::remove_if(all.begin(), all.end(), left_out), all.end());
  return all;
}

// One cell; whether all was right.
bool measure(const Options& options, const Weights& weights, std::int64_t m,
             const bench::Stream& stream, bench::DenseGemm& gemm) {
  const auto [n, k] = weights.shape;
  const DType dtype = weights.dtype;
  const DeviceArray<Bits> x(static_cast<std::size_t>(m * k)), y(static_cast<std::size_t>(m * n));
  bench::fill_normal(x.data(), x.size(), 3, dtype);
  check(cudaDeviceSynchronize());

  const std::vector<cuda::Linear24Choice> tried = choices(options, weights, m);
  std::size_t bytes = 0;
  for (const auto& choice : tried) {
    bytes = std::max(bytes, cuda::linear_24_workspace(choice, m, n, k));
  }
  const DeviceArray<char> workspace(bytes);
  const bool times = options.work == Work::kTime;
  const Bits* bias = times ? nullptr : weights.bias.data();
  std::vector<Entrant> entrants;
  for (const auto& choice : tried) {
    entrants.push_back({name_of(choice), [&, choice](std::size_t i) {
                          return bench::problem(cuda::linear_24(
                              {x.data(), m, weights.shape.k, weights.shape.k, dtype},
                              weights.values.data() + i * weights.elements / 2,
                              weights.meta.data() + i * weights.words, weights.order, bias,
                              {y.data(), m, weights.shape.n, weights.shape.n, dtype}, choice,
                              workspace.data(), stream));
                        }});
  }
  if (!entrants.empty()) entrants[0].keeps = true;

  const char* what = times ? "linear_24" : "check linear_24";
  const std::string name = bench::cell_name(what, weights.shape, dtype, m);
  bench::Object cell = bench::cell_of(name, weights.shape, dtype, m);
  if (!tried.empty()) cell.add("chosen", name_of(tried[0]));
  const bench::Reference reference(stream, gemm, x.data(), weights.dense.data(), bias,
                                   weights.shape, m, dtype);
  bench::check_entrants(entrants, stream, y, reference, !times, name, cell);
  bool right = bench::wrong_of(entrants).empty();
  if (times) {
    Entrant cublas = {"cuBLAS", [&](std::size_t i) {
                        return gemm.run(x.data(), weights.dense.data() + i * weights.elements,
                                        y.data(), m, weights.shape.n, weights.shape.k, dtype);
                      }};
    cublas.keeps = true;
    cublas.wrong = reference.rival();
    entrants.push_back(cublas);
    bench::time_by_turns(stream, entrants, weights.copies, options.rounds);
    cell.add("us", bench::times_of(entrants));
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0));
    cell.add("gpu", device.name).add("arch", std::int64_t{device.major * 10 + device.minor});
    cell.add("sms", std::int64_t{device.multiProcessorCount});
    right = bench::wrong_of(entrants).empty();
    if (!right) cell.add("not timed", bench::wrong_of(entrants));
  } else if (options.work == Work::kProfile) {
    for (Entrant& entrant : entrants) {
      if (entrant.wrong.empty()) bench::profile(stream, entrant);
    }
  }
  cell.print();
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = bench::parse(argc, argv, defaults);
  std::fprintf(stderr, "cuBLAS: %s\n", bench::DenseGemm::version().c_str());
  bench::device_or_exit();
  cuda::Device device;
  check(cuda::current_device(&device));
  const MetaOrder order = device.arch / 10 == 9 ? MetaOrder::kSm90 : MetaOrder::kSm80;
  const bench::Stream stream;
  bench::DenseGemm gemm(stream);
  bool right = true;
  for (const Shape& shape : options.shapes) {
    for (const DType dtype : options.dtypes) {
      const Weights weights(shape, dtype, order, options.work == Work::kTime);
      for (const std::int64_t m : options.m) {
        right = measure(options, weights, m, stream, gemm) && right;
      }
    }
  }
  return right ? 0 : bench::kFailed;
}
