// The bitmap ops, each once: pack, unpack, and linear_bitmap of each shape of kernel against cuBLAS
// and fp64, with a surplus and without. To time them there is ../bench_linear_bitmap.py.
//
//   linear_bitmap --check      bf16 and fp16
//   linear_bitmap --profile    linear_bitmap between cudaProfilerStart and cudaProfilerStop
//
// options.h has the other options. Prints a line of JSON for each shape, dtype and m; what is wrong
// is recorded.
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
using wanda_ext::Surplus;
namespace cuda = wanda_ext::cuda;

Options defaults(Work work) {
  Options options;
  options.dtypes = {DType::kBFloat16};
  if (work == Work::kProfile) {
    options.shapes = {{4096, 4096}};
    options.m = {1, 8};
    return options;
  }
  options.shapes = {{136, 272}, {520, 2064}, {4096, 4096}};
  options.m = {1, 3, 5, 8, 9, 16};  // each shape of kernel, its tokens partly and all used
  options.dtypes.push_back(DType::kFloat16);
  return options;
}

// The 16 first non-zeros of each record stay, the others are the surplus.
struct Packed {
  DeviceArray<Bits> values;
  DeviceArray<std::int32_t> mask;

  explicit Packed(Shape shape)
      : values(tiles(shape) * wanda_ext::kBitmapTileValues),
        mask(tiles(shape) * wanda_ext::kBitmapTileMasks) {}

  static std::size_t tiles(Shape shape) {
    return static_cast<std::size_t>(wanda_ext::bitmap_row_tiles(shape.n) *
                                    wanda_ext::bitmap_column_tiles(shape.k));
  }
};

// A weight [n,k], half of each row pruned: 16:32, and one chosen over the whole row, with a
// surplus.
struct Weights {
  Shape shape;
  DType dtype;
  DeviceArray<Bits> even, uneven, bias;
  Packed even_packed, uneven_packed;
  std::vector<std::int32_t> rows = {0};
  std::vector<std::uint16_t> columns;
  std::vector<Bits> surplus_values;
  std::int32_t bad_row = -1;

  Weights(Shape shape, DType dtype)
      : shape(shape),
        dtype(dtype),
        even(static_cast<std::size_t>(shape.n * shape.k)),
        uneven(even.size()),
        bias(static_cast<std::size_t>(shape.n)),
        even_packed(shape),
        uneven_packed(shape) {
    const DeviceArray<std::int32_t> bad(1);
    bench::fill_normal(even.data(), even.size(), 1, dtype);
    bench::fill_normal(bias.data(), bias.size(), 4, dtype);
    check(cudaMemcpy(uneven.data(), even.data(), even.bytes(), cudaMemcpyDeviceToDevice));
    check(cuda::prune_nm(view(even), nullptr, 8, 16, nullptr, nullptr));
    check(cuda::prune_rows(view(uneven), nullptr, shape.k / 2, nullptr, nullptr));
    check(cuda::pack_bitmap(view(even), even_packed.values.data(), even_packed.mask.data(),
                            bad.data(), nullptr));
    bad_row = bad.on_host()[0];
    check(cuda::pack_bitmap(view(uneven), uneven_packed.values.data(), uneven_packed.mask.data(),
                            bad.data(), nullptr));
    list_surplus();
  }

  wanda_ext::MatrixView view(const DeviceArray<Bits>& weight) const {
    return {weight.data(), shape.n, shape.k, shape.k, dtype};
  }

 private:
  void list_surplus() {
    const std::vector<Bits> host = uneven.on_host();
    const auto k = static_cast<std::size_t>(shape.k);
    for (std::size_t start = 0; start < host.size(); start += k) {
      int kept = 0;
      for (std::size_t c = 0; c < k; ++c) {
        if (c % wanda_ext::kRecordColumns == 0) kept = 0;
        if ((host[start + c] & 0x7fff) == 0 || ++kept <= wanda_ext::kRecordValues) continue;
        columns.push_back(static_cast<std::uint16_t>(c));
        surplus_values.push_back(host[start + c]);
      }
      rows.push_back(static_cast<std::int32_t>(columns.size()));
    }
  }
};

template <typename T>
class OnDevice : public DeviceArray<T> {
 public:
  explicit OnDevice(const std::vector<T>& host) : DeviceArray<T>(host.size()) {
    check(cudaMemcpy(this->data(), host.data(), this->bytes(), cudaMemcpyHostToDevice));
  }
};

// The weight back, bit for bit; "" or what is wrong.
std::string unpack_problem(const Weights& weights, const Packed& packed, const Surplus& surplus,
                           const DeviceArray<Bits>& expected) {
  const DeviceArray<Bits> unpacked(expected.size());
  check(cudaMemset(unpacked.data(), 0xff, unpacked.bytes()));
  const std::string failed = bench::problem(cuda::unpack_bitmap(
      packed.values.data(), packed.mask.data(), surplus, weights.view(unpacked), nullptr));
  if (!failed.empty()) return failed;
  std::vector<Bits> before = expected.on_host();
  for (Bits& bits : before) bits = bits == 0x8000 ? 0 : bits;  // zeros are packed as +0
  return unpacked.on_host() == before ? "" : "unpack_bitmap does not give the weight back";
}

bool check_packing(const Weights& weights, const Surplus& surplus) {
  const std::string name = bench::cell_name("check bitmap", weights.shape, weights.dtype);
  bench::running(name);
  bench::Object cell = bench::cell_of(name, weights.shape, weights.dtype), wrong;
  if (weights.bad_row >= 0) wrong.add("pack_bitmap", "a row of 8:16 is bad");
  const std::string even = unpack_problem(weights, weights.even_packed, {}, weights.even);
  const std::string uneven =
      unpack_problem(weights, weights.uneven_packed, surplus, weights.uneven);
  if (!even.empty()) wrong.add("8:16", even);
  if (!uneven.empty()) wrong.add("surplus", uneven);
  cell.add("tried", std::int64_t{2}).add("wrong", wrong).print();
  return wrong.empty();
}

// One of the two weights; whether all was right.
bool measure(const Options& options, const Weights& weights, const Surplus& surplus, std::int64_t m,
             const bench::Stream& stream, bench::DenseGemm& gemm) {
  const auto [n, k] = weights.shape;
  const DType dtype = weights.dtype;
  const bool even = surplus.rows == nullptr;
  const Packed& packed = even ? weights.even_packed : weights.uneven_packed;
  const DeviceArray<Bits>& dense = even ? weights.even : weights.uneven;
  const DeviceArray<Bits> x(static_cast<std::size_t>(m * k)), y(static_cast<std::size_t>(m * n));
  const DeviceArray<char> workspace(cuda::linear_bitmap_workspace(m, n, k));
  bench::fill_normal(x.data(), x.size(), 3, dtype);
  check(cudaDeviceSynchronize());

  std::vector<Entrant> entrants = {
      {even ? "linear_bitmap" : "linear_bitmap with a surplus", [&](std::size_t) {
         return bench::problem(cuda::linear_bitmap(
             {x.data(), m, weights.shape.k, weights.shape.k, dtype}, packed.values.data(),
             packed.mask.data(), surplus, weights.bias.data(),
             {y.data(), m, weights.shape.n, weights.shape.n, dtype}, workspace.data(), stream));
       }}};
  if (options.leaves_out(entrants[0].name)) return true;
  const char* what = even ? "check linear_bitmap" : "check linear_bitmap with a surplus";
  const std::string name = bench::cell_name(what, weights.shape, dtype, m);
  bench::Object cell = bench::cell_of(name, weights.shape, dtype, m);
  const bench::Reference reference(stream, gemm, x.data(), dense.data(), weights.bias.data(),
                                   weights.shape, m, dtype);
  bench::check_entrants(entrants, stream, y, reference, true, name, cell);
  const bool right = entrants[0].wrong.empty();
  if (right && options.work == Work::kProfile) bench::profile(stream, entrants[0]);
  cell.print();
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = bench::parse(argc, argv, defaults);
  if (options.work == Work::kTime) bench::refuse(argv[0], "neither --check nor --profile");
  std::fprintf(stderr, "cuBLAS: %s\n", bench::DenseGemm::version().c_str());
  bench::device_or_exit();
  const bench::Stream stream;
  bench::DenseGemm gemm(stream);
  bool right = true;
  for (const Shape& shape : options.shapes) {
    for (const DType dtype : options.dtypes) {
      const Weights weights(shape, dtype);
      const OnDevice<std::int32_t> rows(weights.rows);
      const OnDevice<std::uint16_t> columns(weights.columns);
      const OnDevice<Bits> values(weights.surplus_values);
      const Surplus surplus = {rows.data(), columns.data(), values.data(),
                               static_cast<std::int64_t>(weights.columns.size())};
      const bool profiles = options.work == Work::kProfile;
      if (!profiles) right = check_packing(weights, surplus) && right;
      for (const std::int64_t m : options.m) {
        right = measure(options, weights, {}, m, stream, gemm) && right;
        if (!profiles) right = measure(options, weights, surplus, m, stream, gemm) && right;
      }
    }
  }
  return right ? 0 : bench::kFailed;
}
