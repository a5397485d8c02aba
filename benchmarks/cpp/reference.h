// What a product y = x @ W^T has to be: rows and tokens of it in fp64, computed on the host, and
// all of it as cuBLAS computes it, where that is found and right itself.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "core/cpu/dtype.h"
#include "dense_gemm.h"
#include "harness.h"
#include "options.h"

namespace bench {

// Beside rounding, y may be off by this part of its root mean square: sums in fp32 are off by far
// less, a product that is missing from one by far more.
constexpr double kSlack = 0x1p-10;

struct Comparison {
  double squares = 0;                      // of what one product was compared with
  std::uint64_t wrong = 0, first = ~0ull;  // how many elements are wrong, and where the first is
};

__host__ __device__ inline float float_of(Bits bits, bool bf16) {
#if defined(__CUDA_ARCH__)
  return bf16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
#else
  return bf16 ? wanda_ext::to_float(wanda_ext::BFloat16{bits})
              : wanda_ext::to_float(wanda_ext::Float16{bits});
#endif
}

constexpr unsigned kCompareBlocks = 128;

// y, with the bias of its n columns, beside the product of cuBLAS, without: each rounded once. A
// result for each thread.
__global__ inline void compare(const Bits* y, const Bits* product, const Bits* bias,
                               std::size_t count, std::int64_t n, bool bf16, double unit,
                               double slack, Comparison* results) {
  const std::size_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  Comparison result;
  for (std::size_t i = thread; i < count; i += std::size_t{gridDim.x} * blockDim.x) {
    const double ours = float_of(y[i], bf16), theirs = float_of(product[i], bf16);
    const double added =
        bias != nullptr ? float_of(bias[i % static_cast<std::size_t>(n)], bf16) : 0.0;
    const double allowed = 1.01 * unit * (fabs(ours) + fabs(theirs)) + slack;
    result.squares += theirs * theirs;
    if (fabs(ours - (theirs + added)) <= allowed) continue;  // NaN is not
    ++result.wrong;
    if (result.first == ~0ull) result.first = i;
  }
  results[thread] = result;
}

class Reference {
 public:
  // x [m,k], weight [n,k] and bias [n] (or null) lie on the device.
  Reference(const Stream& stream, DenseGemm& gemm, const Bits* x, const Bits* weight,
            const Bits* bias, Shape shape, std::int64_t m, wanda_ext::DType dtype)
      : stream_(stream),
        shape_(shape),
        m_(m),
        bf16_(dtype == wanda_ext::DType::kBFloat16),
        unit_(bf16_ ? 0x1p-8 : 0x1p-11),
        bias_(bias),
        product_(static_cast<std::size_t>(m * shape.n)) {
    sample(x, weight);
    running("cuBLAS for " + bench::name_of(shape));
    check(cudaMemsetAsync(product_.data(), 0xff, product_.bytes(), stream));
    rival_ = gemm.run(x, weight, product_.data(), m, shape.n, shape.k, dtype, true);
    check(cudaStreamSynchronize(stream));
    if (rival_.empty()) rival_ = problem_in_sample(product_.data(), false);
    if (!rival_.empty()) return;
    const Comparison same = compared(product_.data(), nullptr, 0);
    rms_ = std::sqrt(same.squares / static_cast<double>(product_.size()));
  }

  // What is wrong with cuBLAS's product, or ""; then `wrong` looks at the sample alone.
  const std::string& rival() const { return rival_; }

  // What is wrong with y [m,n], or "".
  std::string wrong(const Bits* y, bool has_bias) const {
    std::string found = problem_in_sample(y, has_bias);
    if (!found.empty() || !rival_.empty()) return found;
    const Comparison all = compared(y, has_bias ? bias_ : nullptr, kSlack * rms_);
    if (all.wrong == 0) return "";
    const auto n = static_cast<std::uint64_t>(shape_.n);
    return std::to_string(all.wrong) + " of " + std::to_string(product_.size()) +
           " elements are not cuBLAS's, the first " + place(all.first / n, all.first % n);
  }

 private:
  static constexpr std::int64_t kTokens = 8;
  static constexpr std::int64_t kProducts = std::int64_t{1} << 27;  // of the sample, about 0.1 s

  static std::string place(std::uint64_t token, std::uint64_t row) {
    return "y[" + std::to_string(token) + ", " + std::to_string(row) + "]";
  }

  // fp64 sums of some tokens, the first and the last among them, and of rows `stride_` apart.
  void sample(const Bits* x, const Bits* weight) {
    const auto [n, k] = shape_;
    for (std::int64_t i = 0; i < std::min(m_, kTokens); ++i) {
      tokens_.push_back(i * (m_ - 1) / std::max<std::int64_t>(std::min(m_, kTokens) - 1, 1));
    }
    stride_ = std::max<std::int64_t>(1, n * k * kTokens / kProducts);
    const auto rows = static_cast<std::size_t>((n + stride_ - 1) / stride_);
    const auto width = static_cast<std::size_t>(k);
    std::vector<Bits> w(rows * width), some(width);
    const auto bytes = static_cast<std::size_t>(k) * sizeof(Bits);
    check(cudaMemcpy2D(w.data(), bytes, weight, bytes * static_cast<std::size_t>(stride_), bytes,
                       rows, cudaMemcpyDeviceToHost));
    std::vector<double> inputs(width * kTokens, 0.0);  // [k, kTokens]
    for (std::size_t t = 0; t < tokens_.size(); ++t) {
      check(cudaMemcpy(some.data(), x + tokens_[t] * k, bytes, cudaMemcpyDeviceToHost));
      for (std::size_t c = 0; c < width; ++c) {
        inputs[c * kTokens + t] = static_cast<double>(float_of(some[c], bf16_));
      }
    }
    if (bias_ != nullptr) {
      host_bias_.resize(static_cast<std::size_t>(n));
      check(cudaMemcpy(host_bias_.data(), bias_, host_bias_.size() * sizeof(Bits),
                       cudaMemcpyDeviceToHost));
    }
    exact_.assign(rows * kTokens, 0.0);
    double squares = 0;
    for (std::size_t r = 0; r < rows; ++r) {
      double sums[kTokens] = {};
      for (std::size_t c = 0; c < width; ++c) {
        const auto value = static_cast<double>(float_of(w[r * width + c], bf16_));
        for (std::size_t t = 0; t < kTokens; ++t) sums[t] += value * inputs[c * kTokens + t];
      }
      for (std::size_t t = 0; t < kTokens; ++t) squares += sums[t] * sums[t];
      std::copy(sums, sums + kTokens, exact_.begin() + static_cast<std::ptrdiff_t>(r * kTokens));
    }
    rms_ = std::sqrt(squares / static_cast<double>(rows * tokens_.size()));
  }

  std::string problem_in_sample(const Bits* y, bool has_bias) const {
    std::vector<Bits> token(static_cast<std::size_t>(shape_.n));
    for (std::size_t t = 0; t < tokens_.size(); ++t) {
      check(cudaMemcpy(token.data(), y + tokens_[t] * shape_.n, token.size() * sizeof(Bits),
                       cudaMemcpyDeviceToHost));
      for (std::size_t r = 0; r * static_cast<std::size_t>(stride_) < token.size(); ++r) {
        const std::size_t row = r * static_cast<std::size_t>(stride_);
        const double bias = has_bias ? static_cast<double>(float_of(host_bias_[row], bf16_)) : 0.0;
        const double exact = exact_[r * kTokens + t] + bias;
        const auto ours = static_cast<double>(float_of(token[row], bf16_));
        if (std::fabs(ours - exact) <= 1.01 * unit_ * std::fabs(exact) + kSlack * rms_) continue;
        char values[80];
        std::snprintf(values, sizeof(values), " is %.6g, in fp64 %.6g", ours, exact);
        return place(static_cast<std::uint64_t>(tokens_[t]), row) + values;
      }
    }
    return "";
  }

  Comparison compared(const Bits* y, const Bits* bias, double slack) const {
    const dim3 blocks(std::min(blocks_of(product_.size()).x, kCompareBlocks));
    const DeviceArray<Comparison> device(blocks.x * kThreads);
    check(wanda_ext::cuda::launch("compare", compare, blocks, dim3(kThreads), stream_, y,
                                  product_.data(), bias, product_.size(), shape_.n, bf16_, unit_,
                                  slack, device.data()));
    check(cudaStreamSynchronize(stream_));
    Comparison all;
    for (const Comparison& one : device.on_host()) {
      all.squares += one.squares;
      all.wrong += one.wrong;
      all.first = std::min(all.first, one.first);
    }
    return all;
  }

  const Stream& stream_;
  Shape shape_;
  std::int64_t m_, stride_ = 1;
  bool bf16_;
  double unit_;  // half of what the dtype's last bit is worth, relative
  const Bits* bias_;
  DeviceArray<Bits> product_;
  std::vector<std::int64_t> tokens_;
  std::vector<double> exact_;  // [rows, kTokens]
  std::vector<Bits> host_bias_;
  double rms_ = 0;
  std::string rival_;
};

// Runs every entrant once on `y` and finds out which are wrong; they are recorded in `cell`. Ends
// the program where one takes the device away.
inline void check_entrants(std::vector<Entrant>& entrants, const Stream& stream,
                           const DeviceArray<Bits>& y, const Reference& reference, bool has_bias,
                           const std::string& where, Object& cell) {
  for (Entrant& entrant : entrants) {
    running(where + ", " + entrant.name);
    check(cudaMemsetAsync(y.data(), 0xff, y.bytes(), stream));  // NaN, where nothing is written
    entrant.wrong = entrant.call(0);
    const std::string failed = problem(cudaStreamSynchronize(stream));
    if (entrant.wrong.empty()) entrant.wrong = failed;
    if (!entrant.wrong.empty() && device_is_lost()) {
      cell.add("wrong", wrong_of(entrants)).add("lost", entrant.name).print();
      std::exit(kLost);
    }
    if (entrant.wrong.empty()) entrant.wrong = reference.wrong(y.data(), has_bias);
  }
  cell.add("tried", static_cast<std::int64_t>(entrants.size())).add("wrong", wrong_of(entrants));
  cell.add("cuBLAS", reference.rival().empty() ? "right" : reference.rival());
}

}  // namespace bench
