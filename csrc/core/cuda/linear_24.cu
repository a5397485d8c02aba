// linear_24 on the device: which kernel computes y = x @ W^T, and what it may assume.
//
// The kernels are rows of tables (linear_24_kernels.h). A rule, set by whoever tuned, decides; else
// the row that serves the smallest m that is large enough.
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "core/check_args.h"
#include "core/check_packed.h"
#include "device.h"
#include "linear_24_kernels.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace cuda {
namespace {

constexpr const char* kOp = "linear_24";
constexpr int kMaxTables = 4;

struct Tables {
#if defined(WANDA_EXT_WITH_SM90A)
  std::array<const Linear24Kernels*, kMaxTables> at = {&kMmaSpKernels, &kWgmmaKernels};
  std::atomic<int> count{2};
#else
  std::array<const Linear24Kernels*, kMaxTables> at = {&kMmaSpKernels};
  std::atomic<int> count{1};
#endif
  std::mutex adding;
};

Tables& tables() {
  static Tables all;
  return all;
}

// Null where there is none.
const Linear24Kernel* row_of(int kernel) {
  const Tables& all = tables();
  const int count = all.count.load(std::memory_order_acquire);
  for (int i = 0; i < count && kernel >= 0; ++i) {
    if (kernel < all.at[i]->count) return &all.at[i]->rows[kernel];
    kernel -= all.at[i]->count;
  }
  return nullptr;
}

bool serves(const Linear24Kernel& row, Device device, DType dtype, MetaOrder order) {
  return device.arch >= row.first_arch && device.arch <= row.last_arch &&
         (dtype == DType::kFloat16 ? row.float16 : dtype == DType::kBFloat16 && row.bfloat16) &&
         (order == MetaOrder::kSm80 ? row.reads_80 : order == MetaOrder::kSm90 && row.reads_90);
}

// --- Rules ---------------------------------------------------------------------------------------

using Rules = std::vector<Linear24Rule>;

std::shared_ptr<const Rules>& shared_rules() {
  static std::shared_ptr<const Rules> rules = std::make_shared<const Rules>();
  return rules;
}

const Linear24Rule* nearest_rule(const Rules& rules, Device device, std::int64_t m, std::int64_t n,
                                 std::int64_t k, DType dtype) {
  const Linear24Rule* nearest = nullptr;
  for (const Linear24Rule& rule : rules) {
    const bool fits = rule.device.arch == device.arch && rule.device.sms == device.sms &&
                      rule.dtype == dtype && rule.n == n && rule.k == k && m <= rule.last_m;
    if (fits && (nearest == nullptr || rule.last_m < nearest->last_m)) nearest = &rule;
  }
  return nearest;
}

// --- What the kernels leave to be checked once ---------------------------------------------------

Status check_linear_24(const ConstMatrixView& x, const void* values, const std::int16_t* meta,
                       MetaOrder order, const MatrixView& y) {
  if (Status status = check_matrix(kOp, "x", x); !status.ok()) return status;
  if (Status status = check_matrix(kOp, "y", y); !status.ok()) return status;
  if (Status status = check_order(kOp, order); !status.ok()) return status;
  if (Status status = check_packed(kOp, values, meta, y.cols, x.cols); !status.ok()) return status;
  if (y.rows != x.rows || y.dtype != x.dtype || (y.rows > 1 && y.ld != y.cols)) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: y must have the %lld rows and the dtype of x, %s, and ld equal to its "
                      "columns, got %lld x %lld, %s, ld %lld",
                      kOp, static_cast<long long>(x.rows), name_of(x.dtype),
                      static_cast<long long>(y.rows), static_cast<long long>(y.cols),
                      name_of(y.dtype), static_cast<long long>(y.ld));
  }
  if (x.rows > INT32_MAX || x.cols > INT32_MAX / 2 || y.cols > INT32_MAX) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: m and n must be below 2^31 and k below 2^30, got m %lld, n %lld, k "
                      "%lld; split the call",
                      kOp, static_cast<long long>(x.rows), static_cast<long long>(y.cols),
                      static_cast<long long>(x.cols));
  }
  if (!is_aligned(x.data) || !is_aligned(values) || !is_aligned(meta) || !is_aligned(y.data) ||
      (x.rows > 1 && x.ld % 8 != 0)) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: x, values, meta and y must start on 16 bytes and ld of x be a multiple "
                      "of 8, got ld %lld; pass an aligned copy",
                      kOp, static_cast<long long>(x.ld));
  }
  return {};
}

}  // namespace

Status current_device(Device* device) {
  // Asked at most once for each device: a query costs more than a launch may.
  static std::array<std::atomic<std::int64_t>, 64> known = {};
  int index = 0;
  if (cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return status_of(kOp, error);
  std::int64_t packed = index < 64 ? known[index].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int major = 0, minor = 0, sms = 0;
    for (const auto& [value, attribute] : {std::pair{&major, cudaDevAttrComputeCapabilityMajor},
                                           std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
                                           std::pair{&sms, cudaDevAttrMultiProcessorCount}}) {
      if (cudaError_t error = cudaDeviceGetAttribute(value, attribute, index);
          error != cudaSuccess) {
        return status_of(kOp, error);
      }
    }
    packed = static_cast<std::int64_t>(major * 10 + minor) << 32 | sms;
    if (index < 64) known[index].store(packed, std::memory_order_relaxed);
  }
  *device = {static_cast<int>(packed >> 32), static_cast<int>(packed & 0xffffffff)};
  return {};
}

int linear_24_kernels() {
  const Tables& all = tables();
  int sum = 0;
  for (int i = 0; i < all.count.load(std::memory_order_acquire); ++i) sum += all.at[i]->count;
  return sum;
}

const char* linear_24_kernel_name(int kernel) {
  const Linear24Kernel* row = row_of(kernel);
  return row != nullptr ? row->name : "";
}

Status add_linear_24_kernels(const Linear24Kernels* kernels) {
  if (kernels == nullptr || kernels->abi != kLinear24Abi) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: a kernel table of version %d does not fit this binary, version %d; "
                      "install both from one build",
                      kOp, kernels != nullptr ? kernels->abi : 0, kLinear24Abi);
  }
  Tables& all = tables();
  const std::lock_guard<std::mutex> lock(all.adding);
  const int count = all.count.load(std::memory_order_relaxed);
  for (int i = 0; i < count; ++i) {
    if (all.at[i] == kernels) return {};
  }
  if (count == kMaxTables) {
    return make_error(StatusCode::kInvalidArgument, "%s: more than %d kernel tables", kOp,
                      kMaxTables);
  }
  all.at[count] = kernels;
  all.count.store(count + 1, std::memory_order_release);
  return {};
}

Status set_linear_24_rules(const Linear24Rule* rules, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (rules[i].choice.kernel == kLinear24Default) continue;
    const Linear24Kernel* row = row_of(rules[i].choice.kernel);
    if (row == nullptr || rules[i].choice.splits < 1 || rules[i].choice.splits > row->max_splits) {
      return make_error(StatusCode::kInvalidArgument,
                        "%s: rule %lld names kernel %d with %d splits, which is not here", kOp,
                        static_cast<long long>(i), rules[i].choice.kernel, rules[i].choice.splits);
    }
  }
  std::atomic_store(&shared_rules(), std::make_shared<const Rules>(rules, rules + count));
  return {};
}

Status linear_24_check(Linear24Choice choice, Device device, std::int64_t m, std::int64_t n,
                       std::int64_t k, DType dtype, MetaOrder order) {
  const Linear24Kernel* row = row_of(choice.kernel);
  if (row == nullptr) {
    return make_error(StatusCode::kInvalidArgument, "%s: there is no kernel %d; expected 0 to %d",
                      kOp, choice.kernel, linear_24_kernels() - 1);
  }
  if (!serves(*row, device, dtype, order)) {
    return make_error(StatusCode::kUnsupported,
                      "%s: kernel %s does not run on sm_%d, or not with %s and metadata order %d",
                      kOp, row->name, device.arch, name_of(dtype), static_cast<int>(order));
  }
  if (n % row->n_multiple != 0 || choice.splits < 1 || choice.splits > row->max_splits) {
    return make_error(StatusCode::kUnsupported,
                      "%s: kernel %s takes n a multiple of %lld and 1 to %d splits, got m %lld, n "
                      "%lld, k %lld, %d splits",
                      kOp, row->name, static_cast<long long>(row->n_multiple), row->max_splits,
                      static_cast<long long>(m), static_cast<long long>(n),
                      static_cast<long long>(k), choice.splits);
  }
  return {};
}

Status linear_24_choose(Device device, std::int64_t m, std::int64_t n, std::int64_t k, DType dtype,
                        MetaOrder order, Linear24Choice* choice) {
  const std::shared_ptr<const Rules> rules = std::atomic_load(&shared_rules());
  const Linear24Rule* rule = nearest_rule(*rules, device, m, n, k, dtype);
  if (rule != nullptr && linear_24_check(rule->choice, device, m, n, k, dtype, order).ok()) {
    *choice = rule->choice;
    choice->tuned = true;
    return {};
  }
  const Linear24Kernel* best = nullptr;
  const int count = linear_24_kernels();
  for (int i = 0; i < count; ++i) {
    const Linear24Kernel* row = row_of(i);
    if (!serves(*row, device, dtype, order) || n % row->n_multiple != 0 || m > row->last_m) {
      continue;
    }
    if (best == nullptr || row->last_m <= best->last_m) {
      best = row;
      choice->kernel = i;
    }
  }
  if (best == nullptr) {
    return make_error(StatusCode::kUnsupported,
                      "%s: no kernel for sm_%d, %s and metadata order %d; expected sm_80 or newer, "
                      "bfloat16 or float16, and order 80 (or 90 on sm_90): use reorder_(), another "
                      "dtype, or unswap the linear",
                      kOp, device.arch, name_of(dtype), static_cast<int>(order));
  }
  choice->splits = best->default_splits(device, m, n, k);
  choice->tuned = false;
  return {};
}

std::size_t linear_24_workspace(Linear24Choice choice, std::int64_t m, std::int64_t n,
                                std::int64_t k) {
  const Linear24Kernel* row = row_of(choice.kernel);
  return row != nullptr && m > 0 && n > 0 && k > 0 ? row->workspace(m, n, k, choice.splits) : 0;
}

Status linear_24(ConstMatrixView x, const void* values, const std::int16_t* meta, MetaOrder order,
                 const void* bias, MatrixView y, Linear24Choice choice, void* workspace,
                 cudaStream_t stream) {
  if (Status status = check_linear_24(x, values, meta, order, y); !status.ok()) return status;
  const std::int64_t m = x.rows, n = y.cols, k = x.cols;
  if (m == 0 || n == 0) return {};
  if (k == 0) choice = {};  // nothing to multiply; the first kernel writes the bias
  Device device;
  if (Status status = current_device(&device); !status.ok()) return status;
  if (Status status = linear_24_check(choice, device, m, n, k, x.dtype, order); !status.ok()) {
    return status;
  }
  const std::size_t needed = linear_24_workspace(choice, m, n, k);
  if (needed > 0 && (workspace == nullptr || !is_aligned(workspace))) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: workspace must be %zu bytes of device memory on 16 bytes, got %p", kOp,
                      needed, workspace);
  }
  return row_of(choice.kernel)
      ->run({m, n, k, x.data, x.rows > 1 ? x.ld : k, values, meta, order, bias, y.data, x.dtype,
             device},
            choice.splits, workspace, stream);
}

}  // namespace cuda
}  // namespace wanda_ext
