// Which kernels run, and the loops over ranges of rows and blocks of tokens around them.
#include "records.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "parallel_chunks.h"

namespace wanda_ext {
namespace {

using FindKernels = const RecordKernels*();
constexpr FindKernels* kSets[] = {amx_kernels, avx512_bf16_kernels, avx512_kernels, avx2_kernels,
                                  plain_kernels};

// Null where there are none of that name; name may be null: the fastest.
const RecordKernels* find_kernels(const char* name) {
  for (FindKernels* find : kSets) {
    const RecordKernels* kernels = find();
    if (kernels != nullptr && (name == nullptr || std::strcmp(name, kernels->name) == 0)) {
      return kernels;
    }
  }
  return nullptr;
}

std::atomic<const RecordKernels*>& kernels_in_use() {
  static std::atomic<const RecordKernels*> kernels{find_kernels(nullptr)};
  return kernels;
}

constexpr std::size_t align_64(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

const RecordKernels& record_kernels() { return *kernels_in_use().load(); }

const char* cpu_kernels() { return record_kernels().name; }

Status use_cpu_kernels(const char* name) {
  const RecordKernels* kernels = find_kernels(name);
  if (kernels == nullptr) {
    char known[128] = "";
    for (FindKernels* find : kSets) {
      if (const RecordKernels* other = find(); other != nullptr) {
        std::strncat(known, known[0] ? ", " : "", sizeof(known) - std::strlen(known) - 1);
        std::strncat(known, other->name, sizeof(known) - std::strlen(known) - 1);
      }
    }
    return make_error(StatusCode::kUnsupported,
                      "use_cpu_kernels: this build and processor have %s, got %s", known, name);
  }
  kernels_in_use() = kernels;
  return {};
}

// For the dtype that needs the most.
std::size_t multiply_records_workspace(std::int64_t m, std::int64_t k, int threads) {
  const RecordKernels& kernels = record_kernels();
  const std::int64_t tokens = std::min(m, kTokensPerBlock);
  std::size_t most = 0;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    most = std::max(most, align_64(kernels.prepared_bytes(dtype, tokens, k)) +
                              static_cast<std::size_t>(std::max(threads, 1)) *
                                  align_64(kernels.panel_bytes(dtype, tokens, k)));
  }
  return most;
}

Status multiply_records(const char* op, const RecordWeight& weight, ConstMatrixView x,
                        const void* bias, MatrixView y, void* workspace,
                        const ParallelFor& parallel) {
  if (reinterpret_cast<std::uintptr_t>(workspace) % 64 != 0) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: workspace must be aligned to 64 bytes, got %p", op, workspace);
  }
  if (weight.n == 0) return {};
  const RecordKernels& kernels = record_kernels();
  const std::size_t row_bytes = static_cast<std::size_t>(x.ld) * size_of(x.dtype);
  for (std::int64_t token = 0; token < x.rows; token += kTokensPerBlock) {
    const std::int64_t m = std::min(x.rows - token, kTokensPerBlock);
    auto* bytes = static_cast<char*>(workspace);
    const RecordProduct product = {
        weight,
        {static_cast<const char*>(x.data) + static_cast<std::size_t>(token) * row_bytes, m, x.cols,
         x.ld, x.dtype},
        bias,
        {static_cast<char*>(y.data) + static_cast<std::size_t>(token * y.ld) * size_of(y.dtype), m,
         y.cols, y.ld, y.dtype},
        bytes};
    const std::int64_t most = std::min(x.rows, kTokensPerBlock);  // what the workspace is for
    char* panels = bytes + align_64(kernels.prepared_bytes(x.dtype, most, x.cols));
    const std::size_t panel_bytes = align_64(kernels.panel_bytes(x.dtype, most, x.cols));
    for_each_chunk(parallel, (m + 15) / 16,
                   [&](std::int64_t block) { kernels.prepare_x(product, block); });
    for_each_range(parallel, weight.n, kRowsPerRange,
                   [&](std::int64_t begin, std::int64_t end, std::int64_t range) {
                     kernels.multiply(product, begin, end,
                                      panels + static_cast<std::size_t>(range) * panel_bytes);
                   });
  }
  return {};
}

void unpack_records(const RecordWeight& weight, const MatrixView& dense,
                    const ParallelFor& parallel) {
  const RecordKernels& kernels = record_kernels();
  for_each_range(parallel, weight.k == 0 ? 0 : weight.n, kRowsPerRange,
                 [&](std::int64_t begin, std::int64_t end, std::int64_t) {
                   kernels.unpack(weight, begin, end, dense);
                 });
}

}  // namespace wanda_ext
