// The dispatcher of linear_24 over a table of its own, which records what runs: rules, defaults,
// and what is refused.
#include "../check.h"
#include "core/cuda/linear_24.cu"

namespace wanda_ext {
namespace cuda {
namespace {

using testing::Matrix;

// What the last call ran.
struct Ran {
  int kernel = -1;
  int splits = 0;
  Linear24Problem problem = {};
  void* workspace = nullptr;
};
Ran ran;

template <int kKernel>
Status record(const Linear24Problem& problem, int splits, void* workspace, cudaStream_t) {
  ran = {kKernel, splits, problem, workspace};
  return {};
}
int three_splits(Device, std::int64_t, std::int64_t, std::int64_t) { return 3; }
std::size_t workspace(std::int64_t m, std::int64_t n, std::int64_t k, int splits) {
  return splits > 1 ? static_cast<std::size_t>(m * n * k * splits) : 0;
}

// Name, first and last arch, whether it reads order 80, 90, fp16, bf16; n_multiple, last_m, most
// splits.
const Linear24Kernel kRows[] = {
    {"few", 80, 120, true, true, true, true, 1, 8, 4, three_splits, workspace, record<0>},
    {"more", 80, 120, true, true, true, true, 1, 64, 4, three_splits, workspace, record<1>},
    {"any", 80, 89, true, false, true, true, 1, INT64_MAX, 4, three_splits, workspace, record<2>},
    {"eights", 80, 120, true, true, false, true, 8, 8, 4, three_splits, workspace, record<3>},
};
const Linear24Kernel kMoreRows[] = {
    {"hopper", 90, 90, false, true, true, true, 8, INT64_MAX, 4, three_splits, workspace,
     record<4>},
};

}  // namespace

const Linear24Kernels kMmaSpKernels = {kLinear24Abi, 4, kRows};

namespace {

const Linear24Kernels kAdded = {kLinear24Abi, 1, kMoreRows};
const Linear24Kernels kOther = {kLinear24Abi + 1, 1, kMoreRows};

constexpr Device kA100 = {80, 108}, kH200 = {90, 132}, kTuring = {75, 40};

// The kernel that runs, or "" with no kernel for that.
const char* chosen(Device device, std::int64_t m, std::int64_t n, DType dtype, MetaOrder order,
                   int splits = 3, bool tuned = false) {
  Linear24Choice choice;
  const Status status = linear_24_choose(device, m, n, 64, dtype, order, &choice);
  if (!status.ok()) {
    CHECK(status.code == StatusCode::kUnsupported);
    return "";
  }
  CHECK(choice.splits == splits && choice.tuned == tuned);
  return linear_24_kernel_name(choice.kernel);
}

bool is(const char* a, const char* b) { return std::strcmp(a, b) == 0; }

constexpr DType kBf16 = DType::kBFloat16, kFp16 = DType::kFloat16;
constexpr MetaOrder k80 = MetaOrder::kSm80, k90 = MetaOrder::kSm90;

void test_tables() {
  CHECK(linear_24_kernels() == 4);
  CHECK_INVALID(add_linear_24_kernels(&kOther), "install both from one build");
  CHECK_INVALID(add_linear_24_kernels(nullptr), "install both");
  CHECK(is(chosen(kH200, 65, 8, kBf16, k90), ""));
  for (int i = 0; i < 2; ++i) {  // the second time changes nothing
    CHECK_OK(add_linear_24_kernels(&kAdded));
    CHECK(linear_24_kernels() == 5);
  }
  CHECK(is(linear_24_kernel_name(0), "few") && is(linear_24_kernel_name(4), "hopper"));
  CHECK(is(linear_24_kernel_name(-1), "") && is(linear_24_kernel_name(5), ""));
}

void test_defaults() {
  // The smallest m that is large enough; of equals the later row.
  CHECK(is(chosen(kA100, 8, 7, kBf16, k80), "few"));
  CHECK(is(chosen(kA100, 8, 16, kBf16, k80), "eights"));
  CHECK(is(chosen(kA100, 8, 16, kFp16, k80), "few"));
  CHECK(is(chosen(kA100, 9, 16, kBf16, k80), "more"));
  CHECK(is(chosen(kA100, 65, 16, kFp16, k80), "any"));
  CHECK(is(chosen(kH200, 1 << 20, 16, kBf16, k90), "hopper"));
  // Devices, orders, dtypes and n that no kernel takes.
  CHECK(is(chosen(kTuring, 1, 16, kBf16, k80), ""));
  CHECK(is(chosen(kA100, 65, 16, kBf16, k90), ""));
  CHECK(is(chosen(kH200, 65, 16, kBf16, k80), ""));
  CHECK(is(chosen(kA100, 1, 16, DType::kFloat32, k80), ""));
  CHECK(is(chosen(kA100, 1, 16, kBf16, MetaOrder::kCanonical), ""));
  CHECK(is(chosen(kH200, 65, 12, kBf16, k90), ""));
}

void test_rules() {
  const auto rule = [](Device device, std::int64_t last_m, int kernel, int splits) {
    return Linear24Rule{device, kBf16, 16, 64, last_m, {kernel, splits, true}};
  };
  // Not in order; one that sm_80 cannot run, which is as if it were not there; one for another k.
  Linear24Rule rules[] = {rule(kA100, 64, 0, 2), rule(kA100, 4, 1, 4), rule(kA100, 9, 4, 1),
                          rule(kA100, 3, 2, 1)};
  rules[3].k = 128;
  CHECK_OK(set_linear_24_rules(rules, 4));
  for (const std::int64_t m : {1, 4}) {
    CHECK(is(chosen(kA100, m, 16, kBf16, k80, 4, true), "more"));
  }
  CHECK(is(chosen(kA100, 10, 16, kBf16, k80, 2, true), "few"));
  CHECK(is(chosen(kA100, 64, 16, kBf16, k90, 2, true), "few"));
  CHECK(is(chosen(kA100, 5, 16, kBf16, k80), "eights"));     // the rule that cannot run
  CHECK(is(chosen(kA100, 65, 16, kBf16, k80), "any"));       // beyond the last rule
  CHECK(is(chosen(kA100, 4, 16, kFp16, k80), "few"));        // another dtype
  CHECK(is(chosen(kA100, 4, 24, kBf16, k80), "eights"));     // another n
  CHECK(is(chosen({80, 64}, 4, 16, kBf16, k80), "eights"));  // another device
  // A rule that says "by default" hides those for larger m.
  const Linear24Rule gap[] = {rule(kA100, 64, 0, 2), rule(kA100, 9, kLinear24Default, 1)};
  CHECK_OK(set_linear_24_rules(gap, 2));
  CHECK(is(chosen(kA100, 10, 16, kBf16, k80, 2, true), "few"));
  CHECK(is(chosen(kA100, 9, 16, kBf16, k80), "more"));
  CHECK_OK(set_linear_24_rules(rules, 4));

  // Wrong rules change nothing.
  const Linear24Rule wrong[] = {rule(kA100, 4, 5, 1), rule(kA100, 4, 0, 5), rule(kA100, 4, 0, 0)};
  for (const Linear24Rule& one : wrong) {
    CHECK_INVALID(set_linear_24_rules(&one, 1), "which is not here");
  }
  CHECK(is(chosen(kA100, 4, 16, kBf16, k80, 4, true), "more"));
  CHECK_OK(set_linear_24_rules(nullptr, 0));
  CHECK(is(chosen(kA100, 4, 16, kBf16, k80), "eights"));
}

bool refuses(const Status& status, const char* part) {
  return status.code == StatusCode::kUnsupported && std::strstr(status.message, part) != nullptr;
}

void test_check() {
  const auto check = [](int kernel, int splits, std::int64_t n = 16, Device device = kA100) {
    return linear_24_check({kernel, splits, false}, device, 1, n, 64, kBf16, k80);
  };
  CHECK_OK(check(3, 4));
  CHECK_INVALID(check(5, 1), "expected 0 to 4");
  CHECK(refuses(check(4, 1), "hopper does not run on sm_80"));
  CHECK(refuses(check(0, 1, 16, kTuring), "few does not run on sm_75"));
  CHECK(refuses(check(3, 1, 12), "a multiple of 8"));
  CHECK(refuses(check(3, 5), "1 to 4 splits"));
  CHECK(refuses(check(3, 0), "1 to 4 splits"));
}

// 4 tokens, n 16, k 64, ready to call.
struct Call {
  Matrix x_data{kBf16, 4, 64, 72}, values{kBf16, 16, 32}, y_data{kBf16, 4, 16};
  alignas(16) std::int16_t meta[64] = {};
  alignas(16) char space[16] = {};
  ConstMatrixView x = x_data.view();
  MatrixView y = y_data.view();
  const void* packed = values.view().data;
  MetaOrder order = k80;
  Linear24Choice choice = {1, 2, false};
  void* workspace = space;

  Status run() {
    ran = {};
    return linear_24(x, packed, meta, order, nullptr, y, choice, workspace, nullptr);
  }
};

void test_call() {
  Call call;
  CHECK_OK(call.run());
  CHECK(ran.kernel == 1 && ran.splits == 2 && ran.workspace == call.space);
  CHECK(ran.problem.m == 4 && ran.problem.n == 16 && ran.problem.k == 64);
  CHECK(ran.problem.ld_x == 72 && ran.problem.order == k80 && ran.problem.dtype == kBf16);
  for (const int device : {0, 1, 0}) {
    simt::device = device;
    CHECK_OK(call.run());
    CHECK(ran.problem.device.arch == (device == 0 ? 80 : 90));
    CHECK(ran.problem.device.sms == (device == 0 ? 108 : 132));
  }

  Call one;  // token, whose ld means nothing
  one.x.rows = one.y.rows = 1;
  one.x.ld = one.y.ld = 3;
  CHECK_OK(one.run());
  CHECK(ran.problem.m == 1 && ran.problem.ld_x == 64);
}

void test_empty_calls() {
  Call no_tokens, no_rows, no_columns;
  no_tokens.x.rows = no_tokens.y.rows = 0;
  CHECK_OK(no_tokens.run());
  CHECK(ran.kernel == -1);
  no_rows.y.cols = no_rows.y.ld = 0;
  CHECK_OK(no_rows.run());
  CHECK(ran.kernel == -1);
  // The first kernel writes the bias, whatever was chosen.
  no_columns.x.cols = 0;
  no_columns.packed = no_columns.workspace = nullptr;
  CHECK_OK(no_columns.run());
  CHECK(ran.kernel == 0 && ran.splits == 1);
}

// Calls `run` after `change`; nothing may have run.
template <typename Change>
Status refused(Change change) {
  Call call;
  change(call);
  const Status status = call.run();
  CHECK(ran.kernel == -1);
  return status;
}

void test_bad_calls() {
  const auto after = [](const void* data, std::size_t bytes) {
    return static_cast<const char*>(data) + bytes;
  };
  CHECK_INVALID(refused([](Call& c) { c.x.rows = 3; }), "y must have the 3 rows");
  CHECK_INVALID(refused([](Call& c) { c.y.dtype = kFp16; }), "the dtype of x, bfloat16");
  CHECK_INVALID(refused([](Call& c) { c.y.ld = 24; }), "ld 24");
  CHECK_INVALID(refused([](Call& c) { c.x.cols = 56; }), "multiple of 16, got 56");
  CHECK_INVALID(refused([](Call& c) { c.packed = nullptr; }), "values is a null pointer");
  CHECK_INVALID(refused([](Call& c) { c.order = static_cast<MetaOrder>(81); }), "got 81");
  CHECK_INVALID(refused([](Call& c) { c.x.rows = c.y.rows = std::int64_t{1} << 31; }), "split");
  CHECK_INVALID(refused([](Call& c) { c.x.ld = 68; }), "got ld 68");
  CHECK_INVALID(refused([&](Call& c) { c.x.data = after(c.x.data, 8); }), "start on 16 bytes");
  CHECK_INVALID(refused([&](Call& c) { c.packed = after(c.packed, 2); }), "start on 16 bytes");
  CHECK_INVALID(refused([](Call& c) { c.workspace = nullptr; }), "must be 8192 bytes");
  CHECK_INVALID(refused([](Call& c) { c.workspace = c.space + 8; }), "on 16 bytes");
  CHECK(refuses(refused([](Call& c) { c.order = MetaOrder::kCanonical; }), "metadata order 0"));
  CHECK(refuses(refused([](Call& c) { c.choice.splits = 5; }), "1 to 4 splits"));
  CHECK(refuses(refused([](Call&) { simt::device = 2; }), "does not run on sm_75"));
  simt::device = 0;
}

}  // namespace
}  // namespace cuda
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  cuda::test_tables();
  cuda::test_defaults();
  cuda::test_rules();
  cuda::test_check();
  cuda::test_call();
  cuda::test_empty_calls();
  cuda::test_bad_calls();
  return testing::finish();
}
