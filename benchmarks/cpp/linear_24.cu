// 2:4 beside dense: linear_24 with every choice of kernel against cuBLAS, on the same pruned
// weights.
//
//   linear_24 [--shapes NxK,...] [--m M,...] [--dtype bf16|fp16] [--iterations ROUNDS]
//             [--all-kernels] [--json FILE]
//
// Weights are normal, pruned by norms, packed; activations are normal. Both products are compared
// before they are timed: a wrong one ends the program with status 1. Status 2: the command line is
// wrong, or there is no device. By default the kernel that linear_24_choose takes is timed; with
// --all-kernels every one that can run, with 1, 2, 4, ... parts of k.
#include <cmath>
#include <cstring>
#include <string>

#include "dense_gemm.h"
#include "harness.h"
#include "wanda_ext/ops.h"

namespace {

using bench::check;
using bench::DeviceArray;
using wanda_ext::DType;
using wanda_ext::MetaOrder;
namespace cuda = wanda_ext::cuda;

// --- The command line ----------------------------------------------------------------------------

struct Shape {
  std::int64_t n, k;
};

struct Options {
  std::vector<Shape> shapes = {{12288, 4096}, {4096, 4096}, {22016, 4096}, {4096, 11008}};
  std::vector<std::int64_t> m = {1, 16, 64, 256, 2048};
  DType dtype = DType::kBFloat16;
  int rounds = 30;
  bool all_kernels = false;
  const char* json = nullptr;
};

[[noreturn]] void refuse(const char* option, const char* value) {
  std::fprintf(stderr,
               "%s %s is not understood\n"
               "usage: linear_24 [--shapes NxK,...] [--m M,...] [--dtype bf16|fp16]\n"
               "                 [--iterations ROUNDS] [--all-kernels] [--json FILE]\n"
               "n, m and ROUNDS at least 1, k a multiple of 16\n",
               option, value);
  std::exit(bench::kNotRun);
}

// The positive number at the start of `text`, which then points behind it; 0 where there is none.
std::int64_t number(const char*& text) {
  char* end = nullptr;
  const long long value = std::strtoll(text, &end, 10);
  const bool good = end != text && value > 0 && value <= INT32_MAX;
  text = end;
  return good ? value : 0;
}

std::vector<std::int64_t> numbers(const char* option, const char* value) {
  std::vector<std::int64_t> all;
  for (const char* text = value;; ++text) {
    all.push_back(number(text));
    if (all.back() == 0 || (*text != ',' && *text != '\0')) refuse(option, value);
    if (*text == '\0') return all;
  }
}

std::vector<Shape> shapes(const char* option, const char* value) {
  std::vector<Shape> all;
  for (const char* text = value;; ++text) {
    Shape shape = {number(text), 0};
    if (shape.n == 0 || *text++ != 'x') refuse(option, value);
    shape.k = number(text);
    const bool good = shape.k > 0 && shape.k % wanda_ext::kColumnsPerMeta == 0;
    if (!good || (*text != ',' && *text != '\0')) refuse(option, value);
    all.push_back(shape);
    if (*text == '\0') return all;
  }
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--all-kernels") {
      options.all_kernels = true;
      continue;
    }
    if (i + 1 == argc) refuse(argv[i], "");
    const char* value = argv[++i];
    if (option == "--shapes") {
      options.shapes = shapes("--shapes", value);
    } else if (option == "--m") {
      options.m = numbers("--m", value);
    } else if (option == "--dtype" &&
               (!std::strcmp(value, "bf16") || !std::strcmp(value, "fp16"))) {
      options.dtype = value[0] == 'b' ? DType::kBFloat16 : DType::kFloat16;
    } else if (option == "--iterations") {
      options.rounds = static_cast<int>(numbers("--iterations", value).front());
    } else if (option == "--json") {
      options.json = value;
    } else {
      refuse(option.c_str(), value);
    }
  }
  return options;
}

// --- Weights -------------------------------------------------------------------------------------

using Bits = std::uint16_t;  // a bf16 or an fp16

void fill(Bits* data, std::size_t count, unsigned seed, DType dtype) {
  if (dtype == DType::kBFloat16) {
    bench::fill_normal(reinterpret_cast<__nv_bfloat16*>(data), count, seed);
  } else {
    bench::fill_normal(reinterpret_cast<__half*>(data), count, seed);
  }
}

std::size_t meta_words(MetaOrder order, Shape shape) {
  return static_cast<std::size_t>(wanda_ext::padded_rows_24(order, shape.n) *
                                  wanda_ext::padded_cols_24(order, shape.k) /
                                  wanda_ext::kColumnsPerMeta);
}

// Copies of one weight [n,k], pruned to 2:4 by norms: dense, and packed.
struct Weights {
  Shape shape;
  MetaOrder order;
  std::size_t elements, words, copies;
  DeviceArray<Bits> dense, values;
  DeviceArray<std::int16_t> meta;

  Weights(Shape shape, DType dtype, MetaOrder order)
      : shape(shape),
        order(order),
        elements(static_cast<std::size_t>(shape.n * shape.k)),
        words(meta_words(order, shape)),
        copies(bench::copies_of(elements + words * sizeof(std::int16_t))),
        dense(copies * elements),
        values(copies * elements / 2),
        meta(copies * words) {
    const auto k = static_cast<std::size_t>(shape.k);
    const DeviceArray<float> norm(k);
    const DeviceArray<std::int16_t> canonical(meta_words(MetaOrder::kCanonical, shape));
    const DeviceArray<std::int32_t> bad(1);
    fill(dense.data(), elements, 1, dtype);
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
    std::int32_t bad_row = 0;
    check(cudaMemcpy(&bad_row, bad.data(), sizeof(bad_row), cudaMemcpyDeviceToHost));
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

// --- One product of both kinds -------------------------------------------------------------------

__global__ void add_squares(const Bits* ours, const Bits* dense, std::size_t count, bool bf16,
                            double* sums) {
  const auto value = [bf16](Bits bits) {
    return bf16 ? __bfloat162float(__ushort_as_bfloat16(bits))
                : __half2float(__ushort_as_half(bits));
  };
  double error = 0, size = 0;
  for (std::size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    const double a = value(ours[i]), b = value(dense[i]);
    error += (a - b) * (a - b);
    size += b * b;
  }
  atomicAdd(sums, error);
  atomicAdd(sums + 1, size);
}

// |ours - dense| / |dense|.
double relative_error(const DeviceArray<Bits>& ours, const DeviceArray<Bits>& dense, DType dtype) {
  const DeviceArray<double> sums(2);
  double host[2];
  check(cudaMemset(sums.data(), 0, sums.bytes()));
  add_squares<<<1024, 256>>>(ours.data(), dense.data(), ours.bytes() / sizeof(Bits),
                             dtype == DType::kBFloat16, sums.data());
  check(cudaMemcpy(host, sums.data(), sizeof(host), cudaMemcpyDeviceToHost));
  return std::sqrt(host[0] / host[1]);
}

constexpr std::size_t kMostWorkspace = std::size_t{1} << 30;  // more is no way to run a linear

// First the one that linear_24_choose takes.
std::vector<cuda::Linear24Choice> choices(const Options& options, cuda::Device device,
                                          std::int64_t m, const Weights& weights) {
  const auto [n, k] = weights.shape;
  std::vector<cuda::Linear24Choice> all(1);
  check(cuda::linear_24_choose(device, m, n, k, options.dtype, weights.order, &all[0]));
  for (int i = 0; options.all_kernels && i < cuda::linear_24_kernels(); ++i) {
    cuda::Linear24Choice choice;
    choice.kernel = i;
    for (; cuda::linear_24_check(choice, device, m, n, k, options.dtype, weights.order).ok() &&
           cuda::linear_24_workspace(choice, m, n, k) <= kMostWorkspace;
         choice.splits *= 2) {
      if (choice.kernel != all[0].kernel || choice.splits != all[0].splits) all.push_back(choice);
    }
  }
  return all;
}

std::string name_of(cuda::Linear24Choice choice) {
  return std::string(cuda::linear_24_kernel_name(choice.kernel)) + "/" +
         std::to_string(choice.splits);
}

struct Case {
  Shape shape;
  std::int64_t m;
  std::size_t copies;
  bool tuned;
  double error;                    // the largest of all kernels, relative to cuBLAS
  std::vector<std::string> names;  // cuBLAS, the chosen kernel, others
  std::vector<bench::Timing> timings;

  double ratio(std::size_t i) const { return timings[0].median_us / timings[i].median_us; }
};

Case measure(const Options& options, cuda::Device device, const Weights& weights, std::int64_t m,
             const bench::Stream& stream, bench::DenseGemm& gemm) {
  const auto [n, k] = weights.shape;
  const DeviceArray<Bits> x(static_cast<std::size_t>(m * k));
  const DeviceArray<Bits> dense_y(static_cast<std::size_t>(m * n));
  const DeviceArray<Bits> y(static_cast<std::size_t>(m * n));
  fill(x.data(), static_cast<std::size_t>(m * k), 3, options.dtype);
  check(cudaDeviceSynchronize());

  const std::vector<cuda::Linear24Choice> tried = choices(options, device, m, weights);
  std::size_t bytes = 0;
  for (const auto& choice : tried) {
    bytes = std::max(bytes, cuda::linear_24_workspace(choice, m, n, k));
  }
  const DeviceArray<char> workspace(bytes);
  Case result = {weights.shape, m, weights.copies, tried[0].tuned, 0, {"cuBLAS"}, {}};
  std::vector<bench::Call> entrants = {[&](std::size_t i) {
    gemm.run(x.data(), weights.dense.data() + i * weights.elements, dense_y.data(), m,
             weights.shape.n, weights.shape.k, options.dtype);
  }};
  for (const auto& choice : tried) {
    result.names.push_back(name_of(choice));
    entrants.push_back([&, choice](std::size_t i) {
      const auto [rows, cols] = weights.shape;
      check(cuda::linear_24({x.data(), m, cols, cols, options.dtype},
                            weights.values.data() + i * weights.elements / 2,
                            weights.meta.data() + i * weights.words, weights.order, nullptr,
                            {y.data(), m, rows, rows, options.dtype}, choice, workspace.data(),
                            stream));
    });
  }

  const double allowed = options.dtype == DType::kBFloat16 ? 4e-3 : 5e-4;  // of two roundings
  entrants[0](0);
  for (std::size_t i = 1; i < entrants.size(); ++i) {
    check(cudaMemsetAsync(y.data(), 0xff, y.bytes(), stream));  // NaN, where nothing is written
    entrants[i](weights.copies - 1);
    check(cudaStreamSynchronize(stream));
    const double error = relative_error(y, dense_y, options.dtype);
    if (!(error <= allowed)) {
      std::fprintf(stderr, "%s, m %lld, n %lld, k %lld: relative error %g, allowed is %g\n",
                   result.names[i].c_str(), static_cast<long long>(m), static_cast<long long>(n),
                   static_cast<long long>(k), error, allowed);
      std::exit(bench::kFailed);
    }
    result.error = std::max(result.error, error);
  }
  result.timings = bench::time_by_turns(stream, entrants, weights.copies, options.rounds);
  return result;
}

// --- What it prints ------------------------------------------------------------------------------

void print_table(const Case& result) {
  std::printf("%lldx%lld, m %lld; chosen %s; us: median, p10, p90; times faster than cuBLAS\n",
              static_cast<long long>(result.shape.n), static_cast<long long>(result.shape.k),
              static_cast<long long>(result.m), result.names[1].c_str());
  for (std::size_t i = 0; i < result.names.size(); ++i) {
    const auto [median, p10, p90] = result.timings[i];
    std::printf("  %-28s %9.2f %9.2f %9.2f %7.3f\n", result.names[i].c_str(), median, p10, p90,
                result.ratio(i));
  }
  std::fflush(stdout);
}

void print_json(std::FILE* file, const Case& result) {
  std::fprintf(file,
               "{\"n\": %lld, \"k\": %lld, \"m\": %lld, \"chosen\": \"%s\", \"tuned\": %s, "
               "\"copies\": %zu, \"relative_error\": %.3g, \"us\": {",
               static_cast<long long>(result.shape.n), static_cast<long long>(result.shape.k),
               static_cast<long long>(result.m), result.names[1].c_str(),
               result.tuned ? "true" : "false", result.copies, result.error);
  for (std::size_t i = 0; i < result.names.size(); ++i) {
    const auto [median, p10, p90] = result.timings[i];
    std::fprintf(file,
                 "%s\n  \"%s\": {\"median\": %.3f, \"p10\": %.3f, \"p90\": %.3f, "
                 "\"cuBLAS / this\": %.3f}",
                 i == 0 ? "" : ",", result.names[i].c_str(), median, p10, p90, result.ratio(i));
  }
  std::fprintf(file, "}}");
}

bool write_json(const Options& options, const cudaDeviceProp& device,
                const std::vector<Case>& cases) {
  std::FILE* file = std::fopen(options.json, "w");
  if (file == nullptr) return false;
  std::fprintf(file, "{\"device\": ");
  bench::print_device(file, device);
  std::fprintf(file, ",\n\"dtype\": \"%s\", \"rounds\": %d, \"cases\": [",
               wanda_ext::name_of(options.dtype), options.rounds);
  for (std::size_t i = 0; i < cases.size(); ++i) {
    std::fprintf(file, i == 0 ? "\n" : ",\n");
    print_json(file, cases[i]);
  }
  std::fprintf(file, "]}\n");
  return std::fclose(file) == 0;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  const cudaDeviceProp properties = bench::device_or_exit();
  cuda::Device device;
  check(cuda::current_device(&device));
  const MetaOrder order = device.arch / 10 == 9 ? MetaOrder::kSm90 : MetaOrder::kSm80;
  bench::print_device(stdout, properties);
  std::printf("\n");

  const bench::Stream stream;
  bench::DenseGemm gemm(stream);
  std::vector<Case> cases;
  for (const Shape& shape : options.shapes) {
    const Weights weights(shape, options.dtype, order);
    for (const std::int64_t m : options.m) {
      cases.push_back(measure(options, device, weights, m, stream, gemm));
      print_table(cases.back());
    }
  }
  if (options.json != nullptr && !write_json(options, properties, cases)) {
    std::fprintf(stderr, "%s cannot be written\n", options.json);
    return bench::kFailed;
  }
  return 0;
}
